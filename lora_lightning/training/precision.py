"""Precision plugins: which ones adapters live under, and bitsandbytes' conversion before them.

Most plugins only cast, which adapters withstand (`Adapter._apply`). One that replaces modules when
the strategy is set up would replace those that carry adapters. `BitsandbytesPrecision` is asked to
convert before they are attached, and leaves a module with layers of bitsandbytes alone from then
on. So is `DoublePrecision`: a checkpoint is loaded before the strategy is set up, into tensors that
would be too narrow for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lora_lightning.engine.freezing import (
    freeze_parameters,
    frozen_by_user,
    remember_quantised,
)
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import AdapterStateError, ConfigError
from lora_lightning.layers.quantized.bitsandbytes import is_linear4bit, is_linear8bit
from lora_lightning.training._lightning import is_quantizing_hook
from lora_lightning.utilities.is_a import is_a

_LIGHTNING = ("lightning.", "pytorch_lightning.", "lightning_fabric.")


def check_precision(trainer: Trainer) -> None:
    """Refuse (ConfigError) precision plugins that replace modules, but for bitsandbytes'."""
    plugin = type(trainer.precision_plugin)
    name = plugin.__name__
    if is_a(trainer.precision_plugin, "TransformerEnginePrecision"):
        raise ConfigError(
            f"LoraCallback does not support {name}: TransformerEngine replaces Linear and "
            "LayerNorm modules by its own, after adapters were attached to them. Use 'bf16-mixed' "
            "or 'bf16-true'; for a smaller base, BitsandbytesPrecision. (trainer.precision)"
        )
    owner = next(cls for cls in plugin.__mro__ if "convert_module" in vars(cls))
    if not owner.__module__.startswith(_LIGHTNING):
        raise ConfigError(
            f"{name} has a convert_module of its own, which may replace the modules that carry "
            "adapters. Cast or quantise the model before training, in its __init__ or "
            "configure_model, and use a precision of Lightning's. (trainer.precision)"
        )


def convert_before_attaching(module: LightningModule) -> None:
    """Convert `module` by the plugin of bitsandbytes or of float64; others wait for the strategy.

    Doing it again changes nothing. AdapterStateError if adapters sit on layers that it would
    replace.
    """
    plugin = module.trainer.precision_plugin
    if is_a(plugin, "DoublePrecision"):
        plugin.convert_module(module)
    if not is_a(plugin, "BitsandbytesPrecision"):
        return
    frozen = frozen_by_user(module)
    if not any(map(_is_quantized, module.modules())):
        if adapter_names(module):
            raise AdapterStateError(
                f"The adapters {adapter_names(module)} sit on layers that "
                f"{type(plugin).__name__} would replace. Take them off with delete_adapter and let "
                "LoraCallback attach them, or train without the plugin. (trainer.precision)"
            )
        freeze_parameters(module)  # an optimizer that was built before may hold them
    plugin.convert_module(module)
    remember_quantised(module, frozen)
    for layer in filter(_is_quantized, module.modules()):
        _quantize_base_only(layer)
    # Here layers are quantised: adapters may start from the weights, as they act from now on.
    module.to(module.trainer.strategy.root_device)


def _is_quantized(module: nn.Module) -> bool:
    return is_linear4bit(module) or is_linear8bit(module)


def _quantize_base_only(layer: nn.Module) -> None:
    """Hide adapters from the plugin's hook, which quantises what a state dict has for the layer.

    It takes the first key that ends with "weight", which in an adapter checkpoint may be that of
    an adapter.
    """
    hooks: Any = layer._load_state_dict_pre_hooks
    for wrapped in hooks.values():
        hook = wrapped.hook
        if is_quantizing_hook(hook):
            wrapped.hook = partial(_without_adapters, hook)


def _without_adapters(
    hook: Callable[..., None], state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    inside = f"{prefix}adapters."
    base = {key: value for key, value in state_dict.items() if not key.startswith(inside)}
    keys = list(base)
    hook(base, prefix, *args)
    for key in keys:
        if key not in base:  # the hook has loaded it
            del state_dict[key]
