"""The images: where they lie, which are chosen, how they are decoded, packed and augmented."""
