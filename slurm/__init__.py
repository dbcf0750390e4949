"""SLURM arrays through submitit."""
