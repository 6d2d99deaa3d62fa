"""What a run has logged: curves by metric, read from the files of its loggers."""

from __future__ import annotations

import csv
import importlib.util
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.errors import RecordError
from lora_lightning.runs.run import Run

_ENDS = re.compile(r"[_/](step|epoch)$")
_STAGE = re.compile(r"^(train|training|val|valid|validation)[_/]|[_/](train|val|valid|validation)$")


@dataclass(frozen=True)
class Curve:
    """Values of one metric by step, steps rising."""

    steps: list[float]
    values: list[float]

    @property
    def finite(self) -> list[tuple[float, float]]:
        """Steps and values without what is not finite."""
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if math.isfinite(value)]


@dataclass(frozen=True)
class Metrics:
    """All that was logged.

    Attributes:
        curves: By the metric's name.
        base, tuned: Metrics of the base and with the adapter, as `compare_with_base` logs them.
        files: Where they were read from.

    """

    curves: dict[str, Curve] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last step that something was logged of, counted from 1; 0: nothing was."""
        return max((int(c.steps[-1]) + 1 for c in self.curves.values() if c.steps), default=0)


Row = tuple[float, str, float]  # step, metric, value


def log_folders(directory: Path, checkpoint: Path | None) -> list[Path]:
    """The folders that the loggers of one run have written, oldest version first.

    Those of evaluations are left out: their steps are none of training.
    """
    own = None if checkpoint is None else checkpoint.absolute().parents[1]
    if _logged(directory):
        found = [directory]
    elif own is not None and _logged(own):  # of a Trainer: a version for each run
        found = [own]
    else:  # of the command, all are of one run; of a Trainer without checkpoint, the newest is
        found = [path for path in directory.glob("logs/version_*") if _logged(path)]
        others = [path for path in directory.glob("*/version_*") if _logged(path)]
        found = found or sorted(others, key=_version)[-1:]
    return [path for path in sorted(found, key=_version) if not _is_evaluation(path)]


def read_metrics(folders: Iterable[Path]) -> Metrics:
    """The curves of one run from its log folders, oldest first.

    A later folder is of a fit that went on: from its first step on, it holds.

    Raises:
        RecordError: If a file cannot be read.

    """
    metrics = Metrics()
    for folder in folders:
        file = folder / "metrics.csv"
        rows = [*_of_csv(file)] if file.is_file() else _of_events(folder)
        if not rows:
            continue
        metrics.files.append(file if file.is_file() else folder)
        begins = min(
            (step for step, name, _ in rows if not name.startswith(("base/", "tuned/"))),
            default=math.inf,
        )
        for curve in metrics.curves.values():
            kept = sum(step < begins for step in curve.steps)
            del curve.steps[kept:], curve.values[kept:]
        for step, name, value in sorted(rows, key=lambda row: row[0]):
            side, _, rest = name.partition("/")
            if side in ("base", "tuned") and rest:
                {"base": metrics.base, "tuned": metrics.tuned}[side][rest] = value
            elif name not in ("step", "epoch", "hp_metric"):
                curve = metrics.curves.setdefault(name, Curve([], []))
                curve.steps.append(step)
                curve.values.append(value)
    return metrics


def stem(name: str) -> str:
    """What a metric measures, whatever the stage: `val_loss` and `train_loss_step` -> `loss`."""
    return _STAGE.sub("", _ENDS.sub("", name)) or name


def stage(name: str) -> str:
    """Of which data a metric is: "train", "val" or ""."""
    found = _STAGE.search(_ENDS.sub("", name))
    word = (found[1] or found[2]) if found else ""
    return "val" if word.startswith("val") else "train" if word else ""


def run_folder(run: Run) -> Path:
    """Where the files of a run lie: its directory, or that of a lone checkpoint's Trainer."""
    if run.directory is not None:
        return run.directory
    above = run.checkpoint.absolute().parent
    return above.parent if above.name == "checkpoints" else above


def event_files(folder: Path) -> list[Path]:
    """TensorBoard's files in a folder."""
    return sorted(folder.glob("events.out.tfevents.*"))


def _logged(folder: Path) -> bool:
    return (folder / "metrics.csv").is_file() or bool(event_files(folder))


def _version(folder: Path) -> tuple[int, str]:
    number = folder.name.rpartition("_")[2]
    return (int(number) if number.isdigit() else -1), str(folder)


def _is_evaluation(folder: Path) -> bool:
    config = folder / "config.yaml"
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    # Options that `validate` and `test`, and `predict`, have, and `fit` has not.
    return isinstance(content, dict) and bool({"verbose", "return_predictions"} & content.keys())


def _of_csv(file: Path) -> Iterator[Row]:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            for line in csv.DictReader(opened):
                step = _number(line.get("step"))
                for name, text in line.items():
                    value = _number(text)
                    if step is not None and value is not None and isinstance(name, str):
                        yield step, name, value
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{str(file)!r} cannot be read as metrics: {error}. (run)") from error


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _of_events(folder: Path) -> list[Row]:
    if importlib.util.find_spec("tensorboard") is None:
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [
        (float(event.step), name, float(event.value))
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    ]
