"""The verb `report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError
from lora_lightning.training.messages import show
from lora_lightning.utilities.atomic_write import write_atomically
from lora_lightning.utilities.new_output import check_new_file, new_folder
from lora_lightning.verbs.report import findings
from lora_lightning.verbs.report.figures import Picture, pictures
from lora_lightning.verbs.report.page import file_name, page
from lora_lightning.verbs.report.record import RunRecord, named_apart, read_record
from lora_lightning.verbs.report.result import Report
from lora_lightning.verbs.report.style import as_png, check_matplotlib
from lora_lightning.verbs.report.tensorboard import add_pictures

_NAME = "report.html"


def report(
    run: str | os.PathLike[str],
    *others: str | os.PathLike[str],
    out: str | None = None,
    ckpt: str | None = None,
    weights: bool = True,
    module: Any = None,
    force: bool = False,
) -> Report:
    """Draw what came of a run: curves, base against tuned, samples, what each adapter learned.

    One HTML page that needs no other file, and its pictures as PNGs in a folder beside it
    (`report.html`, `report_figures/`). Where the run has logged to TensorBoard, it gets the
    pictures, too. Needs matplotlib: pip install "lora_lightning[report]".

    Args:
        run: A run directory, a checkpoint of it, or its config file.
        others: More runs, to be shown beside it with the options in which they differ.
        out: The page, FILE.html. Default: report.html in the run directory.
        ckpt: Whose adapters are measured: best, last, or a path. Default: the best, where
            something was monitored, else the last.
        weights: Load the base, so that updates are shown relative to its weights. Without, or where
            it cannot be loaded, sizes are absolute, and the page says so.
        module: The LightningModule's class, my_module.Net, where config and checkpoint do not say
            it; in Python also an instance. Of the first run.
        force: Replace a page that is there.

    Raises:
        ConfigError: If matplotlib is missing, or the page is there already or cannot be written.
        CheckpointError: If there is no such run, or its checkpoint is damaged.
        RecordError: If a file of its loggers cannot be read.

    """
    check_matplotlib()
    places = [run, *others]
    if len(places) > 1 and ckpt not in (None, "best", "last"):
        raise ConfigError(
            f"ckpt={ckpt!r} is the checkpoint of one run, and there are {len(places)}: name the "
            "checkpoints in the place of the runs. (ckpt)"
        )
    if out is not None:  # before work that takes time
        _check_outputs(Path(out), force)
    records = [
        read_record(place, ckpt, module if number == 0 else None, weights)
        for number, place in enumerate(places)
    ]
    target = Path(out) if out is not None else records[0].folder / _NAME
    _check_outputs(target, force)
    return _made(named_apart(records), target, force)


def _made(runs: dict[str, RunRecord], target: Path, force: bool) -> Report:
    """Draw, write and tell."""
    drawn = pictures(runs)
    made = Report(
        html=page(runs, drawn),
        figures={picture.name: picture.figure for picture in drawn},
        findings=[line for name, record in runs.items() for line in _lines(record, name, runs)],
        path=target,
        figures_path=target.with_name(file_name(target)),
    )
    _write(made, drawn, force)
    shown = _tensorboard(runs, drawn)
    pngs = f"pictures: {made.figures_path}{os.sep}*.png ({len(drawn)})"
    show(*made.findings, pngs, *shown, f"report: {target}")
    return made


def _check_outputs(target: Path, force: bool) -> None:
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{str(target)!r} is to be a page: name it FILE.html. (out)")
    check_new_file(target, force)
    folder = target.with_name(file_name(target))
    if os.path.lexists(folder) and not force:
        raise ConfigError(
            f"{str(folder)!r}, where the pictures go, is there already; nothing is overwritten. "
            "Name another page, or replace both with --force. (out)"
        )


def _write(made: Report, drawn: list[Picture], force: bool) -> None:
    """The pictures and the page, or none of both."""
    with new_folder(made.figures_path, force) as folder:
        for picture in drawn:
            (folder / f"{picture.name}.png").write_bytes(as_png(picture.figure))
        try:
            write_atomically({made.path: made.html.encode("utf-8", "replace")})
        except OSError as error:
            raise ConfigError(
                f"{str(made.path)!r} cannot be written: {error.strerror or error}. Nothing was "
                "left there. (out)"
            ) from error


def _tensorboard(runs: dict[str, RunRecord], drawn: list[Picture]) -> list[str]:
    """Give each run its own pictures, the first those of all; what was done."""
    lines = []
    for number, (name, record) in enumerate(runs.items()):
        own = [p for p in drawn if p.run == name or (number == 0 and not p.run)]
        folder = add_pictures(record.log_folders, own, record.step or record.metrics.steps)
        if folder is not None:
            lines.append(f"TensorBoard: report/... in {folder}")
    return lines


def _lines(record: RunRecord, name: str, runs: dict[str, RunRecord]) -> list[str]:
    """The findings on one run, behind its name where there are several."""
    said = [findings.of_training(record)]
    if record.comparison is not None:
        said.append(findings.of_comparison(record.comparison))
    said.append(findings.of_updates(record.updates))
    if record.updates.without_base:
        said.append(f"the base was not loaded: {record.updates.without_base}")
    said += filter(None, [findings.of_speed(record.metrics)])
    return [f"{name}: {line}" for line in said] if len(runs) > 1 else said
