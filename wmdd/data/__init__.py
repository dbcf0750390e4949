"""Datasets: find, list, decode, pack and augment images."""
