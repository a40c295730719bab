"""The tracking store: its connection, the tree of runs in it, leader election, and the checks of stage=doctor.

What is recorded and when is decided above, in tracking/. A pipeline, sweep, stage, trial or fold is one run of the tree.
"""
