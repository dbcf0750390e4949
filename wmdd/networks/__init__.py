"""Networks by name, the frozen network with its moments, weights, checkpoints, accuracy."""
