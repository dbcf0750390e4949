"""Plots of a sweep as SVG, in the colors of the page."""

import math
from collections.abc import Sequence
from typing import Any

from sweeps.format import show
from sweeps.objective import SweepObjective, seeds_of
from sweeps.space import Parameter, Range
from sweeps.trial_log import Trial
from wmdd.report.drawing import Drawing

_COLOURS = {"ink": "#100001", "accent": "#100002", "quiet": "#100003", "line": "#100004", "page": "#100005"}
"""Placeholders, replaced by the page's own colors: plots are legible in light and in dark mode."""

_STOPPED = -0.15
"""Height at which the lines of stopped trials end."""


def response(parameter: Parameter, trials: Sequence[Trial], objective: SweepObjective) -> str:
    """Return the objective over one key: complete trials with the range of their students, stopped ones on the axis.

    A stopped trial has no value here: its last report comes from a shorter student on unfinished images.
    """
    with Drawing(f"response-{parameter.key}", (3.4, 2.5), _COLOURS, fixed=False) as drawing:
        axes = drawing.axes
        for trial in trials:
            if parameter.key not in trial.values:
                continue
            x = _place(parameter, trial.values[parameter.key])
            if trial.state != "done":
                style: dict[str, Any] = {
                    "markeredgecolor": _COLOURS["quiet"],
                    "markerfacecolor": _COLOURS["page"],
                    "clip_on": False,
                }
                axes.plot(x, 0, "o", transform=axes.get_xaxis_transform(), markersize=5, zorder=3, **style)
                continue
            colour = _COLOURS["accent" if trial.number == 0 else "ink"]
            y = _scaled(objective, trial.last[objective.key])
            students = [100 * value for value in seeds_of(trial)] if objective.key == "top1" else []
            if len(students) > 1:
                axes.plot([x, x], [min(students), max(students)], color=colour, linewidth=0.8, alpha=0.5)
            axes.plot(x, y, "D" if trial.number == 0 else "o", markersize=5, color=colour, zorder=3)
        _scale(axes.xaxis, parameter)
        axes.set_xlabel(parameter.key)
        axes.set_ylabel(_unit(objective))
    return drawing.svg


def parallel(parameters: Sequence[Parameter], trials: Sequence[Trial], objective: SweepObjective) -> str:
    """Return every trial as a line over all keys and the objective: the best third in color, stopped ones dotted."""
    worth = {trial.number: _scaled(objective, trial.last[objective.key]) for trial in trials if trial.state == "done"}
    low, high = min(worth.values()), max(worth.values())
    order = sorted(worth.values(), reverse=objective.direction == "maximize")
    cut = order[(len(order) - 1) // 3]
    with Drawing("parallel", (max(6.0, 1.5 * (len(parameters) + 1)), 2.8), _COLOURS, fixed=False) as drawing:
        axes = drawing.axes
        for trial in trials:
            heights = [_height(parameter, trial.values.get(parameter.key)) for parameter in parameters]
            value = worth.get(trial.number)
            if value is None:
                heights.append(_STOPPED)
                good = False
            else:
                heights.append((value - low) / (high - low) if high > low else 0.5)
                good = value >= cut if objective.direction == "maximize" else value <= cut
            style, colour = ":" if value is None else "-", _COLOURS["accent" if good else "quiet"]
            axes.plot(range(len(heights)), heights, style, color=colour, alpha=0.9 if good else 0.45, linewidth=1.4)
        last = len(parameters)
        for position in range(last + 1):
            axes.axvline(position, color=_COLOURS["line"], linewidth=1, zorder=0)
        labels = [
            (position, _height(parameter, value), show(value))
            for position, parameter in enumerate(parameters)
            for value in _ticks(parameter)
        ]
        labels += [(last, 0.0, f"{low:.4g}"), (last, 1.0, f"{high:.4g}")] if high > low else [(last, 0.5, f"{low:.4g}")]
        labels += [(last, _STOPPED, "stopped")] if len(worth) < len(trials) else []
        for position, height, text in labels:
            axes.text(position + 0.03, height, text, color=_COLOURS["ink"], fontsize=8, verticalalignment="center")
        names = [parameter.key.replace(".", ".\n") for parameter in parameters]
        axes.set_xticks(range(last + 1), [*names, _unit(objective)])
        axes.set_xlim(-0.1, last + 0.4)
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
    return drawing.svg


def _unit(objective: SweepObjective) -> str:
    return "top-1 %" if objective.key == "top1" else "seconds" if objective.name == "time" else objective.name


def _scaled(objective: SweepObjective, value: float) -> float:
    return 100 * value if objective.key == "top1" else value


def _place(parameter: Parameter, value: Any) -> float:
    """Return the coordinate of a value: the number itself, or its position in the list (a foreign value: the end)."""
    if isinstance(parameter.domain, Range):
        return float(value)
    values = parameter.domain.values
    return float(values.index(value)) if value in values else float(len(values))


def _scale(axis: Any, parameter: Parameter) -> None:
    from matplotlib.ticker import FuncFormatter

    if isinstance(parameter.domain, Range):
        if parameter.domain.log:
            axis.axes.set_xscale("log")
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        labels = [show(value) for value in parameter.domain.values]
        axis.set_ticks(range(len(labels)), labels)
        axis.axes.margins(x=0.15)


def _height(parameter: Parameter, value: Any) -> float:
    """Return a value's height from 0 to 1 on its axis; NaN if the key is inactive."""
    if value is None:
        return math.nan
    domain = parameter.domain
    if not isinstance(domain, Range):
        return _place(parameter, value) / max(1, len(domain.values) - 1)
    ends = (domain.low, domain.high, value)
    low, high, here = (math.log(max(end, 1e-300)) for end in ends) if domain.log else ends
    return float((here - low) / (high - low))


def _ticks(parameter: Parameter) -> list[Any]:
    domain = parameter.domain
    return [domain.low, domain.high] if isinstance(domain, Range) else list(domain.values)
