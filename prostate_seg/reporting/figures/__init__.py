"""Figures: plots of metrics as PNG files or SVG, and slices of studies with contours.

They are built from matplotlib's objects and never through pyplot. The figure of a comparison is beside its statistics.
"""
