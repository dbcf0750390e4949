"""Stage 1: the frozen teacher, trained here or imported."""
