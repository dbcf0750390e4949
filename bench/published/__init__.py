"""Accuracies from the literature, one TOML file for each data set (``wmdd.published`` says what the keys mean).

Author: read in the authors' own pages or repositories. Second-hand: quoted by others. Memory: to be checked.
"""

from importlib import resources
from importlib.resources.abc import Traversable


def folder() -> Traversable:
    """Return the folder of the files."""
    return resources.files("bench") / "published"
