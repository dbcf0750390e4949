"""The tables of a report, in the order in which one reads them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from wmdd.reporting import compared, spent
from wmdd.reporting.words import Table, trimmed

if TYPE_CHECKING:
    from wmdd.reporting import Report

_MAKERS: "tuple[Callable[[Report], Table], ...]" = (
    compared.overview,
    compared.accuracy,
    compared.published,
    compared.architectures,
    compared.ablation,
    compared.robustness,
    spent.throughput,
    spent.scaling,
    spent.coverage,
    spent.cost,
    spent.provenance,
)


def tables(report: "Report") -> list[Table]:
    """Return the tables that have something to say."""
    return [trimmed(table) for table in (make(report) for make in _MAKERS) if table.rows]
