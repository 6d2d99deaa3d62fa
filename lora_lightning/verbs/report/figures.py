"""All pictures of a report, in the order of the page, with the sentence that each one shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_lightning.verbs.report import findings, training_figures, update_figures
from lora_lightning.verbs.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, RunRecord]


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: Of its file, and in TensorBoard.
        figure: The picture itself.
        shows: What it shows, in a sentence.
        section: Where on the page: "training", "comparison", "speed" or "updates".
        run: Name of the run; "" of all of them.

    """

    name: str
    figure: Figure
    shows: str
    section: str
    run: str = ""


def pictures(runs: Runs) -> list[Picture]:
    """The pictures that the runs' files allow."""
    metrics = {name: record.metrics for name, record in runs.items()}
    found: list[Picture] = []

    def add(name: str, figure: Figure | None, shows: str, section: str, run: str = "") -> None:
        if figure is not None:
            taken = {picture.name for picture in found}
            while name in taken:
                name += "_"
            found.append(Picture(name, figure, shows, section, run))

    for measured, names in training_figures.groups(metrics).items():
        drawn = training_figures.metric_figure(metrics, measured, names)
        add(_file_name(measured), drawn, _of_group(runs, names), "training")
    figure = training_figures.rate_figure(metrics)
    add("learning_rate", figure, findings.of_rates([*metrics.values()]), "training")
    compared = {name: r.comparison for name, r in runs.items() if r.comparison is not None}
    figure = training_figures.comparison_figure(compared)
    add(
        "comparison",
        figure,
        "The base (grey) and with the adapter; bars: two standard errors",
        "comparison",
    )
    add("throughput", training_figures.speed_figure(metrics), "Throughput", "speed")
    add("memory", training_figures.memory_figure(metrics), "Peak memory", "speed")
    makers: dict[str, tuple[Callable[..., Figure | None], str]] = {
        "update_size": (update_figures.size_figure, "How large each update is (×: never moved)"),  # noqa: RUF001
        "rank_use": (update_figures.rank_figure, "How many directions hold 99 % of each update"),
        "spectra": (
            update_figures.spectrum_figure,
            "Singular values of the updates: each target's median, shaded the range",
        ),
    }
    for number, (run, record) in enumerate(runs.items(), 1):
        for name, (make, shows) in makers.items():
            own = name if len(runs) == 1 else f"{name}_{number}"
            add(own, make(record.updates), shows, "updates", run)
    return found


def _of_group(runs: Runs, names: Mapping[str, str]) -> str:
    """What the curves of a measure show: of one run of validation first, of several the ends."""
    order = [names[part] for part in ("val", "", "train") if part in names]
    if len(runs) == 1:
        curves = next(iter(runs.values())).metrics.curves
        said = [findings.of_curve(name, curves[name]) for name in order if name in curves]
        title = findings.of_training(next(iter(runs.values())))  # stands above already
        return "; ".join(line for line in said if line != title) or order[0]
    ends = [
        f"{run} {findings.number(record.metrics.curves[order[0]].finite[-1][1])}"
        for run, record in runs.items()
        if order[0] in record.metrics.curves and record.metrics.curves[order[0]].finite
    ]
    return f"{order[0]} ends at " + ", ".join(ends) if ends else order[0]


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "_", text).strip("_").lower()[:60] or "metric"
