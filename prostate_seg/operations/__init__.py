"""Processes on one machine or a cluster: workspace lock, process identity, signals of a scheduler, health checks.

Nothing here depends on the computation of a stage or on a tracking store.
"""
