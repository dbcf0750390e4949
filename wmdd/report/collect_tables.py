"""The tables of a report, in the order in which one reads them."""

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from wmdd.report import accuracy_tables, cost_tables, image_tables, published_table, recipe_tables
from wmdd.report.table import Table, trimmed

if TYPE_CHECKING:
    from wmdd.report.collect import Report

_MAKERS: "tuple[Callable[[Report], Table | Iterable[Table]], ...]" = (
    accuracy_tables.overview,
    recipe_tables.effect_of_the_recipe,
    accuracy_tables.accuracy,
    image_tables.accuracy_by_class,
    image_tables.other_images,
    image_tables.pairs_of_methods,
    published_table.published,
    accuracy_tables.architectures,
    accuracy_tables.ablation,
    accuracy_tables.robustness,
    cost_tables.throughput,
    cost_tables.scaling,
    cost_tables.coverage,
    cost_tables.cost,
    cost_tables.provenance,
)


@functools.lru_cache(maxsize=1)  # a report goes to a terminal and to a page
def tables(report: "Report") -> list[Table]:
    """Return the tables that have something to say."""
    made = (make(report) for make in _MAKERS)
    every = (table for one in made for table in ([one] if isinstance(one, Table) else one))
    return [trimmed(table) for table in every if table.rows]
