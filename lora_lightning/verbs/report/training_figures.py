"""Pictures of training: metrics, learning rate, speed and memory by step; base against tuned."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from lora_lightning.callbacks.comparison import Comparison
from lora_lightning.errors import printable
from lora_lightning.verbs.report.metrics import Curve, Metrics, stage, stem
from lora_lightning.verbs.report.style import GRID, INK, MUTED, SERIES, canvas, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATE, MEMORY = re.compile(r"^lr($|[-_/])"), "peak_memory_gb"
SPEED = re.compile(r"^(tokens|samples|batches)_per_second$")
MANY = 40  # points from which on a line of single steps is drawn pale, under its running median

Runs = Mapping[str, Metrics]  # by the run's name


def groups(runs: Runs) -> dict[str, dict[str, str]]:
    """What was measured -> stage -> name of the metric; losses first.

    Where Lightning logs a metric twice, of training the one by step is taken, else that by epoch.
    """
    found: dict[str, dict[str, str]] = {}
    names = dict.fromkeys(name for metrics in runs.values() for name in metrics.curves)
    for name in names:
        if RATE.match(name) or SPEED.match(name) or name == MEMORY or stage(name) == "test":
            continue
        places, part = found.setdefault(stem(name), {}), stage(name)
        kind = "step" if part == "train" else "epoch"
        if part not in places or name.endswith((f"_{kind}", f"/{kind}")):
            places[part] = name
    return dict(sorted(found.items(), key=lambda item: ("loss" not in item[0], item[0] != "loss")))


def metric_figure(runs: Runs, measured: str, names: Mapping[str, str]) -> Figure:
    """One measure by step: of one run a colour for each stage, of several for each run."""
    with drawing():
        figure, axes = canvas()
        values: list[float] = []
        for number, (run, metrics) in enumerate(runs.items()):
            for place, (part, name) in enumerate(sorted(names.items())):
                curve = metrics.curves.get(name)
                if curve is None or not curve.finite:
                    continue
                values += [value for _, value in curve.finite]
                alone = len(runs) == 1
                colour = SERIES[(place if alone else number) % len(SERIES)]
                thin = not alone and part == "train" and len(names) > 1
                label = name if alone else "" if thin else run
                _line(axes, curve, colour, printable(label), thin)
        if values and min(values) > 0 and max(values) > 50 * min(values):
            axes.set_yscale("log")
        alone = len(runs) == 1 and len(names) == 1
        _finish(axes, next(iter(names.values())) if alone else measured)
    return figure


def rate_figure(runs: Runs) -> Figure | None:
    """Learning rates by step; None where none was logged."""
    return _lines(runs, lambda name: bool(RATE.match(name)), "learning rate")


def speed_figure(runs: Runs) -> Figure | None:
    """Throughput by step; None where none was logged."""
    units = {name for m in runs.values() for name in m.curves if SPEED.match(name)}
    label = " or ".join(sorted(units)).replace("_per_", " per ")
    return _lines(runs, lambda name: bool(SPEED.match(name)), label, True, smooth=True)


def memory_figure(runs: Runs) -> Figure | None:
    """Peak memory by step; None where none was logged."""
    return _lines(runs, lambda name: name == MEMORY, "peak memory in GB", zero=True)


def comparison_figure(comparisons: Mapping[str, Comparison]) -> Figure | None:
    """The headline of each run, base and tuned, with twice its standard error; None of none."""
    if not comparisons:
        return None
    metric = next(iter(comparisons.values())).headline
    rows = {
        run: (found.base[metric], found.tuned[metric], 2 * (found.standard_error or 0.0))
        for run, found in comparisons.items()
        if metric in found.base and metric in found.tuned
    }
    with drawing():
        figure, axes = canvas(0.95 + 0.42 * len(rows))
        for number, (base, tuned, margin) in enumerate(rows.values()):
            colour = SERIES[number % len(SERIES)]
            axes.plot([base, tuned], [number, number], color=GRID, linewidth=4, zorder=1)
            axes.plot([base], [number], "o", color=MUTED, markersize=8, zorder=3)
            axes.errorbar(
                [tuned], [number], xerr=margin or None, fmt="o", color=colour, markersize=8,
                capsize=3, linewidth=1.2, zorder=3,
            )  # fmt: skip
            for value, word in ((base, "base"), (tuned, "tuned")):
                # Each to its own side: they stay apart where the values are close.
                left = value < max(base, tuned) or (word == "tuned" and base == tuned)
                axes.annotate(
                    f"{word} {value:.4g}", (value, number), xytext=(-4 if left else 4, 9),
                    ha="right" if left else "left", textcoords="offset points", fontsize=9,
                    color=INK if word == "tuned" else MUTED,
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [_short(printable(run)) for run in rows])
        if len(rows) == 1:
            axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.4, -0.75)
        ends = [
            x for base, tuned, more in rows.values() for x in (base, tuned - more, tuned + more)
        ]
        if all(map(math.isfinite, ends)):
            room = 0.3 * (max(ends) - min(ends)) or 0.1 * abs(ends[0]) or 1.0  # for the words
            axes.set_xlim(min(ends) - room, max(ends) + room)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(printable(metric))
    return figure


def running_median(values: Sequence[float], window: int) -> list[float]:
    """The median of each value and its neighbours, `window` in all, fewer at the ends."""
    half = window // 2
    return [median(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]


def _lines(
    runs: Runs, wanted: Callable[[str], bool], label: str, zero: bool = False, smooth: bool = False
) -> Figure | None:
    lines = [
        (run, name, curve)
        for run, metrics in runs.items()
        for name, curve in metrics.curves.items()
        if wanted(name) and curve.finite
    ]
    if not lines:
        return None
    with drawing():
        figure, axes = canvas()
        for number, (run, name, curve) in enumerate(lines):
            text = name if len(runs) == 1 else run if len(lines) == len(runs) else f"{run}: {name}"
            _line(axes, curve, SERIES[number % len(SERIES)], printable(text), smooth=smooth)
        if zero:
            most = max(value for _, _, curve in lines for _, value in curve.finite)
            axes.set_ylim(0, 1.12 * most or 1)
        _finish(axes, label)
    return figure


def _line(
    axes: Axes, curve: Curve, colour: str, label: str, thin: bool = False, smooth: bool = True
) -> None:
    steps, values = map(list, zip(*curve.finite, strict=True))
    if smooth and len(values) > MANY:
        if not thin:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        values = running_median(values, max(5, len(values) // 20) | 1)
    few = len(values) <= MANY / 2
    axes.plot(
        steps, values, color=colour, label=label, marker="o" if few else "", markersize=3.6,
        alpha=0.5 if thin else 1.0, linewidth=1.0 if thin else 1.8, zorder=2 if thin else 3,
    )  # fmt: skip


def _finish(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_minor_formatter(NullFormatter())
    large = axes.get_ylim()[1] >= 1000
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if large else "{x:g}"))
    axes.set_xlabel("step")
    axes.set_ylabel(printable(label))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2,
            handlelength=1.4, columnspacing=1.2,
        )  # fmt: skip


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
