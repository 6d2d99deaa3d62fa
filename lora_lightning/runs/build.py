"""The module and the data of a run, made again."""

from __future__ import annotations

from argparse import ArgumentError
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

import lora_lightning
from lora_lightning.checkpoint.loading import load_adapter
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import KEY, TASK
from lora_lightning.engine.switching import set_adapter
from lora_lightning.errors import ConfigError
from lora_lightning.runs.objects import object_at
from lora_lightning.runs.run import Run
from lora_lightning.tasks.model_options import weights_of
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.training.checkpoint_io.loading import load_from_checkpoint
from lora_lightning.training.messages import bars_on_terminals
from lora_lightning.training.module_state import bare_copy
from lora_lightning.utilities.rng import random_state, set_random_state

_MADE_IN_SETUP = "_lora_made_in_setup"


@bars_on_terminals()
def trained_module(run: Run, module: Any = None) -> Any:
    """The module of a run, in eval mode on the CPU, with the adapters of its checkpoint active.

    Args:
        run: The run.
        module: An instance with the same base, fresh or as training left it, which stays as it is:
            a copy is used. Or the class of the LightningModule (or its import path), which the
            checkpoint's hyperparameters make again. Default: what the run's config or, for the
            tasks of this library, the checkpoint says.

    Raises:
        ConfigError: If neither says it.
        CheckpointError: If the checkpoint is damaged or of another kind.
        AdapterMismatchError: If adapters or base do not fit.

    """
    if isinstance(module, str):
        module = object_at(module, "module")
    checkpoint = read_adapter_checkpoint(run.checkpoint)
    made: Any = _described(run, checkpoint) if module is None else module
    if isinstance(made, type) and issubclass(made, LightningModule):
        try:
            return load_from_checkpoint(made, run.checkpoint, **_trusted(run, made)).eval()
        except TypeError as error:
            if ".__init__()" not in str(error):
                raise
            raise ConfigError(
                f"{made.__name__} cannot be made again: {error}, and {str(run.checkpoint)!r} does "
                "not hold it (save_hyperparameters). Name the run directory with its config, or in "
                "Python give an instance. (module)"
            ) from error
    if not isinstance(made, nn.Module):
        kind = made.__name__ if isinstance(made, type) else type(made).__name__
        raise ConfigError(f"{kind} is no LightningModule, neither class nor instance. (module)")
    if module is not None:
        made = _copied(made)
        _make_late_layers(made, checkpoint)
    if isinstance(made, LightningModule):
        made.on_load_checkpoint(checkpoint)
    set_adapter(made, load_adapter(made, run.checkpoint))
    return made.eval()


def made_in_setup(module: object) -> bool:
    """Tell whether layers of a `trained_module` are there only once its `setup` has run."""
    return bool(vars(module).get(_MADE_IN_SETUP))


def data_of(run: Run, data: Any = None) -> LightningDataModule | None:
    """The data module of a run, or an instance, a class or its import path; None without any."""
    if isinstance(data, str):
        data = object_at(data, "data")
    if isinstance(data, type):
        return _called(data, "data")  # type: ignore[no-any-return]
    if data is not None or not run.config.get("data"):
        return data  # type: ignore[no-any-return]
    return _made(run, "data")["data"]  # type: ignore[no-any-return]


def _called(kind: type, option: str) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise ConfigError(
            f"{kind.__name__} cannot be made without arguments: {error}. In Python, give an "
            f"instance. ({option})"
        ) from error


def _copied(module: nn.Module) -> nn.Module:
    """A copy as it was before training: the instance may be on its way through a notebook."""
    try:
        return bare_copy(module)
    except Exception as error:  # of anybody's module
        raise ConfigError(
            f"This {type(module).__name__} cannot be copied ({error}): give its class, or a fresh "
            "instance. (module)"
        ) from error


def _make_late_layers(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Call the hooks that make layers; `setup` only where some are missing: it may ask for data."""
    if not isinstance(module, LightningModule):
        return
    module.configure_model()
    keys = [key for entry in checkpoint[KEY]["adapters"].values() for key in entry["tensors"]]
    paths = {path for key in keys if (path := key.partition(".adapters.")[0]) != key}
    missing = paths - {path for path, _ in module.named_modules()}
    if missing:
        module.__dict__[_MADE_IN_SETUP] = True
        try:
            module.setup("fit")
        except Exception as error:  # of anybody's module
            raise ConfigError(
                f"{type(module).__name__} has no {min(missing)!r} before setup(), which failed "
                f"without a Trainer: {error}. In Python, give an instance on which it was called. "
                "(module)"
            ) from error


def _described(run: Run, checkpoint: dict[str, Any]) -> Any:
    """The class of a task, or a module of one's own, as config and checkpoint describe it."""
    task = checkpoint.get(TASK)
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
    made = _made(run, "model", "data", checkpoint=checkpoint)["model"]
    cast = weights_of(str((run.config.get("trainer") or {}).get("precision")))
    return made if cast is None else made.to(cast)


def _trusted(run: Run, module: type) -> dict[str, Any]:
    """What only the user says, no checkpoint."""
    section = run.config.get("model")
    options = (section.get("init_args") or {}) if isinstance(section, dict) else {}
    trusts = issubclass(module, PretrainedTask) and options.get("trust_remote_code")
    return {"trust_remote_code": True} if trusts else {}


def _made(run: Run, *sections: str, checkpoint: dict[str, Any] | None = None) -> dict[str, Any]:
    """Make sections of a run's config, in the order and from the seed of the command.

    A base that is drawn at random is the same one, then: of layers, too, that a hook makes, where
    the `checkpoint` is given that names them.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    kinds: dict[str, Any] = {"model": LightningModule, "data": LightningDataModule}
    there = [name for name in kinds if name in sections and run.config.get(name)]
    for name in there:
        parser.add_lightning_class_args(kinds[name], name, subclass_mode=True)
        section = run.config[name]
        path = section.get("class_path") if isinstance(section, dict) else section
        if isinstance(path, str) and "." in path:
            object_at(path, name)
    before = random_state()
    seed = run.config.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        pl.seed_everything(seed, workers=True, verbose=False)
    try:
        config = parser.parse_object({name: run.config[name] for name in there})
        made = parser.instantiate_classes(config)
        if checkpoint is not None:
            _make_late_layers(made["model"], checkpoint)
    except ArgumentError as error:
        raise ConfigError(
            f"The config of {str(run.directory)!r} does not fit its classes any more: "
            f"{' '.join(str(error).split())} (run)"
        ) from error
    finally:
        set_random_state(before)
    return {name: made[name] for name in there}
