"""Training of one network on one fold: packed set, augmentation, losses, loop, checkpoints, distributed training.

Splits are made in data/. Nothing here imports MLflow or Hydra.
"""
