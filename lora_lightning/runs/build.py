"""The module and the data of a run, made again."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

import lora_lightning
from lora_lightning.checkpoint.loading import load_adapter
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import TASK
from lora_lightning.engine.switching import set_adapter
from lora_lightning.errors import ConfigError
from lora_lightning.runs.run import Run
from lora_lightning.tasks.model_options import weights_of
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.training.checkpoint_io.loading import load_from_checkpoint
from lora_lightning.utilities.rng import random_state, set_random_state


def trained_module(run: Run, module: Any = None) -> Any:
    """The module of a run, in eval mode on the CPU, with the adapters of its checkpoint active.

    Args:
        run: The run.
        module: An instance with the same base, or the class of the LightningModule, which the
            checkpoint's hyperparameters make again. Default: what the run's config or, for the
            tasks of this library, the checkpoint says.

    Raises:
        ConfigError: If neither says it.
        CheckpointError: If the checkpoint is damaged or of another kind.
        AdapterMismatchError: If adapters or base do not fit.

    """
    if module is None:
        module = _described(run)
    if isinstance(module, type):
        made: Any = load_from_checkpoint(module, run.checkpoint, **_trusted(run, module))
    else:
        made = module
        checkpoint = read_adapter_checkpoint(run.checkpoint)
        if isinstance(made, LightningModule):
            made.configure_model()
            made.on_load_checkpoint(checkpoint)
        set_adapter(made, load_adapter(made, run.checkpoint))
    return made.eval()


def data_of(run: Run, data: LightningDataModule | None = None) -> LightningDataModule | None:
    """The data module of a run; None where its config has none."""
    if data is not None or not run.config.get("data"):
        return data
    return _made(run, "data")["data"]  # type: ignore[no-any-return]


def _described(run: Run) -> Any:
    """The class of a task, or a module of one's own, as config and checkpoint describe it."""
    task = read_adapter_checkpoint(run.checkpoint).get(TASK)
    if isinstance(task, str) and task in lora_lightning.__all__:
        section = run.config.get("model") or {}
        found = getattr(lora_lightning, task)
        path = section.get("class_path") if isinstance(section, dict) else section
        if isinstance(found, type) and path in (None, f"lora_lightning.{task}"):
            return found
    if not run.config.get("model"):
        raise ConfigError(
            f"{str(run.checkpoint)!r} does not say which module it was trained on, and there is no "
            "config of `lora-lightning fit` beside it. Name the module: its class, my_module.Net, "
            "on the command line (--module), or in Python the class or an instance. (module)"
        )
    made = _made(run, "model", "data")["model"]
    cast = weights_of(str((run.config.get("trainer") or {}).get("precision")))
    return made if cast is None else made.to(cast)


def _trusted(run: Run, module: type) -> dict[str, Any]:
    """What only the user says, no checkpoint."""
    section = run.config.get("model")
    options = (section.get("init_args") or {}) if isinstance(section, dict) else {}
    trusts = issubclass(module, PretrainedTask) and options.get("trust_remote_code")
    return {"trust_remote_code": True} if trusts else {}


def _made(run: Run, *sections: str) -> dict[str, Any]:
    """Make sections of a run's config, in the order and from the seed of the command.

    A base that is drawn at random is the same one, then.
    """
    parser = LightningArgumentParser()
    kinds: dict[str, Any] = {"model": LightningModule, "data": LightningDataModule}
    there = [name for name in kinds if name in sections and run.config.get(name)]
    for name in there:
        parser.add_lightning_class_args(kinds[name], name, subclass_mode=True)
    before = random_state()
    seed = run.config.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        pl.seed_everything(seed, workers=True, verbose=False)
    try:
        config = parser.parse_object({name: run.config[name] for name in there})
        made = parser.instantiate_classes(config)
    finally:
        set_random_state(before)
    return {name: made[name] for name in there}
