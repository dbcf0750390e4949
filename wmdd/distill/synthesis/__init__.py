"""Synthesis: images optimized until their features and moments match their targets."""
