"""Networks: creation by name, the frozen teacher, weights, checkpoints and accuracy."""
