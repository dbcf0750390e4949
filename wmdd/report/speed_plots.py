"""Plots of speed: ratios to a baseline, rates over ranks, and where the time goes."""

from collections.abc import Sequence
from typing import Any

from wmdd.records.schema import SpeedRecord
from wmdd.report.drawing import COLOURS, MAX_PANELS, PHASES, Drawing, Plot, PlotGroup, ticks

_PHASES = ("startup", "statistics", "preparation", "warmup", "synthesis", "waiting")
"""Phases of a scaling study; ``waiting`` is a part of ``synthesis``."""
_ENGINES = ("p0", "p1", "p2")


def throughput_ratios(speeds: Sequence[SpeedRecord]) -> PlotGroup:
    """Return the ratios to the baselines that the same commands timed: a panel for each stage."""
    stages: dict[str, list[SpeedRecord]] = {}
    for speed in speeds:
        if speed.kind == "throughput" and "ratio" in speed.metrics:
            stages.setdefault(speed.stage, []).append(speed)
    panels: list[Plot] = []
    for stage, own in list(stages.items())[:MAX_PANELS]:
        own.sort(key=lambda speed: (_what(speed), speed.metrics["ratio"]), reverse=True)
        with Drawing(f"ratio{stage}", (3.4, 0.75 + 0.46 * len(own))) as drawing:
            axes = drawing.axes
            drawing.figure.subplots_adjust(left=0.05, bottom=0.5 / (0.75 + 0.46 * len(own)), top=0.97)
            ratios = [speed.metrics["ratio"] for speed in own]
            ends = [
                [speed.metrics.get(f"ratio_{end}", speed.metrics["ratio"]) for speed in own] for end in ("low", "high")
            ]
            bars = [[abs(end - ratio) for end, ratio in zip(found, ratios, strict=True)] for found in ends]
            places = range(len(own))
            axes.barh(places, ratios, 0.34, color=COLOURS["rest"])
            axes.errorbar(ratios, places, xerr=bars, fmt="none", ecolor=COLOURS["ink"], elinewidth=1)
            axes.axvline(1, color=COLOURS["quiet"], linewidth=1)
            for place, speed in zip(places, own, strict=True):
                text = {"va": "bottom", "fontsize": 8, "color": COLOURS["ink"]}
                axes.text(0.02, place + 0.2, f"{_what(speed)}: {speed.metrics['ratio']:.2f}×", **text)
            axes.set_yticks([])
            axes.set_ylim(-0.4, len(own) - 0.25)
            axes.set_xlim(0, max(1.2, *(end for end in ends[1])) * 1.03)
            axes.set_xlabel("× baseline")
        panels.append(Plot(stage, drawing.svg))
    caption = (
        "Rate over that of the baseline that the same command timed, in turns; bars from the least to the most of the"
        " repeats. Line: as fast as the baseline."
    )
    return PlotGroup("Speed against baselines", caption, panels, len(stages), [])


def _what(speed: SpeedRecord) -> str:
    parts = (speed.dataset, speed.network, f"IPC {speed.setup['ipc']}" if "ipc" in speed.setup else None)
    extra = [str(speed.setup[key]) for key in ("compile", "regime") if isinstance(speed.setup.get(key), str)]
    return ", ".join([*(str(part) for part in parts if part), *extra])


def _studies(speeds: Sequence[SpeedRecord]) -> list[tuple[str, list[SpeedRecord]]]:
    """Return the studies over more than one number of ranks, by their title."""
    groups: dict[str, list[SpeedRecord]] = {}
    for speed in sorted(speeds, key=lambda speed: speed.ranks):
        if speed.kind == "scaling" and "rate" in speed.metrics:
            what = ", ".join(str(p) for p in (speed.network, speed.resolution and f"{speed.resolution} px") if p)
            title = f"{speed.stage}, {speed.mode or 'strong'} scaling: {speed.dataset}{', ' + what if what else ''}"
            groups.setdefault(title, []).append(speed)
    return [(title, own) for title, own in groups.items() if len({speed.ranks for speed in own}) > 1]


def throughput_over_ranks(speeds: Sequence[SpeedRecord]) -> PlotGroup:
    """Return rates over ranks, both logarithmic, with the ideal and the bound that whole groups set."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    studies = _studies(speeds)
    engines = list(dict.fromkeys(speed.engine for _, own in studies for speed in own))
    panels: list[Plot] = []
    for title, own in studies[:MAX_PANELS]:
        with Drawing(f"ranks{len(panels)}") as drawing:
            axes = drawing.axes
            for engine in dict.fromkeys(speed.engine for speed in own):
                line = [speed for speed in own if speed.engine == engine]
                ranks, rates = [speed.ranks for speed in line], [speed.metrics["rate"] for speed in line]
                ends = [[s.metrics.get(f"rate_{end}", s.metrics["rate"]) for s in line] for end in ("low", "high")]
                bars = [[abs(end - rate) for end, rate in zip(found, rates, strict=True)] for found in ends]
                colour = COLOURS[_ENGINES[engines.index(engine) % len(_ENGINES)]]
                axes.errorbar(ranks, rates, bars, color=colour, marker="o", markersize=4, linewidth=1.5, elinewidth=0.9)
                ideal = [rates[0] * n / ranks[0] for n in ranks]
                axes.plot(ranks, ideal, ":", color=COLOURS["quiet"], linewidth=1)
                bound = [one * speed.metrics.get("balance", 1.0) for one, speed in zip(ideal, line, strict=True)]
                if bound != ideal:
                    axes.plot(ranks, bound, "--", color=COLOURS["quiet"], linewidth=1)
            axes.set_xscale("log")
            axes.set_yscale("log")
            ticks(axes, sorted({speed.ranks for speed in own}))
            low, high = axes.get_ylim()
            if high < 20 * low:
                axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(EngFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("ranks")
            axes.set_ylabel(own[0].unit)
        panels.append(Plot(title, drawing.svg))
    legend = [(engine, _ENGINES[number % len(_ENGINES)], "") for number, engine in enumerate(engines)]
    caption = (
        "Median rate, bars from the least to the most of the repeats. Dotted: proportional to the ranks. Dashed: the"
        " bound of whole groups, where the rank with most groups decides."
    )
    return PlotGroup("Throughput over ranks", caption, panels, len(studies), legend if len(engines) > 1 else [])


def time_by_phase(speeds: Sequence[SpeedRecord]) -> PlotGroup:
    """Return where the time of a whole job goes, for each number of ranks."""
    studies = [(title, [s for s in own if "startup" in s.metrics]) for title, own in _studies(speeds)]
    studies = [(title, own) for title, own in studies if own]
    panels: list[Plot] = []
    for title, own in studies[:MAX_PANELS]:
        with Drawing(f"phases{len(panels)}") as drawing:
            below = [0.0] * len(own)
            for phase, colour in zip(_PHASES, PHASES, strict=True):
                heights = [_seconds(speed, phase) for speed in own]
                bar: dict[str, Any] = {"bottom": below, "color": COLOURS[colour], "width": 0.6}
                drawing.axes.bar(range(len(own)), heights, **bar)
                below = [one + height for one, height in zip(below, heights, strict=True)]
            drawing.axes.set_xticks(range(len(own)), [str(speed.ranks) for speed in own])
            drawing.axes.set_xlabel("ranks")
            drawing.axes.set_ylabel("seconds")
        panels.append(Plot(title, drawing.svg))
    legend = [(phase, colour, "") for phase, colour in zip(_PHASES, PHASES, strict=True)]
    caption = "Median seconds of each phase on its slowest rank; waiting: mean time in which a rank waits for others."
    return PlotGroup("Where the time goes", caption, panels, len(studies), legend)


def _seconds(speed: SpeedRecord, phase: str) -> float:
    found = speed.metrics.get(phase, 0.0)
    return found - speed.metrics.get("waiting", 0.0) if phase == "synthesis" else found
