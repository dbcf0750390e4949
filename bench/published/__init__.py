"""Accuracies from the literature, one TOML file for each dataset (``wmdd.report.published`` describes the keys).

The mark of an entry is ``author`` (from the authors' own pages or repositories), ``second-hand`` (quoted by others) or
``memory`` (to be checked).
"""

from importlib import resources
from importlib.resources.abc import Traversable


def folder() -> Traversable:
    """Return the folder of the TOML files."""
    return resources.files("bench") / "published"
