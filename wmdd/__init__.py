"""Distributed benchmark suite for dataset distillation by Wasserstein barycenters."""
