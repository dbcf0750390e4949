"""Random seeds and generators, derived from the names of what they are used for."""

import hashlib

import torch


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed from names and numbers, such as ``seed_of(config.seed, "start", class_name)``.

    Seeds depend on what is computed (a class, a group, an iteration), never on the process that computes it.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded with ``seed_of``: its numbers are the same for every device."""
    return torch.Generator().manual_seed(seed_of(*parts))
