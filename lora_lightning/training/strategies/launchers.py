"""Trained adapters come back from processes that are started for one call: spawn, fork, notebook.

Such a launcher runs all of `fit` in child processes and then loads their state dict into the module
of the main process, where adapters are extra keys that it drops. The Trainer calls nothing of a
callback in the main process, before or after. So the adapters find their own way to it:

* In the child, `setup` overrides `get_extra_results` on its launcher: the results carry the path of
  a file with the adapters, as an object that acts where it is unpickled.
* In the main process that is inside `launch`, which is waiting for the results. There it overrides
  `update_main_process_results` on that launcher, the next thing that `launch` calls, for one call.

No class of Lightning is changed, and no launcher but the one that the adapters came through.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import walk
from lora_lightning.training._lightning import starts_processes
from lora_lightning.training.attachment import attach_all
from lora_lightning.training.checkpoint_io.metadata import reduce_checkpoint
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.module_state import callbacks_of, module_state

_METHODS = ("get_extra_results", "update_main_process_results")


def hand_back_adapters(trainer: Trainer, module: LightningModule, adapter_name: str) -> None:
    """Have the launcher of this child process hand back what is trained; others are left alone.

    ConfigError if this one cannot, and the main process does not have the adapter, so that
    Lightning's own way back would lose it.
    """
    launcher: Any = trainer.strategy.launcher
    if not starts_processes(launcher) or trainer.state.fn != "fit":
        return
    if all(hasattr(launcher, name) for name in _METHODS):
        launcher.get_extra_results = MethodType(get_extra_results, launcher)
    elif adapter_name not in adapter_names(module):
        raise ConfigError(
            f"{type(trainer.strategy).__name__} trains in child processes here, and this launcher "
            f"({type(launcher).__module__}) hands back only what the main process has already: the "
            "trained adapters would be lost. Put them on before fit, inject_adapter(module, "
            f"config, {adapter_name!r}) with the callback's options; or use strategy='ddp' from a "
            "script. (trainer.strategy)"
        )


class _Returned:
    """The path of a file with adapters; unpickled, the path itself, as `_arrived` gives it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.path,)


def _arrived(path: str) -> str:
    """Have the launcher that unpickles its results in the main process take the adapters up."""
    frame = inspect.currentframe()
    while frame is not None and not starts_processes(frame.f_locals.get("self")):
        frame = frame.f_back
    if frame is None:
        raise RuntimeError(f"The adapters in {path!r} came back to no launcher of Lightning's.")
    launcher = frame.f_locals["self"]
    launcher.update_main_process_results = MethodType(update_main_process_results, launcher)
    return path


# -- the overrides, under the names of the methods (pickle looks bound methods up by name) ---------


def get_extra_results(self: Any, trainer: Trainer) -> dict[str, Any]:
    """Collect, in a child process on its way out, what training changed beside Lightning's own."""
    extra: dict[str, Any] = type(self).get_extra_results(self, trainer)
    module = trainer.lightning_module
    checkpoint = {"state_dict": module.state_dict()}
    reduce_checkpoint(checkpoint, module, callbacks_of(module))
    # By way of a file, as Lightning hands weights back. What goes through its queue must fit a
    # pipe (64 kB on Linux): the main process reads it only once this process has ended.
    path = os.path.join(tempfile.mkdtemp(), "adapters.ckpt")
    torch.save(checkpoint, path)
    return {**extra, KEY: _Returned(path)}


def update_main_process_results(self: Any, trainer: Trainer, extra: dict[str, Any]) -> None:
    """Put on, in the main process, what came back: now or when the module builds its layers."""
    del self.update_main_process_results  # for this call only
    self.update_main_process_results(trainer, extra)
    if KEY not in extra:  # of another call: the one that it was meant for has failed
        return
    checkpoint = torch.load(extra[KEY], map_location="cpu", weights_only=True)
    shutil.rmtree(os.path.dirname(extra[KEY]))
    module, state = trainer.lightning_module, checkpoint["state_dict"]
    adapters = checkpoint[KEY]["adapters"]
    owned = {key for entry in adapters.values() for key in entry["tensors"]}
    moved = {key: state.pop(key) for key in list(state) if key not in owned}
    module_state(module).from_children = {"adapters": adapters, "state_dict": state, "moved": moved}
    module.trainer = trainer  # as after a fit in this process
    if not _has_modules_of(module, owned):
        rank_zero_warn(
            f"{type(module).__name__} builds its layers in configure_model or setup, which ran in "
            "the child processes only: the trained adapters are kept and will be on it as soon as "
            "it builds them again, in the next fit, validate, test or predict."
        )
        return
    attach_all(module)


def _has_modules_of(module: LightningModule, keys: Iterable[str]) -> bool:
    paths = {path for path, _ in walk(module)}
    return all(
        (key.partition(".adapters.")[0] if ".adapters." in key else key.rpartition(".")[0]) in paths
        for key in keys
    )
