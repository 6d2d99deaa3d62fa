"""A run on one device, under DDP, FSDP1 or FSDP2, and its adapters and moments as full tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.utilities.dtensor import full_tensor
from lora_lightning.utilities.wrappers import plain_name
from tests.helpers.fsdp2_modules import InitializedOnMeta
from tests.helpers.lightning_modules import Data, make_trainer


def make_callback(**options: Any) -> LoraCallback:
    defaults = {"r": 2, "target_modules": ["embed", "body.2"], "modules_to_save": ["head"]}
    return LoraCallback(**{**defaults, **options})


def fit(
    kind: Any,
    folder: Path,
    epochs: int,
    ckpt_path: Any = None,
    way: Any = "auto",
    config: Any = None,
    other: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Adapters and moments after training, whole; 32 samples a step whatever the strategy."""
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    devices = 1 if way == "auto" else 2
    callback = make_callback() if config is None else LoraCallback(config)
    own_share = range(int(os.environ.get("RANK", 0)), 64, devices)
    loader = DataLoader(Data().dataset, 32 // devices, sampler=list(own_share))
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    settings = {"max_epochs": epochs, "strategy": way, "devices": devices}
    settings["use_distributed_sampler"] = False
    others = [] if other is None else [other]
    trainer = make_trainer(folder, callback, saver, *others, **settings, **options)
    if kind is InitializedOnMeta:
        with trainer.init_module(empty_init=True):
            module = kind()
    else:
        module = kind()
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return whole_state(module, trainer.optimizers[0])


def whole_state(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    names = {id(p): name for name, p in named_parameters(module)}
    state = {k: full_tensor(v).clone() for k, v in module.state_dict().items() if ".adapters." in k}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            state[f"{names[id(parameter)]}/{key}"] = full_tensor(value).clone()
    return state


def state_of(trainer: Any) -> dict[str, Any]:
    state = whole_state(trainer.lightning_module, trainer.optimizers[0])
    return {plain_name(name): value for name, value in state.items()}
