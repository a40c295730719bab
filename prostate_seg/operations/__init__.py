"""Processes on one machine or a cluster: the workspace lock, process identity, signals of a scheduler, health checks.

Nothing here knows what a stage computes or what a tracking store holds.
"""
