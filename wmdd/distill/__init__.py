"""Stage 2: class statistics, barycenters and synthesis make the distilled images of a block."""
