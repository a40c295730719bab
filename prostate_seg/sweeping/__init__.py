"""Sweeps: the two sweepers that Hydra itself lacks, and the stopping of hopeless trials. Optuna is imported here alone."""
