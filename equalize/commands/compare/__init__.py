"""Whether equalizing helps, here: the same training from several starting points, with intervals.

arms.py          names -> what is done to the network, what is compared with what
setup.py         arms, rates, seeds and the settings they share
runs.py          one training for each arm, rate and seed; finished ones are kept
statistics.py    paired differences with intervals at every rate; three questions, answered or not
tuning.py        each arm's best rate, its sweep extended where that lies at an edge
confirmation.py  the arms at their best rates, on fresh seeds and a third split
compare.py       all of it
dry_run.py       which runs there would be, and about how long they take
report.py        what came of it, as compare.md and report.html
pictures.py      their pictures
"""
