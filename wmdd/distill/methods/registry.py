"""The registry of methods: the shipped ones and those of other packages."""

import importlib
from importlib.metadata import entry_points

from wmdd.config.schema import Config
from wmdd.distill.methods.base import Method
from wmdd.errors import InputError, nearest

REGISTRY = {
    "wmdd": "wmdd.distill.methods.matching:Wmdd",
    "ce-pcbn": "wmdd.distill.methods.matching:CrossEntropyClassBN",
    "barycenter-global": "wmdd.distill.methods.matching:BarycenterGlobalBN",
    "ce-global": "wmdd.distill.methods.matching:CrossEntropyGlobalBN",
    "dm": "wmdd.distill.methods.matching:MeanMatching",
    "start": "wmdd.distill.methods.matching:StartOnly",
    "noise": "wmdd.distill.methods.matching:Noise",
    "sre2l": "wmdd.distill.methods.sre2l:SRe2L",
    "cda": "wmdd.distill.methods.sre2l:CDA",
    "sre2l++": "wmdd.distill.methods.sre2l:SRe2LPlus",
    "fadrm": "wmdd.distill.methods.sre2l:FADRM",
    "edc": "wmdd.distill.methods.sre2l:EDC",
    "random": "wmdd.distill.methods.selection:Random",
    "herding": "wmdd.distill.methods.selection:Herding",
    "k-center": "wmdd.distill.methods.selection:KCenter",
    "medoids": "wmdd.distill.methods.selection:Medoids",
    "rded": "wmdd.distill.methods.rded:RDED",
    "external": "wmdd.distill.methods.external:Imported",
}
"""Shipped methods: name -> ``module:Class``; imported when first used."""


def names() -> list[str]:
    """Return the names of all methods, including plug-ins."""
    return sorted({*REGISTRY, *(point.name for point in entry_points(group="wmdd.methods"))})


def create(config: Config, name: str | None = None) -> Method:
    """Return the method that the config names, or the method called ``name``.

    Raises:
        InputError: the method does not exist. The message suggests the nearest name.
    """
    wanted = name or config.method
    plugins = {point.name: point for point in entry_points(group="wmdd.methods")}
    if wanted in REGISTRY:
        module, _, attribute = REGISTRY[wanted].partition(":")
        made = getattr(importlib.import_module(module), attribute)(config)
    elif wanted in plugins:
        made = plugins[wanted].load()(config)
    else:
        raise InputError(f"method = {wanted!r}: no such method; {nearest(wanted, names())}")
    if not isinstance(made, Method):
        raise InputError(f"method {wanted!r}: {type(made).__name__} is not a subclass of wmdd.methods.Method")
    return made
