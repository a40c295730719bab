"""Utilities for every other folder: errors, settings, atomic files, progress bars, signals, random streams, tables.

Nothing here depends on images, networks or tracking, and nothing heavy is imported.
"""
