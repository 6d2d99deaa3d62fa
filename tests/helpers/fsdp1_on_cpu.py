"""FSDP1 without a GPU, which Lightning and torch would ask for: a strategy for two gloo processes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap


class OnCpu(FSDPStrategy):
    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def wrap_options(self) -> dict[str, Any]:
        options = {"device_id": torch.device("cpu"), "sharding_strategy": self.sharding_strategy}
        return {**options, "mixed_precision": self.mixed_precision_config, **self.kwargs}

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            return model
        root = FullyShardedDataParallel(model, **self.wrap_options)
        _setup_activation_checkpointing(root, self._activation_checkpointing_kwargs)
        return root

    def model_sharded_context(self) -> Any:
        return enable_wrap(wrapper_cls=FullyShardedDataParallel, **self.wrap_options)


def on_cpu(**options: Any) -> OnCpu:
    return OnCpu(process_group_backend="gloo", **options)


UNITS = {"auto_wrap_policy": {nn.Sequential}}


FORMS: dict[str, dict[str, Any]] = {
    "file": {},
    "folder": {"state_dict_type": "sharded", **UNITS},
}
