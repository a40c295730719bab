"""Fitting one network on one fold: packed studies, augmentation, losses, the loop, checkpoints, several processes.

Which cases a fold holds is decided in data/; nothing here knows MLflow or Hydra.
"""
