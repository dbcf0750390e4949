"""Barycenters: K atoms that represent the features of one class."""
