"""Sweeps: grids, pairs, Optuna studies with pruning, cost estimates and figures. The only folder that imports Optuna."""
