"""Results of one evaluation: tables of its cases, subgroups and slices, the trust in single masks, and its stress test.

Metrics of a case are in segmentation/. Comparisons of several evaluations are in comparison/, plots in figures/.
"""
