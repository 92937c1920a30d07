"""Reports as pages and pictures: the only package that imports matplotlib, and only where something is drawn.

page.py           a page of sections, by page.html, and a PNG for each of its pictures
style.py          the look of every figure, on light and on dark ground
words.py          sentences on scales, plans and proofs, for pages and terminals
layers.py         pages of scan and calibrate
sites.py          a fusion layer and its branches, drawn
distributions.py  histograms of branches, drawn
training.py       curves of a training, and its images beside their mistakes
comparison.py     a comparison's rates, curves, classes and confirmed scores
"""
