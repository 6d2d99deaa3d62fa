"""Pictures of what was learned: sizes by layer and target, spectra, and how far r is used."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING

from lora_lightning.errors import printable
from lora_lightning.verbs.report.style import (
    GRID,
    INK,
    MUTED,
    RAMP,
    SERIES,
    canvas,
    drawing,
)
from lora_lightning.verbs.report.updates import Updates, WeightUpdate, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TARGETS = 24  # rows of a picture; what goes beyond stands in the page's table


def size_of(update: WeightUpdate, absolute: bool) -> float:
    """Relative to the weight in percent, or the norm itself."""
    relative = update.spectrum.relative
    return update.spectrum.norm if absolute or relative is None else 100 * relative


def is_absolute(updates: Updates) -> bool:
    """True if the weights are not known for all."""
    return any(update.spectrum.relative is None for update in updates.weights)


def size_figure(updates: Updates) -> Figure | None:
    """Size of each update: a map of layers by targets, or bars where there are no layers."""
    if not updates.weights:
        return None
    layers = {update.layer for update in updates.weights}
    with drawing():
        return _size_map(updates) if len(layers) > 1 else _size_bars(updates)


def spectrum_figure(updates: Updates) -> Figure | None:
    """Singular values relative to the largest: median of each target's layers, range of all."""
    moved = updates.low_rank
    if not moved:
        return None
    by_target = _by_target(moved)
    with drawing():
        figure, axes = canvas()
        every: dict[int, list[float]] = defaultdict(list)
        for number, (target, some) in enumerate([*by_target.items()][: len(SERIES)]):
            spectra = [u.spectrum.values[: u.spectrum.limit] for u in some]
            shares = [[float(v) for v in values / values[0]] for values in spectra]
            places = range(1, max(map(len, shares)) + 1)
            at = [[one[i - 1] for one in shares if len(one) >= i] for i in places]
            shown = [(i, max(v, default=0.0)) for i, v in zip(places, at, strict=True)]
            last = max((i for i, most in shown if most > 1e-6), default=1)
            x = list(places)[:last]
            for place, some_values in zip(x, at, strict=False):
                every[place] += some_values
            axes.plot(
                x, [median(v) for v in at[:last]], color=SERIES[number], label=target,
                marker="o" if last <= 32 else "", markersize=3,
            )  # fmt: skip
        low, high = ([f(values) for values in every.values()] for f in (min, max))
        axes.fill_between([*every], low, high, color=MUTED, alpha=0.14, linewidth=0)
        axes.set_yscale("log")
        axes.set_ylim(max(1e-4, axes.get_ylim()[0]), 1.3)
        _plain_log(axes)
        axes.set_xlabel("singular value, from the largest")
        axes.set_ylabel("size, largest = 1")
        _whole_numbers(axes)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2,
            handlelength=1.4, columnspacing=1.2,
        )  # fmt: skip
    return figure


def rank_figure(updates: Updates) -> Figure | None:
    """A dot for each update at the rank that it uses, a stroke at the rank that it has."""
    moved = updates.low_rank
    if not moved:
        return None
    rows = [*_by_target(moved).items()][:_TARGETS]
    with drawing():
        figure, axes = canvas(0.75 + 0.3 * len(rows))
        for place, (_, some) in enumerate(rows):
            used: dict[int, int] = defaultdict(int)
            for update in some:
                used[update.spectrum.used_rank] += 1
            most = max(used.values())
            axes.scatter(
                list(used), [place] * len(used), color=SERIES[0], zorder=3, linewidths=0,
                s=[26 + 90 * count / most if most > 1 else 44 for count in used.values()],
            )  # fmt: skip
            limits = {update.spectrum.limit for update in some}
            axes.vlines(list(limits), place - 0.36, place + 0.36, color=SERIES[1], linewidth=2.2)
            axes.hlines(place, 0, max(limits), color=GRID, linewidth=1, zorder=1)
        axes.set_yticks(range(len(rows)), [target for target, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, max(u.spectrum.limit for u in moved) * 1.04)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        _whole_numbers(axes)
        axes.set_xlabel("rank that holds 99 % of the update; stroke: r")
    return figure


def _size_map(updates: Updates) -> Figure:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    absolute = is_absolute(updates)
    squares: dict[tuple[str, int | None], list[WeightUpdate]] = defaultdict(list)
    for update in updates.weights:
        squares[update.target, update.layer].append(update)
    targets = [*dict.fromkeys(u.target for u in updates.weights)][:_TARGETS]
    layers = sorted({u.layer for u in updates.weights}, key=lambda n: -1 if n is None else n)
    sizes = [
        [_together(squares.get((target, layer), []), absolute) for layer in layers]
        for target in targets
    ]
    known = [size for row in sizes for size in row if size is not None]
    most = sorted(known)[int(0.95 * (len(known) - 1))] if known else 0.0
    beyond = max(known) > 2 * most > 0  # a few far above all others, which they would whiten
    locator = MaxNLocator(len(RAMP), steps=[1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10])
    ticks = locator.tick_values(0, most if beyond else max(known) or 1)
    edges = [float(tick) for tick in ticks if tick >= 0][: len(RAMP) + 1]
    several = len(edges) - 1
    several += beyond
    picks = [RAMP[round(i * (len(RAMP) - 1) / max(several - 1, 1))] for i in range(several)]
    norm = BoundaryNorm(edges, several, extend="max" if beyond else "neither")
    figure, axes = canvas(1.3 + 0.27 * len(targets))
    image = axes.pcolormesh(
        [[float("nan") if size is None else size for size in row] for row in sizes],
        cmap=ListedColormap(picks), norm=norm,
        edgecolor="none" if len(layers) > 40 else GRID, linewidth=0.6,
    )  # fmt: skip
    for y, row in enumerate(sizes):
        for x, size in enumerate(row):
            if size == 0:
                axes.text(x + 0.5, y + 0.5, "×", ha="center", va="center", color=MUTED)  # noqa: RUF001
    names = short_names([update.target for update in updates.weights])
    axes.set_yticks([y + 0.5 for y in range(len(targets))], [_label(names[t]) for t in targets])
    axes.tick_params(axis="y", labelcolor=INK)
    every = max(1, -(-len(layers) // 14))
    axes.set_xticks(
        [x + 0.5 for x in range(0, len(layers), every)],
        ["none" if layers[x] is None else str(layers[x]) for x in range(0, len(layers), every)],
    )
    axes.invert_yaxis()
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, location="top", aspect=42, pad=0.03, drawedges=False)
    bar.outline.set_visible(False)
    bar.set_label(_size_label(absolute))
    return figure


def _size_bars(updates: Updates) -> Figure:
    absolute = is_absolute(updates)
    rows = updates.weights[:_TARGETS]
    names = short_names([update.path for update in rows])
    sizes = [size_of(update, absolute) for update in rows]
    figure, axes = canvas(0.8 + 0.3 * len(rows))
    axes.barh(range(len(rows)), sizes, color=SERIES[0], height=0.6)
    for place, size in enumerate(sizes):
        axes.annotate(
            f"{size:.3g}", (size, place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [_label(names[update.path]) for update in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, (max(sizes) or 1) * 1.15)
    axes.grid(visible=False)
    axes.set_xlabel(_size_label(absolute))
    return figure


def _size_label(absolute: bool) -> str:
    return "size of the update, ‖ΔW‖" if absolute else "size of the update in % of the weight"


def _together(some: list[WeightUpdate], absolute: bool) -> float | None:
    """The size of several updates as one: root of the sum of squares, of weights too."""
    if not some:
        return None
    norm = (
        sum(update.spectrum.norm**2 for update in some) ** 0.5
        if any(u.spectrum.moved for u in some)
        else 0.0
    )
    weight = sum((update.spectrum.weight_norm or 0.0) ** 2 for update in some) ** 0.5
    return norm if absolute or not weight else 100 * norm / weight


def _by_target(moved: list[WeightUpdate]) -> dict[str, list[WeightUpdate]]:
    """By the short name of the target, most layers first where there are many."""
    names = short_names([update.target for update in moved])
    found: dict[str, list[WeightUpdate]] = defaultdict(list)
    for update in moved:
        found[_label(names[update.target])].append(update)
    return found


def _label(name: str, most: int = 26) -> str:
    name = printable(name)
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _plain_log(axes: Axes) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
