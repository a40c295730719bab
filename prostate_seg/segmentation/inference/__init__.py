"""Inference from a study to its mask, shared by validation, evaluation and prediction, and the checks of a prediction.

Metrics against a reference are in segmentation/metrics.py.
"""
