"""All that a run left behind, read once: options, metrics, comparison, samples, updates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lightning.callbacks.comparison import Comparison
from lora_lightning.callbacks.comparison_file import read_comparison
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import KEY, OPTIONS, TASK
from lora_lightning.errors import CheckpointError, RecordError
from lora_lightning.runs.run import Run, checkpoints_of, config_of, find_run
from lora_lightning.verbs.report.metrics import Metrics, log_folders, read_metrics, run_folder
from lora_lightning.verbs.report.options import flat_options
from lora_lightning.verbs.report.updates import Updates, read_updates


@dataclass(frozen=True)
class RunRecord:
    """What the page says of one run.

    Attributes:
        name: Of its directory.
        folder: Where its files lie.
        log_folders: Of its loggers.
        checkpoint: Whose adapters were measured; None: there is none.
        step: Optimizer steps before it.
        config: As the command was started with; empty where it was not.
        adapters: Options of each adapter as the checkpoint has them.
        options: All of them, flat.
        metrics: What was logged.
        comparison: With the base; None: none was made.
        samples: Lines of `samples.jsonl`: step, prompt, expected, base, tuned.
        updates: Of its weights.

    """

    name: str
    folder: Path
    log_folders: list[Path] = field(default_factory=list)
    checkpoint: Path | None = None
    step: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    comparison: Comparison | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    updates: Updates = field(default_factory=Updates)


def read_record(
    place: Any, ckpt: str | None, module: Any = None, weights: bool = True
) -> RunRecord:
    """Read a run, as `find_run` finds it; one without a checkpoint as far as its logs go.

    Raises:
        LoraError: If there is no such run, or a file of it cannot be read.

    """
    try:
        run = find_run(place, ckpt)
    except CheckpointError:
        directory = Path(place)
        if ckpt not in (None, "best", "last") or not directory.is_dir():
            raise
        folders = log_folders(directory, None)
        if not folders or checkpoints_of(directory):
            raise
        config = config_of(directory)
        updates = Updates(without_base="the run has no checkpoint")
        return _record(directory, folders, config, {}, updates)
    checkpoint = read_adapter_checkpoint(run.checkpoint)
    folder = run_folder(run)
    folders = log_folders(folder, run.checkpoint)
    updates = read_updates(run, module, weights)
    return _record(folder, folders, run.config, checkpoint, updates, run)


def named_apart(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Runs by name; those of one name with the folders above them, then with a number."""
    found: dict[str, RunRecord] = {}
    for record in records:
        name, parts = record.name, record.folder.absolute().parts
        alike = [other for other in records if other.name == record.name]
        if len(alike) > 1 and len({other.folder.absolute().parent.name for other in alike}) > 1:
            name = "/".join(parts[-2:])
        number = 2
        while name in found:
            name, number = f"{record.name} ({number})", number + 1
        found[name] = record
    return found


def _record(
    folder: Path,
    folders: list[Path],
    config: dict[str, Any],
    checkpoint: dict[str, Any],
    updates: Updates,
    run: Run | None = None,
) -> RunRecord:
    metrics = read_metrics(folders)
    adapters = {name: entry["config"] for name, entry in _adapters(checkpoint).items()}
    if config:
        options = flat_options(config)
    else:
        made = checkpoint.get(OPTIONS) or checkpoint.get("hyper_parameters") or {}
        options = flat_options({"model": made, **_prefixed(adapters)})
        if isinstance(checkpoint.get(TASK), str):
            options = {"model": checkpoint[TASK], **options}
    return RunRecord(
        name=folder.absolute().name,
        folder=folder,
        log_folders=folders,
        checkpoint=run.checkpoint if run else None,
        step=checkpoint.get("global_step"),
        config=config,
        adapters=adapters,
        options=options,
        metrics=metrics,
        comparison=read_comparison(folder) or _logged_comparison(metrics),
        samples=_samples(folders),
        updates=updates,
    )


def _adapters(checkpoint: dict[str, Any]) -> dict[str, Any]:
    entries = checkpoint.get(KEY, {}).get("adapters", {})
    for entry in entries.values():
        entry["config"] = {"peft_type": entry.get("peft_type"), **entry["config"]}
    return dict(entries)


def _prefixed(adapters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if len(adapters) == 1:
        return {"lora": next(iter(adapters.values()))}
    return {f"lora ({name})": config for name, config in adapters.items()}


def _logged_comparison(metrics: Metrics) -> Comparison | None:
    both = [name for name in metrics.tuned if name in metrics.base]
    if not both:
        return None
    headline = "val_loss" if "val_loss" in both else next((n for n in both if "loss" in n), both[0])
    mode = "min" if "loss" in headline else None
    title = "validation without and with the adapter, as it was logged"
    return Comparison(metrics.base, metrics.tuned, headline, mode, title=title)


def _samples(folders: list[Path]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in (folder / "samples.jsonl" for folder in folders):
        if not file.is_file():
            continue
        number = 0
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                number += 1
                row = json.loads(line)
                rows.append({"step": int(row.pop("step")), **{k: str(v) for k, v in row.items()}})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(
                f"{str(file)!r}, line {number}, is no sample of TextSamples: {error}. (run)"
            ) from error
    return rows
