"""Comparison of evaluations on the same cases: pairs of networks, settings over seeds, sizes of training sets, unseen groups.

Each module has the statistics and the lines for a terminal, figures.py the plots. Results of one evaluation are in evaluation/.
"""
