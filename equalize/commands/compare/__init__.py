"""Whether equalizing helps, here: the same training from several beginnings, with intervals.

arms.py        names -> what is done to the network, and what is compared with what
setup.py       arms, rates, seeds and the settings they share
start.py       what an arm does to the network before its first step
runs.py        one training for each arm, rate and seed; what is finished stays
statistics.py  paired differences, Student's t over seeds, bootstrap over images
verdict.py     differences at every rate; three questions, answered or not
comparison.py  all of it
report.py      the table and the answers, for a terminal and as Markdown
curves.py      learning curves as a PNG
"""
