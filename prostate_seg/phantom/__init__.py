"""Synthetic T2-weighted studies whose prostate mask and volume follow from a formula.

Nothing heavy is imported here: the launcher reads `phantom.settings`. Reading image files belongs in imaging/.
"""
