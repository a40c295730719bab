"""Steps that several stages share, or that fill a module of their own: data set, leak gates, evaluation, initial weights.

They take the config and the workspace, as stages do, and no stage imports another. What needs no config belongs to the folders
below.
"""
