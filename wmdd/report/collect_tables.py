"""The tables of a report, in the order in which one reads them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from wmdd.report import accuracy_tables, cost_tables, image_tables
from wmdd.report.table import Table, trimmed

if TYPE_CHECKING:
    from wmdd.report.collect import Report

_MAKERS: "tuple[Callable[[Report], Table], ...]" = (
    accuracy_tables.overview,
    accuracy_tables.accuracy,
    image_tables.accuracy_by_class,
    image_tables.other_images,
    accuracy_tables.published,
    accuracy_tables.architectures,
    accuracy_tables.ablation,
    accuracy_tables.robustness,
    cost_tables.throughput,
    cost_tables.scaling,
    cost_tables.coverage,
    cost_tables.cost,
    cost_tables.provenance,
)


def tables(report: "Report") -> list[Table]:
    """Return the tables that have something to say."""
    return [trimmed(table) for table in (make(report) for make in _MAKERS) if table.rows]
