"""Tables of what work took and where it stands: speeds, scaling, coverage, cost, provenance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.records.schema import SpeedRecord
from wmdd.report.aggregate import STAGES, origin
from wmdd.report.format import NONE, Row, number, points, size
from wmdd.report.table import Table, term
from wmdd.storage.files import flatten

if TYPE_CHECKING:
    from wmdd.report.collect import Report


def coverage_line(report: "Report") -> str:
    """Return in a sentence how much of the requested work is done."""
    complete = int((report.coverage["missing"] == "").sum())
    return f"{complete} of {len(report.coverage)} runs are complete." if len(report.coverage) else ""


def throughput(report: "Report") -> Table:
    """Return the speed of every stage and engine."""
    found = [(run, speed) for run, speed in report.speeds if speed.kind == "throughput"]
    shared, unlike = _setups([speed for _, speed in found])
    columns = ["Stage", "Data set", "Network", "Hardware", "Revision", "Engine", "Ranks", "Rate", "Ratio to baseline"]
    columns += ["Step (p50 / p90)", "Peak", "MFU %", "Of product %", *unlike]
    return Table(
        title="Throughput",
        caption=(
            "Median over repeats [least, most]. The ratio is to the baseline that the same command timed at the same"
            " revision: the median of the ratios of the repeats. Peak: of the process on a CPU. Data set"
            " “synthetic”: generated images. MFU: against the data sheet's dense peak. Of product:"
            " against a square matrix product measured beside it."
        ),
        columns=columns,
        rows=[
            [*_timed(speed), _hardware(speed), _revision(speed), speed.engine, str(speed.ranks), rate(speed)]
            + [_ratio(speed), _step(speed), size(speed.metrics.get("peak_bytes")), *_shares(speed)]
            + [term(key, flatten(speed.setup).get(key)) for key in unlike]
            for _, speed in sorted(found, key=lambda pair: _order(pair[1]))
        ],
        words=6,
        setting=5,
        terms=shared,
        optional=frozenset(unlike),
        origins=[[_origin(run.label, speed)] for run, speed in sorted(found, key=lambda pair: _order(pair[1]))],
    )


def _shares(speed: SpeedRecord) -> list[str]:
    """Return MFU and the share of a measured product; older records call the latter ``mfu``."""
    metrics = speed.metrics
    measured = metrics.get("product_share", metrics.get("mfu") if "data_sheet_flops" not in metrics else None)
    return [points(metrics.get("mfu") if "data_sheet_flops" in metrics else None), points(measured)]


def scaling(report: "Report") -> Table:
    """Return the speed over the number of ranks."""
    found = sorted(
        ((run, speed) for run, speed in report.speeds if speed.kind == "scaling"), key=lambda pair: _order(pair[1])
    )
    shared, unlike = _setups([speed for _, speed in found])
    columns = ["Stage", "Data set", "Network", "Mode", "Engine", "Hardware", "Ranks", "Rate", "Efficiency %", "Bound %"]
    columns += ["Synthesis, s", "Whole job, s", "Same images"]
    return Table(
        title="Scaling",
        caption=(
            "Strong: the same work on every number of ranks; weak: as much for each rank. Efficiency: the rate for each"
            " rank over that of the fewest, the median of the ratios of the repeats. Bound: of whole groups, where the"
            " rank with most groups decides. Whole job: with start, statistics and warm-up. Median [least, most]. Data"
            " set “synthetic”: generated images."
        ),
        columns=[*columns, *unlike],
        rows=[
            [*_timed(speed), speed.mode or NONE, speed.engine, _hardware(speed), str(speed.ranks), rate(speed)]
            + [_efficiency(speed), points(speed.metrics.get("balance")), number(speed.metrics.get("seconds"))]
            + [number(speed.metrics.get("total")), term("same_images", _same_images(speed))]
            + [term(key, flatten(speed.setup).get(key)) for key in unlike]
            for _, speed in found
        ],
        words=6,
        setting=4,
        terms=shared,
        origins=[[_origin(run.label, speed)] for run, speed in found],
    )


def _efficiency(speed: SpeedRecord) -> str:
    ends = [speed.metrics.get(f"efficiency_{end}") for end in ("low", "high")]
    spread = f" [{points(ends[0])}, {points(ends[1])}]" if None not in ends and ends[0] != ends[1] else ""
    return points(speed.metrics.get("efficiency")) + spread


def _same_images(speed: SpeedRecord) -> bool | None:
    """Return whether all numbers of ranks made the same images."""
    return bool(speed.metrics["same_images"]) if "same_images" in speed.metrics else None


def _timed(speed: SpeedRecord) -> list[str]:
    network = speed.network or NONE
    return [speed.stage, speed.dataset, f"{network}, {speed.resolution} px" if speed.resolution else network]


def _hardware(speed: SpeedRecord) -> str:
    return origin(speed.provenance)[1] or NONE


def _revision(speed: SpeedRecord) -> str:
    return str(speed.provenance.get("revision") or NONE)[:8]


def _order(speed: SpeedRecord) -> tuple[Any, ...]:
    about = (speed.stage, speed.dataset, speed.network or "", speed.resolution or 0, speed.mode or "")
    # Numbers by their size: 5, 10, 20 images, as text 10, 20, 5.
    setup = [
        (key, value if isinstance(value, int | float) else 0, str(value)) for key, value in flatten(speed.setup).items()
    ]
    return (*about, _hardware(speed), _revision(speed), setup, speed.engine, speed.ranks)


def _setups(found: Sequence[SpeedRecord]) -> tuple[dict[str, str], list[str]]:
    """Return what all set-ups share, and the keys in which they differ."""
    setups = [flatten(speed.setup) for speed in found]
    keys = list(dict.fromkeys(key for setup in setups for key in setup))
    unlike = [key for key in keys if len({term(key, setup.get(key)) for setup in setups}) > 1]
    return {key: term(key, setups[0].get(key)) for key in keys if key not in unlike}, unlike


def rate(speed: SpeedRecord) -> str:
    """Return the median rate of a speed, with the least and the most of its repeats where they are known."""
    return f"{_spread(speed, 'rate', ',.3g')} {speed.unit}" if "rate" in speed.metrics else NONE


def _ratio(speed: SpeedRecord) -> str:
    return f"{_spread(speed, 'ratio', '.2f')}×" if "ratio" in speed.metrics else NONE


def _spread(speed: SpeedRecord, key: str, form: str) -> str:
    found = speed.metrics
    value, low, high = (found.get(name) for name in (key, f"{key}_low", f"{key}_high"))

    def text(figure: float) -> str:
        return f"{figure:,.0f}" if figure >= 1000 else f"{figure:{form}}"

    return text(value or 0.0) + (f" [{text(low)}, {text(high)}]" if low is not None and high is not None else "")


def _step(speed: SpeedRecord) -> str:
    steps = [speed.metrics.get(key) for key in ("p50", "p90")]
    return " / ".join(NONE if step is None else _duration(step) for step in steps) if any(steps) else NONE


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def _origin(run: str, speed: SpeedRecord) -> dict[str, str]:
    names = ("revision", "hardware", "versions", "set-up")
    about = dict(zip(names, origin(speed.provenance), strict=True))
    repeats = speed.metrics.get("repeats")
    return {"run": run, **about, "repeats": number(repeats, digits=0), "measured": f"{speed.time:%Y-%m-%d %H:%M}"}


def coverage(report: "Report") -> Table:
    """Return the runs that lack something."""
    rows = [row for row in report.coverage.to_dict("records") if row["missing"]]
    return Table(
        title="Coverage",
        caption=f"{coverage_line(report)} What is missing of the others:",
        columns=["Run", "Method", "Missing", "Seed", "Blocks", "Students"],
        rows=[
            [row["run"], row["method"], row["missing"], term("seed", row["seed"])]
            + [
                NONE if pd.isna(row[part]) else f"{row[part]} / {row[f'{part}_expected']}"
                for part in ("blocks", "students")
            ]
            for row in rows
        ],
        words=3,
    )


def cost(report: "Report") -> Table:
    """Return what each run took, stage by stage, and all together."""
    cost = report.cost
    rows = cost.to_dict("records")
    if rows:
        # Runs that share a teacher waited for it once.
        own = ~cost["teacher_sha256"].fillna(cost["run"]).duplicated()
        total: Row = {stage: cost[stage].sum(min_count=1) for stage in STAGES}
        total["teacher"] = cost["teacher"][own].sum(min_count=1)
        total |= {
            "run": "all runs, each teacher once",
            "total": sum(total[stage] for stage in STAGES if not pd.isna(total[stage])),
        }
        shared = cost["teacher_device_seconds"][~own].sum()
        total |= {"device_seconds": cost["device_seconds"].sum() - shared, "peak_bytes": cost["peak_bytes"].max()}
        rows.append(total | {"joules": cost["joules"].sum(min_count=1)})
    columns = ["Run", *(f"{stage.capitalize()}, s" for stage in STAGES), "Total, s", "Device-hours", "Peak", "Energy"]
    return Table(
        title="Cost",
        caption=(
            "Seconds of wall-clock time, summed over groups and students; device-hours of all stages, the teacher"
            " included; peak memory of one process or device. A teacher stands in each of its runs."
        ),
        columns=columns,
        rows=[
            [
                row["run"],
                *(number(row[stage]) for stage in (*STAGES, "total")),
                number(row["device_seconds"], 3600, 3),
                size(row["peak_bytes"]),
                size(row["joules"], "J"),
            ]
            for row in rows
        ],
    )


def provenance(report: "Report") -> Table:
    """Return every origin of a number, with how many came from it."""
    return Table(
        title="Provenance",
        caption="Where each accuracy, speed and block of images comes from; fingerprints and artefacts are SHA-256.",
        columns=["Of", "Run", "Config", "Artefact", "Revision", "Hardware", "Versions", "Set-up", "Count"],
        rows=[[str(value) or NONE for value in row] for row in report.provenance.itertuples(index=False)],
        words=8,
    )
