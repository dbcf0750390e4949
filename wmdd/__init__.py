"""Distributed benchmark suite for dataset distillation by Wasserstein barycenters (WMDD, ICCV 2025).

The Python API has three names: ``load_config``, ``run`` and ``DistilledSet``.  Each is imported on first use.
``__version__`` is the version of the installed package.
"""

import os
from typing import TYPE_CHECKING, Any

# Read by torch when it first allocates memory.  On a CPU large tensors then get pages of 2 MB: with pages of 4 kB the
# kernel spends as long on a new tensor as torch on its values.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from wmdd.config.loading import load_config
    from wmdd.pipeline import run
    from wmdd.runs.distilled_set import DistilledSet

    __version__: str

__all__ = ["DistilledSet", "load_config", "run"]

_HOME = {"load_config": "wmdd.config.loading", "run": "wmdd.pipeline", "DistilledSet": "wmdd.runs.distilled_set"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("wmdd")
    if name not in _HOME:
        raise AttributeError(f"module 'wmdd' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
