"""Public prostate MRI: the list of data sets, their download, and the extraction of their archives.

Reading a data set that is in place belongs to the modules of data/ above.
"""
