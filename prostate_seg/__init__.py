"""Whole-prostate segmentation on T2-weighted MRI, run as a Hydra-configured pipeline."""

__version__ = "0.2.0"
