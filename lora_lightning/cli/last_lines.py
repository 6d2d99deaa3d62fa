"""The last lines of a command: what to do next with the run, ready to be pasted."""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lora_lightning.cli.verbs import VERBS
from lora_lightning.cli.wording import PROGRAM
from lora_lightning.data.split_data_module import SplitDataModule
from lora_lightning.engine.switching import adapter_names
from lora_lightning.tasks.language_model import LanguageModel
from lora_lightning.tasks.pretrained_task import PretrainedTask


def launched_from_outside(trainer: Trainer) -> bool:
    """Tell whether the processes were started by torchrun, SLURM or the like."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return not isinstance(environment, (LightningEnvironment, type(None)))


def to_go_on(trainer: Trainer, directory: Path, further: bool = False) -> list[str]:
    """How to start the run again; `further`: it is done, and to go on beyond its end."""
    savers = trainer.checkpoint_callbacks
    if savers and all(getattr(saver, "save_weights_only", False) for saver in savers):
        return []  # no optimizer to go on with
    if launched_from_outside(trainer):
        limit = "max_epochs" if trainer.max_steps == -1 else "max_steps"
        label = f"to go on (raise trainer.{limit})" if further else "to go on"
        return [f"{label}:\n  start it again as before, with --ckpt_path last"]
    more = []
    if further and trainer.max_steps > 0:
        more = ["--trainer.max_steps", str(2 * trainer.max_steps)]
    elif further and (trainer.max_epochs or -1) > 0:
        more = ["--trainer.max_epochs", str((trainer.max_epochs or 0) + 1)]
    return [f"to go on:\n  {_command('fit', directory, *more)}"]


def to_evaluate(trainer: Trainer, directory: Path) -> list[str]:
    """How to validate the run's best checkpoint."""
    alone = {"num_nodes": "1", "devices": "1", "strategy": "auto"}
    single = [part for key in alone for part in (f"--trainer.{key}", alone[key])]
    options = single if launched_from_outside(trainer) else []
    return [f"to evaluate:\n  {_command('validate', directory, *options)}"]


def to_use_it(
    module: LightningModule,
    data: LightningDataModule | None,
    directory: Path,
    without: frozenset[str] = frozenset(),
) -> list[str]:
    """The verbs that make something of the run; those alone that there are."""
    # A folder of a model, or a file of an own module: where no verb takes it for a checkpoint.
    merged = "merged" if isinstance(module, PretrainedTask) else "merged/model.ckpt"
    several = adapter_names(module)[:1] if len(adapter_names(module)) > 1 else []
    which = [part for name in several for part in ("--adapter", name)]
    quantized = getattr(getattr(module, "options", None), "quantize", None)
    dense = ["--dequantize"] if quantized else []
    commands: dict[str, tuple[str, list[str]]] = {
        "generate": ("chat", []),
        "predict": ("predict", ["--data.predict", "FILE"] if _reads_file(data) else []),
        "merge": ("whole model", [str(directory / merged), *dense]),
        "export": ("PEFT folder", [str(directory / "peft"), *which]),
        "report": ("report", []),
    }
    known = {*VERBS} if isinstance(module, LanguageModel) else {*VERBS} - {"generate"}
    if _reads_file(data) or _predicts(data):
        known.add("predict")
    shown = {verb: commands[verb] for verb in commands if verb in known - without}
    if not shown:
        return []
    names = ", ".join(name for name, _ in shown.values())
    lines = [f"  {_command(verb, directory, *more)}" for verb, (_, more) in shown.items()]
    return ["\n".join([f"to use it ({names}):", *lines])]


def _reads_file(data: LightningDataModule | None) -> bool:
    return data is not None and "predict" in inspect.signature(type(data)).parameters


def _predicts(data: LightningDataModule | None) -> bool:
    """Tell whether it has data to predict of its own; where a file is missing it has none."""
    home = getattr(type(data), "predict_dataloader", LightningDataModule.predict_dataloader)
    return home is not LightningDataModule.predict_dataloader and not isinstance(
        data, SplitDataModule
    )


def _command(verb: str, directory: Path, *options: str) -> str:
    return shlex.join([typed_program(), verb, str(directory), *options])


def typed_program() -> str:
    """The command's name where the shell finds it, else the path by which it was called."""
    found = shutil.which(PROGRAM)
    called: Any = sys.argv[0]
    if found and os.path.exists(called) and not os.path.samefile(found, called):
        return str(called)
    return PROGRAM if found or not os.path.exists(called) else str(called)
