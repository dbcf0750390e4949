"""Barycenters: K atoms that stand for the features of one class."""
