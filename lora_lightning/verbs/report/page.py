"""The page: one HTML file that needs no other, no script and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_lightning.callbacks.comparison import Comparison
from lora_lightning.errors import first_few
from lora_lightning.verbs.report import findings, html
from lora_lightning.verbs.report.figures import Picture
from lora_lightning.verbs.report.options import differences
from lora_lightning.verbs.report.page_style import style_sheet
from lora_lightning.verbs.report.record import RunRecord
from lora_lightning.verbs.report.style import as_svg
from lora_lightning.verbs.report.training_figures import MANY
from lora_lightning.verbs.report.updates import Updates

Runs = Mapping[str, RunRecord]
_SAMPLES, _LETTERS, _DIFFERENCES = 8, 2000, 60  # shown at most


def page(runs: Runs, pictures: Sequence[Picture]) -> str:
    """The whole page."""
    title = ", ".join(runs)
    parts = [_head(runs)]
    if len(runs) > 1:
        parts += [_overview(runs), _differences(runs)]
    parts += [_training(runs, pictures), _comparison(runs, pictures)]
    for name, record in runs.items():
        own = [picture for picture in pictures if picture.run == name]
        whose = f"{name}: " if len(runs) > 1 else ""
        parts += [_samples(record, whose), _updates(record, own, whose)]
    parts += [_speed(runs, pictures), _options(runs), _foot(runs)]
    body = "\n".join(filter(None, parts))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.text(title)}: report</title>\n<style>{style_sheet()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(runs: Runs) -> str:
    if len(runs) > 1:
        line = f"{len(runs)} runs beside each other"
        return f'<header><p class="kind">{line}</p><h1>{html.text(", ".join(runs))}</h1></header>'
    ((name, record),) = runs.items()
    about = ", ".join(_about(record))
    return (
        f'<header><p class="kind">Fine-tuning run</p><h1>{html.text(name)}</h1>'
        f'<p class="about">{html.text(about)}</p>{html.tiles(_tiles(record))}</header>'
    )


def _about(record: RunRecord) -> list[str]:
    options = record.options
    said = [options[key] for key in ("model", "model.model", "data") if options.get(key)]
    for name, config in record.adapters.items():
        kind, r = config.get("peft_type") or "adapter", config.get("r")
        alpha = config.get("lora_alpha")
        facts = [f"r = {r}"] if r else []
        facts += [f"alpha = {alpha:g}"] if isinstance(alpha, (int, float)) else []
        own = "" if name == "default" else f" {name!r}"
        said.append(f"{kind}{own}" + (f" ({', '.join(facts)})" if facts else ""))
    if record.checkpoint is not None:
        step = f" of step {record.step}" if record.step else ""
        said.append(f"checkpoint {record.checkpoint.name}{step}")
    return said


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    compared, main = record.comparison, findings.main_curve(record)
    if compared is not None:
        name, base = compared.headline, compared.base[compared.headline]
        found.append((name, findings.number(compared.tuned[name]), f"base {findings.number(base)}"))
    elif main is not None:
        last = main[1].finite[-1]
        found.append((main[0], findings.number(last[1]), f"at step {last[0]:.0f}"))
    if record.metrics.steps:
        found.append(("training", f"{record.metrics.steps:,}", "steps"))
    use, size = findings.rank_use(record.updates), findings.relative_size(record.updates)
    if use is not None:
        found.append(("rank in use", f"{use[1]} of {use[3]}", f"from {use[0]} to {use[2]}"))
    if size is not None:
        found.append(("update", findings.percent(size), "of the weights' size"))
    speed, memory = findings.speed_of(record.metrics), findings.memory_of(record.metrics)
    if speed is not None:
        found.append(("speed", findings.number(speed[0]), f"{speed[1]} a second"))
    if memory is not None:
        found.append(("peak memory", findings.gigabytes(memory), ""))
    return found


def _overview(runs: Runs) -> str:
    labels: dict[str, None] = {}
    cells: dict[str, dict[str, str]] = {}
    for name, record in runs.items():
        cells[name] = {}
        for label, value, remark in _tiles(record):
            cells[name][label] = f"{value} ({remark})" if label == "rank in use" else value
            if remark.startswith("base "):
                cells[name][f"{label}, base"] = remark.removeprefix("base ")
        labels.update(dict.fromkeys(cells[name]))
    rows = [[name, *(own.get(label, "-") for label in labels)] for name, own in cells.items()]
    return html.section(
        "At a glance", _winner(runs), html.table(["run", *labels], rows, len(labels))
    )


def _winner(runs: Runs) -> str:
    compared = {name: record.comparison for name, record in runs.items() if record.comparison}
    metrics = {(c.headline, c.mode) for c in compared.values()}
    if len(compared) < 2 or len(metrics) > 1:
        return "What each run came to"
    ((metric, mode),) = metrics
    if mode is None:
        return f"{metric} of each run"
    ends = {name: c.tuned[metric] for name, c in compared.items()}
    best = (min if mode == "min" else max)(ends, key=lambda name: ends[name])
    if len({*ends.values()}) == 1:
        return f"All runs have the same {metric}: {findings.number(ends[best])}"
    word = "lowest" if mode == "min" else "highest"
    return f"{best} has the {word} {metric}: {findings.number(ends[best])}"


def _differences(runs: Runs) -> str:
    found = differences([record.options for record in runs.values()])
    if not found:
        return html.section("Options", "The runs have the same options")
    count = f"{len(found)} options differ" if len(found) > 1 else "1 option differs"
    rows = [[name, *(_cut(v, 200) for v in values)] for name, values in found.items()]
    more = f"{len(rows) - _DIFFERENCES} more are not shown." if len(rows) > _DIFFERENCES else ""
    shown = html.table(["option", *runs], rows[:_DIFFERENCES])
    return html.section("Options", count, shown, html.note(more) if more else "")


def _training(runs: Runs, pictures: Sequence[Picture]) -> str:
    said = [findings.of_training(record) for record in runs.values()]
    finding = said[0] if len(runs) == 1 else "How the runs went"
    here = [picture for picture in pictures if picture.section == "training"]
    files = [str(file) for record in runs.values() for file in record.metrics.files]
    empty = html.note(
        "No metrics were found: neither metrics.csv of a CSVLogger nor TensorBoard's event files "
        "(which take the package tensorboard to read)."
    )
    curves = [curve for record in runs.values() for curve in record.metrics.curves.values()]
    pale = "Pale lines are single steps, strong ones their running median."
    if len(runs) > 1:
        pale = "Thin lines are of training; lines of many steps are running medians."
    elif all(len(curve.values) <= MANY for curve in curves):
        pale = ""
    return html.section(
        "Training", finding, _figures(here), html.note(pale) if pale else "", "" if files else empty
    )


def _comparison(runs: Runs, pictures: Sequence[Picture]) -> str:
    compared = {name: r.comparison for name, r in runs.items() if r.comparison is not None}
    if not compared:
        return ""
    here = [picture for picture in pictures if picture.section == "comparison"]
    if len(runs) == 1:
        ((_, only),) = compared.items()
        finding, parts = findings.of_comparison(only), [_compared(only)]
    else:
        finding = "Validation without and with each adapter"
        rows = [[name, findings.of_comparison(found)] for name, found in compared.items()]
        parts = [html.table(["run", "verdict"], rows)]
        parts += [
            html.details(f"{name} in numbers", _compared(found)) for name, found in compared.items()
        ]
    return html.section("Base against tuned", finding, _figures(here), *parts)


def _compared(comparison: Comparison) -> str:
    columns = comparison.table().columns  # in the words of the terminal
    rows = zip(*(map(str, column.cells) for column in columns), strict=True)
    header = [str(column.header) for column in columns]
    remarks = [comparison.title, *(line for line in comparison.lines()[1:-1] if line)]
    said = "".join(html.note(f"{str(line)[:1].upper()}{str(line)[1:]}.") for line in remarks)
    return html.table(header, [[*row] for row in rows], len(header) - 1) + said


def _samples(record: RunRecord, whose: str) -> str:
    if not record.samples:
        return ""
    last_step = record.samples[-1]["step"]
    last = [row for row in record.samples if row["step"] == last_step]
    blocks = [_sample(row, record.samples) for row in last[:_SAMPLES]]
    more = len(last) - _SAMPLES
    left = html.note(f"{more} more samples stand in samples.jsonl.") if more > 0 else ""
    return html.section(
        f"{whose}Samples at step {last_step}", findings.of_samples(last), *blocks, left
    )


def _sample(row: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> str:
    def entry(name: str, value: object) -> str:
        shown = f"<pre>{html.text(_cut(str(value), _LETTERS))}</pre>"
        shown = shown if str(value).strip() else '<span class="none">nothing</span>'
        kind = ' class="tuned"' if name == "tuned" else ""
        return f"<dt>{html.text(name)}</dt><dd{kind}>{shown}</dd>"

    inside = "".join(entry(name, value) for name, value in row.items() if name != "step")
    before = [
        (str(other["step"]), _cut(str(other.get("tuned", "")), _LETTERS) or "(nothing)")
        for other in rows
        if other.get("prompt") == row.get("prompt") and other["step"] != row["step"]
    ]
    folded = ""
    if before:
        folded = html.details("Before", html.table(["step", "tuned"], before))
    return f'<div class="sample"><dl>{inside}</dl>{folded}</div>'


def _updates(record: RunRecord, pictures: Sequence[Picture], whose: str) -> str:
    updates = record.updates
    notes = []
    if updates.without_base:
        said = f"The base was not loaded: {updates.without_base}"
        if updates.weights:
            said += ". Sizes are absolute, not relative to the weights"
        notes.append(f"{said.rstrip('.')}.")
    if updates.left_out:
        notes.append(f"Without it nothing can be said of {first_few(updates.left_out, 3)}.")
    if updates.unmoved and updates.weights:
        notes.append(f"Never moved: {first_few(updates.unmoved)}.")
    notes += [_extremes(updates)] if len(updates.weights) > 1 else []
    if record.adapters and any(a.get("use_dora") for a in record.adapters.values()):
        notes.append("Of DoRA, ranks and spectra are those of its low-rank part B A.")
    copies = [
        [path, f"{100 * change / size:.3g} %" if size else f"{change:.3g} (from zero)"]
        for path, change, size in updates.copies
    ]
    trained = html.table(
        ["trained in full (modules_to_save)", "change, of its size before"], copies, 1
    )
    if not updates.weights and not copies and record.checkpoint is None:
        return html.section(f"{whose}What was learned", "The run has no checkpoint to measure")
    return html.section(
        f"{whose}What was learned",
        findings.of_updates(updates),
        _figures(pictures),
        *map(html.note, filter(None, notes)),
        trained if copies else "",
        _all_updates(updates),
    )


def _extremes(updates: Updates) -> str:
    known = [u for u in updates.weights if u.spectrum.relative is not None and u.spectrum.moved]
    if len(known) < 2:
        return ""
    largest = max(known, key=lambda u: u.spectrum.relative or 0.0)
    smallest = min(known, key=lambda u: u.spectrum.relative or 0.0)
    return (
        f"The most, {findings.percent(largest.spectrum.relative or 0)}, moved {largest.path}; "
        f"the least, {findings.percent(smallest.spectrum.relative or 0)}, {smallest.path}."
    )


def _all_updates(updates: Updates) -> str:
    if not updates.weights:
        return ""
    rows = []
    for update in updates.weights:
        spectrum = update.spectrum
        relative = "-" if spectrum.relative is None else findings.percent(spectrum.relative)
        rows.append([
            update.path, f"{spectrum.norm:.3g}", relative,
            f"{spectrum.used_rank} of {spectrum.limit}", f"{spectrum.entropy_rank:.1f}",
        ])  # fmt: skip
    header = ["weight", "‖ΔW‖", "of ‖W‖", "rank of 99 %", "effective rank"]
    said = (
        "‖·‖: Frobenius norm. Rank of 99 %: how many singular values hold 99 % of the sum of their "
        "squares, which is what r is used to. Effective rank: exp of the entropy of the singular "
        "values as shares of their sum (Roy and Vetterli 2007)."
    )
    count = f"All {len(rows)} updates in numbers" if len(rows) > 1 else "The update in numbers"
    return html.details(count, html.table(header, rows, 4) + html.note(said))


def _speed(runs: Runs, pictures: Sequence[Picture]) -> str:
    said = {name: findings.of_speed(record.metrics) for name, record in runs.items()}
    known = {name: text for name, text in said.items() if text}
    if not known:
        return ""
    if len(runs) == 1:
        finding = next(iter(known.values()))
    else:
        finding = "; ".join(f"{name}: {text}" for name, text in known.items())
    here = [picture for picture in pictures if picture.section == "speed"]
    return html.section("Speed and memory", finding, _figures(here))


def _options(runs: Runs) -> str:
    folded = []
    for name, record in runs.items():
        rows = [[key, _cut(value, 400)] for key, value in record.options.items()]
        if rows:
            of = f" of {name}" if len(runs) > 1 else ""
            folded.append(html.details(f"All options{of}", html.table(["option", "value"], rows)))
    return f"<section>{''.join(folded)}</section>" if folded else ""


def _foot(runs: Runs) -> str:
    places = [str(record.checkpoint or record.folder) for record in runs.values()]
    return f"<footer>Made by lora-lightning report from {html.text(first_few(places))}.</footer>"


def _figures(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    inside = "\n".join(
        f"<figure><figcaption>{html.text(p.shows)}</figcaption>"
        f"{as_svg(p.figure, p.name, p.shows)}</figure>"
        for p in pictures
    )
    return f'<div class="figures{" narrow" if len(pictures) == 1 else ""}">{inside}</div>'


def _cut(value: str, most: int) -> str:
    return value if len(value) <= most else f"{value[:most]}[...]"


def file_name(out: Path) -> str:
    """The folder of PNGs that goes with a page: `report.html` -> `report_figures`."""
    return f"{out.stem}_figures"
