"""What the pictures show, in one sentence each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

from lora_lightning.callbacks.comparison import Comparison
from lora_lightning.verbs.report.metrics import Curve, Metrics, stage
from lora_lightning.verbs.report.record import RunRecord
from lora_lightning.verbs.report.training_figures import MEMORY, RATE, SPEED, running_median
from lora_lightning.verbs.report.updates import Updates


def number(value: float) -> str:
    """Three digits that count, thousands with commas: 0.0674, 2.31, 1,234."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def of_curve(name: str, curve: Curve) -> str:
    """How a metric went: from where to where, and where its turn was."""
    points = curve.finite
    if not points:
        return f"{name} was never finite"
    steps, values = [s for s, _ in points], [v for _, v in points]
    if stage(name) == "train" and len(values) > 10:  # of single batches
        values = running_median(values, max(5, len(values) // 10) | 1)
    first, last = values[0], values[-1]
    lost = "" if len(points) == len(curve.values) else ", and was not finite in between"
    if len(values) == 1:
        return f"{name} was {number(first)} at step {steps[0]:.0f}"
    if number(first) == number(last):
        return f"{name} stayed at {number(last)}{lost}"
    best = min(values) if "loss" in name or "perplexity" in name else last
    where = values.index(best)
    count = f"{steps[-1] + 1:,.0f} steps"
    if best < last and last - best > 0.02 * (max(values) - best) and number(best) != number(last):
        if best == first:
            return f"{name} rose from {number(first)} to {number(last)} in {count}{lost}"
        return (
            f"{name} fell from {number(first)} to {number(best)} at step {steps[where]:,.0f}, "
            f"then rose to {number(last)}{lost}"
        )
    verb = "fell" if last < first else "rose"
    return f"{name} {verb} from {number(first)} to {number(last)} in {count}{lost}"


def of_rates(runs: Sequence[Metrics]) -> str:
    """The largest learning rate, where it is one."""
    rates = [c for metrics in runs for name, c in metrics.curves.items() if RATE.match(name)]
    if len(rates) != 1 or not rates[0].finite:
        return "Learning rates"
    return f"The learning rate, at most {number(max(v for _, v in rates[0].finite))}"


def main_curve(record: RunRecord) -> tuple[str, Curve] | None:
    """The metric that tells most of training: what decides, else a loss of validation."""
    curves = {n: c for n, c in record.metrics.curves.items() if c.finite}
    wanted = [record.comparison.headline] if record.comparison else []
    losses = [name for name in curves if "loss" in name]
    wanted += [name for name in losses if stage(name) == "val"]
    several = [name for name in wanted if name in curves and len(curves[name].finite) > 1]
    wanted = [*several, *[name for name in losses if stage(name) == "train"], *losses, *wanted]
    name = next((name for name in wanted if name in curves), None)
    return None if name is None else (name, curves[name])


def of_training(record: RunRecord) -> str:
    """The sentence over the curves."""
    main = main_curve(record)
    return "Nothing was logged of training" if main is None else of_curve(*main)


def of_comparison(comparison: Comparison) -> str:
    """The verdict, as a sentence over the table."""
    return comparison.verdict.replace(" +- ", " ± ")


def of_samples(rows: list[dict[str, str]]) -> str:
    """How many answers are those expected; the step, where none are known."""
    known = [row for row in rows if row.get("expected")]
    if not known:
        return f"What it wrote at step {rows[-1]['step']}"
    hits = {
        side: sum(row.get(side, "").strip() == row["expected"].strip() for row in known)
        for side in ("base", "tuned")
    }
    before = f", of the base {hits['base']}" if any("base" in row for row in known) else ""
    return f"{hits['tuned']} of {len(known)} samples are word for word as expected{before}"


def rank_use(updates: Updates) -> tuple[int, int, int, int] | None:
    """Smallest, median and largest rank that updates use, and the rank that most have."""
    used = [update.spectrum.used_rank for update in updates.low_rank]
    if not used:
        return None
    limit = Counter(update.spectrum.limit for update in updates.low_rank).most_common(1)[0][0]
    return min(used), math.ceil(median(used)), max(used), limit


def relative_size(updates: Updates) -> float | None:
    """Of all updates together, to their weights; None where those are not known."""
    pairs = [(u.spectrum.norm, u.spectrum.weight_norm) for u in updates.weights]
    known = [(norm, weight) for norm, weight in pairs if weight]
    if not known or len(known) < len(pairs):
        return None
    change, whole = (math.hypot(*side) for side in zip(*known, strict=True))
    return change / whole


def of_updates(updates: Updates) -> str:
    """How large the updates are, and how far their rank is used."""
    if not updates.weights:
        return "No update of a weight could be measured"
    if len(updates.unmoved) == len(updates.weights):
        return f"None of the {len(updates.weights)} adapters has moved"
    parts = []
    use, size = rank_use(updates), relative_size(updates)
    if use is not None:
        parts.append(f"r = {use[3]} is used to {use[1]}")
    if size is not None:
        parts.append(f"the update is {percent(size)} as large as the weights")
    parts = parts or [f"{len(updates.weights)} weights were changed"]
    if updates.unmoved:
        parts.append(f"{len(updates.unmoved)} of {len(updates.weights)} adapters never moved")
    return "; ".join(parts)


def percent(share: float) -> str:
    """0.0132 -> '1.32 %'."""
    return f"{100 * share:.3g} %"


def speed_of(metrics: Metrics) -> tuple[float, str] | None:
    """The median throughput, and its unit."""
    for name, curve in metrics.curves.items():
        if SPEED.match(name) and curve.finite:
            return median(value for _, value in curve.finite), name.partition("_")[0]
    return None


def memory_of(metrics: Metrics) -> float | None:
    """The most memory, in GB."""
    curve = metrics.curves.get(MEMORY)
    return max(v for _, v in curve.finite) if curve and curve.finite else None


def gigabytes(value: float) -> str:
    """0.527 -> '527 MB'; 1 GB = 1e9 bytes."""
    return f"{value:.3g} GB" if value >= 1 else f"{1000 * value:.0f} MB"


def of_speed(metrics: Metrics) -> str | None:
    """Throughput and memory in one sentence; None where neither was logged."""
    speed, memory = speed_of(metrics), memory_of(metrics)
    parts = [f"{number(speed[0])} {speed[1]} a second"] if speed else []
    parts += [f"{gigabytes(memory)} at most"] if memory is not None else []
    return ", ".join(parts) or None
