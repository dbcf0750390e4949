"""Atomic files, and the cache that runs share."""
