"""Public prostate MRI: the list of data sets, their download, and the unpacking of their archives.

Nothing here looks into a data set that is in place; that is done by the modules of data/ above.
"""
