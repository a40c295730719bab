"""Data sets: cases and their layouts, loading with checks, folds, the leak gate, public sets, and outputs of a prediction.

Files and tables only: no torch, no configuration, no tracking. Reading and preprocessing of a single image belong to imaging/.
"""
