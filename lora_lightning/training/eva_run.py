"""EVA's batches out of a Trainer, before the run has begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.lora import LoraConfig
from lora_lightning.config import AdapterConfig
from lora_lightning.errors import ConfigError
from lora_lightning.eva import FOUND, eva_start
from lora_lightning.rng import random_state, set_random_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def eva_config_and_start(
    trainer: Trainer,
    pl_module: LightningModule,
    root: nn.Module,
    config: LoraConfig,
) -> tuple[LoraConfig, dict[str, Tensor] | None]:
    """The config with the ranks that EVA finds, and the start of A; plain LoRA outside of fit.

    The data are looked at once, when training begins: `training_step` runs on the first batches
    without gradients. All processes of a run get what the first one finds, and the random numbers
    of the run are not touched.

    Raises:
        ConfigError: If there is no training data to look at, or too little.

    """
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
    loader = trainer.fit_loop._data_source.dataloader()

    def forward(batch: Any) -> None:
        moved = pl_module._apply_batch_transfer_handler(batch, device=device)
        with trainer.strategy.precision_plugin.train_step_context():
            pl_module.training_step(moved, 0)

    state = random_state()
    try:
        with _no_logging(pl_module), torch.no_grad():
            found = eva_start(root, config, islice(iter(loader), 10**6), forward)
    finally:
        set_random_state(state)
    return trainer.strategy.broadcast(found, src=0)


def with_ranks_of(found: LoraConfig, given: AdapterConfig) -> AdapterConfig:
    """The options that were given, with the targets and ranks that EVA found for them before."""
    ranks = {name: getattr(found, name) for name in (*FOUND, "init_lora_weights", "eva_config")}
    return dataclasses.replace(given, **ranks)


@contextmanager
def _no_logging(pl_module: LightningModule) -> Iterator[None]:
    def ignore(*args: Any, **kwargs: Any) -> None:
        """The loops that would collect what is logged do not run yet."""

    before = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in before:
        pl_module.__dict__[name] = ignore
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                del pl_module.__dict__[name]
            else:
                pl_module.__dict__[name] = method
