"""Steps that several stages share: the checked data set, the leak gate on folds and ancestors, initial weights, fold processes.

They know the config and the workspace, as stages do. A step of one stage is in the module of the stage; what needs no config
belongs to the folders below.
"""
