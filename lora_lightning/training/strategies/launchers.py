"""Trained adapters come back from processes that are started for one call: spawn, fork, notebook.

Such a launcher runs all of `fit` in child processes and then loads their state dict into the module
of the main process, where adapters are extra keys that it drops. The Trainer calls nothing of a
callback in the main process. So the two methods with which Lightning's launcher hands more back
(`get_extra_results` in the child, `update_main_process_results` in the main process) are extended
on its class, once, when this file is imported; without a LoraCallback they do what they did.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import walk
from lora_lightning.training.attachment import attach_all
from lora_lightning.training.checkpoints.metadata import reduce_checkpoint
from lora_lightning.training.module_state import callbacks_of, module_state
from lora_lightning.utilities.is_a import is_a

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


_original_extra = _MultiProcessingLauncher.get_extra_results
_original_update = _MultiProcessingLauncher.update_main_process_results


def check_launcher(trainer: Any, pl_module: LightningModule, adapter_name: str) -> None:
    """Adapters must not be lost in the processes that a launcher trains in.

    Raises:
        ConfigError: If the launcher hands back only what the main process has already, and the
            main process does not have the adapter.

    """
    launcher: Any = trainer.strategy.launcher
    if not is_a(launcher, "_MultiProcessingLauncher") or trainer.state.fn != "fit":
        return
    hands_back = getattr(launcher.get_extra_results, "__func__", None) is _get_extra_results
    if not hands_back and adapter_name not in adapter_names(pl_module):
        raise ConfigError(
            f"{type(trainer.strategy).__name__} trains in child processes here, and this launcher "
            f"({type(launcher).__module__}) hands back only what the main process has already: the "
            "trained adapters would be lost. Put them on before fit, inject_adapter(module, "
            f"config, {adapter_name!r}) with the callback's options; or use strategy='ddp' from a "
            "script. (trainer.strategy)"
        )


def _get_extra_results(self: Any, trainer: Any) -> dict[str, Any]:
    """In a child process, on its way out: what training changed, beside what Lightning returns."""
    extra = _original_extra(self, trainer)
    module = trainer.lightning_module
    callbacks = callbacks_of(module)
    if callbacks and trainer.state.fn == "fit":
        checkpoint = {"state_dict": module.state_dict()}
        reduce_checkpoint(checkpoint, module, callbacks)
        # By way of a file, as Lightning hands weights back. What goes through its queue must fit a
        # pipe (64 kB on Linux): the main process reads it only once this process has ended.
        extra[KEY] = os.path.join(tempfile.mkdtemp(), "adapters.ckpt")
        torch.save(checkpoint, extra[KEY])
    return extra


def _update_main_process_results(self: Any, trainer: Any, extra: dict[str, Any]) -> None:
    """In the main process: attach what came back, now or when the module builds its layers."""
    _original_update(self, trainer, extra)
    if KEY not in extra:
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


_MultiProcessingLauncher.get_extra_results = _get_extra_results  # type: ignore[method-assign]
_MultiProcessingLauncher.update_main_process_results = _update_main_process_results  # type: ignore[method-assign]
