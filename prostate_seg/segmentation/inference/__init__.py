"""From a study to its mask: the one path of validation, evaluation and prediction, and what a prediction states of itself.

Measuring a mask against a reference is the subject of segmentation/metrics.py.
"""
