"""EVA inside a run: its batches out of the Trainer, and the ranks that it found before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.checkpoint.state_dict import adapter_state_dict
from lora_lightning.engine.eva import FOUND, eva_start
from lora_lightning.engine.injection import adapters_named, delete_adapter
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import ConfigError
from lora_lightning.training._lightning import train_data
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.utilities.rng import random_state, set_random_state


def starts_from_data(callback: AdapterCallback) -> bool:
    """True if the callback was asked for EVA."""
    return getattr(callback._requested_config, "init_lora_weights", True) == "eva"


def take_over_ranks(callback: AdapterCallback, pl_module: LightningModule, root: nn.Module) -> None:
    """Take over the ranks that were found for this module before; none if it was only evaluated."""
    if not starts_from_data(callback):
        return
    callback.config = callback._requested_config
    adapters = [*adapters_named(root, callback.adapter_name).values()]
    if not adapters:
        return
    found = adapters[0].config
    state = adapter_state_dict(root, callback.adapter_name)
    learnt = any(t.any() for name, t in state.items() if name.endswith("lora_B"))
    plain = getattr(found, "init_lora_weights", "eva") != "eva"
    if plain and not learnt and pl_module.trainer.state.fn == "fit":
        delete_adapter(root, callback.adapter_name)  # it has not seen the data yet
    elif isinstance(found, LoraConfig):
        # The requested options, with the targets and ranks that EVA found for them before
        ranks = {name: getattr(found, name) for name in (*FOUND, "init_lora_weights", "eva_config")}
        callback.config = dataclasses.replace(callback._requested_config, **ranks)


def start_values(
    callback: AdapterCallback, pl_module: LightningModule, root: nn.Module
) -> dict[str, Tensor] | None:
    """The start values that EVA finds in the data of this run, unless it has found them before."""
    config = callback.config
    if not isinstance(config, LoraConfig) or not starts_from_data(callback):
        return None
    if callback.adapter_name in adapter_names(root):
        return {}
    callback.config, start = _config_and_start(pl_module, root, config)
    return start


def ranks_of_checkpoint(
    callback: AdapterCallback, strategy: Strategy, saved: dict[str, Any]
) -> LoraConfig | None:
    """The options with the ranks that EVA found when a checkpoint's run began, if they are others.

    `saved` is what the checkpoint says of the adapter. ConfigError if the strategy loads it when
    other ranks cannot be had any more.
    """
    if not starts_from_data(callback) or saved.get("peft_type", "LORA") != "LORA":
        return None
    plain = {"init_lora_weights": True, "eva_config": None}
    config = LoraConfig.from_dict({**saved["config"], **plain})
    if config.rank_pattern == getattr(callback.config, "rank_pattern", None):
        return None
    if strategy.restore_checkpoint_after_setup:
        raise ConfigError(
            f"{type(strategy).__name__} restores checkpoints into adapters that it has set up, but "
            "this one's have the ranks that EVA found. Resume on a single device or under DDP, or "
            "put the adapter on before fit: load_adapter(module, path). (lora.init_lora_weights)"
        )
    return config


def _config_and_start(
    pl_module: LightningModule, root: nn.Module, config: LoraConfig
) -> tuple[LoraConfig, dict[str, Tensor] | None]:
    """The config with the ranks that EVA finds, and the start of A; plain LoRA outside of fit.

    The data are looked at once, when training begins: `training_step` runs on the first batches
    without gradients. All processes of a run get what the first one finds, and the random numbers
    of the run are not touched. ConfigError if there is no training data to look at, or too little.
    """
    trainer = pl_module.trainer
    if trainer.state.fn != "fit":
        return dataclasses.replace(config, init_lora_weights=True, eva_config=None), None
    if not pl_module.automatic_optimization:
        raise ConfigError(
            "init_lora_weights='eva' runs training_step on the first batches, which under manual "
            "optimization would train. Use eva_start and inject_adapter by hand before fit. "
            "(lora.init_lora_weights)"
        )
    device = trainer.strategy.root_device
    pl_module.to(device)
    loader = train_data(trainer)

    def forward(batch: Any) -> None:
        moved = trainer.strategy.batch_to_device(batch, device=device)
        with trainer.strategy.precision_plugin.train_step_context():
            pl_module.training_step(moved, 0)

    state = random_state()
    try:
        with _no_logging(pl_module), torch.no_grad():
            found = eva_start(root, config, islice(iter(loader), 10**6), forward)
    finally:
        set_random_state(state)
    return trainer.strategy.broadcast(found, src=0)


@contextmanager
def _no_logging(pl_module: LightningModule) -> Iterator[None]:
    def ignore(*args: Any, **kwargs: Any) -> None:
        """The loops that would collect what is logged do not run yet."""

    attributes = pl_module.__dict__
    own: dict[str, Any] = {n: attributes[n] for n in ("log", "log_dict") if n in attributes}
    attributes.update(log=ignore, log_dict=ignore)
    try:
        yield
    finally:
        del attributes["log"], attributes["log_dict"]
        attributes.update(own)
