"""Hyperparameter sweeps through Ray Tune."""
