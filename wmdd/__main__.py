"""``python -m wmdd`` and ``torchrun -m wmdd``."""

from wmdd.cli import main

main()
