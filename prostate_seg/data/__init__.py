"""Cases, folds, the leak gate and the phantom. No torch, no config, no tracking."""
