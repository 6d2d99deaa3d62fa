"""The part of a `LoraCallback` that the modules of this package use: its options and its adapter.

They find callbacks by this class and so need not import `LoraCallback`, which imports them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.checkpoint.state_dict import saved_keys
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.injection import adapters_named
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.errors import ConfigError, nearest_hint
from lora_lightning.layers.traversal import walk
from lora_lightning.utilities.wrappers import unwrapped


class AdapterCallback(Callback, ABC):
    """Base class of `LoraCallback`, with its attributes."""

    config: AdapterConfig  # ranks that EVA has found are in it
    adapter_name: str
    module: str | None
    init_from: str | None
    trainable: bool
    lr: float
    nonfinite: str
    enabled: bool
    autocast_adapter_dtype: bool
    _requested_config: AdapterConfig  # as it was given
    _new_modules: list[str]  # that train in full because no file had weights for them
    _selection: Selection  # the modules that carry the adapter; empty until it is attached

    if not TYPE_CHECKING:  # which sees the options in `__init__`

        def __new__(cls, *values: Any, **options: Any) -> AdapterCallback:
            """Refuse values in the order of another function in more words than `__init__`."""
            if len(values) > 1:
                shown = ", ".join(type(value).__name__ for value in values)
                raise ConfigError(
                    f"{cls.__name__} was given {len(values)} values without a name ({shown}); only "
                    "a config may have none. trainer.fit is given the model; ranks and alphas go "
                    "by name: LoraCallback(r=8, lora_alpha=16). (lora.config)"
                )
            return super().__new__(cls)

    def _root(self, pl_module: LightningModule) -> nn.Module:
        """The submodule that is adapted; ConfigError if the module has none of that path."""
        if not self.module:
            return pl_module
        paths = [path for path, _ in walk(pl_module) if path]
        if self.module not in paths:
            hint = nearest_hint(self.module, paths)
            top = ", ".join(path for path in paths if "." not in path)
            raise ConfigError(
                f"module={self.module!r}: {type(pl_module).__name__} has no such submodule.{hint} "
                f"At its top: {top or 'none'}. (lora.module)"
            )
        root: nn.Module = unwrapped(pl_module.get_submodule(self.module))
        return root

    def _saved_keys(self, pl_module: LightningModule) -> dict[str, list[int]]:
        """Key in the LightningModule's state dict and shape of every tensor of this adapter."""
        prefix = f"{self.module}." if self.module else ""
        keys = saved_keys(self._root(pl_module), self.adapter_name)
        return {prefix + key: shape for key, shape in keys.items()}

    def _unnamed_parameters(self, pl_module: LightningModule) -> set[int]:
        """By `id`, what trains on modules that the options do not name: they select by kind."""
        if not self.config.names_no_module:
            return set()
        root = self._root(pl_module)
        biases = trained_biases(root, self.adapter_name)
        return {
            id(parameter)
            for adapter in adapters_named(root, self.adapter_name).values()
            if adapter.by_weight()
            for parameter in adapter.parameters()
        } | {id(record.parameter(module)) for _, module, record in biases}

    @abstractmethod
    def _leaves_step_out(self) -> bool:
        """True while an optimizer step is under way that is left out."""

    @abstractmethod
    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Save and end the run where a signal has asked for it."""

    @abstractmethod
    def _rank_allocation(self) -> dict[str, Any] | None:
        """AdaLoRA's ranks for a checkpoint; None for other types."""
