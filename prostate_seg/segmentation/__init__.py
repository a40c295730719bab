"""Networks, losses, augmentation, training, inference and metrics. No Hydra, no MLflow, no config."""
