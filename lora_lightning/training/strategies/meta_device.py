"""Base on the meta device: its weights are loaded after every process has its memory.

`ModelParallelStrategy` gives a module that holds any meta tensor memory in its `setup`, and its
layers start values of their own: all that was loaded before is gone. So the weights are asked for
afterwards, of a method of the LightningModule:

    def base_state_dict(self):  # whole tensors, on every process, by their names in the module
        return load_file("base.safetensors")

Each process takes its part. Adapters have made their start values by then, the same everywhere.
Under other strategies the same module has memory from the start, but `init_module(empty_init=True)`
leaves in it what was there: the base is loaded before adapters are attached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lora_lightning.adapters.trainable_tokens import TrainableTokensAdapter
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import AdapterMismatchError, ConfigError, first_few
from lora_lightning.layers.traversal import named_adapted_layers, walk
from lora_lightning.training.checkpoint_io.metadata import remember_base
from lora_lightning.training.module_state import callbacks_of, module_state
from lora_lightning.training.strategies.fsdp2 import is_model_parallel
from lora_lightning.utilities.dtensor import copy_full, full_tensor

HOOK = "base_state_dict"


def expect_base(module: LightningModule) -> None:
    """Note that a base on the meta device is to be loaded later; ConfigError if it cannot be."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    meta = [name for name, tensor in tensors if tensor.is_meta]
    if not meta or not is_model_parallel(module.trainer.strategy):
        return  # other strategies give no memory: taking the fingerprint says so
    if not callable(getattr(module, HOOK, None)):
        raise ConfigError(
            f"{first_few(meta)} are on the meta device. The strategy will give them memory and "
            "random values, and nothing would load the base that the adapters are for. Define "
            f"`{HOOK}(self)` on the LightningModule: it returns the base's whole tensors by name. "
            "(model)"
        )
    for path, child in walk(module):
        lost = [n for n in child._non_persistent_buffers_set if child._buffers[n] is not None]
        if lost and not callable(getattr(child, "reset_parameters", None)):
            raise ConfigError(
                f"{(path + '.' if path else '') + sorted(lost)[0]!r} is a buffer that no state "
                f"dict holds, and {type(child).__name__} has no reset_parameters that could make "
                "it anew once the model leaves the meta device. Define it. (model)"
            )
    if any(True for _ in trained_biases(module)):
        raise ConfigError(
            "bias='lora_only' and 'all' keep the base's own biases aside, which on the meta device "
            "have no values. Use bias='none', or load the base in __init__. (lora.bias)"
        )
    module_state(module).base_on_meta = True


def load_base_at_once(module: LightningModule) -> None:
    """Load the base of a module that says where it is and has memory for it already."""
    own = module.state_dict()
    meta = any(tensor.is_meta for tensor in own.values() if isinstance(tensor, Tensor))
    later = meta or is_model_parallel(module.trainer.strategy)
    if later or adapter_names(module) or not callable(getattr(module, HOOK, None)):
        return
    values = getattr(module, HOOK)()
    _check(values, own)
    _fill(own, values)


def load_base(module: LightningModule) -> None:
    """Load the base where it was on the meta device; every process calls this."""
    remembered = module_state(module)
    if not remembered.base_on_meta:
        return
    values: Mapping[str, Tensor] = getattr(module, HOOK)()
    saved = {key for callback in callbacks_of(module) for key in callback._saved_keys(module)}
    own = {key: t for key, t in module.state_dict().items() if key not in saved}
    _check(values, own)
    _fill(own, values)
    for path, layer in named_adapted_layers(module):
        prefix = path + "." if path else ""
        for copy in layer.trained_copies().values():
            _fill(copy.module.state_dict(), values, prefix)
        for adapter in layer.adapters.modules():
            if isinstance(adapter, TrainableTokensAdapter):
                adapter.start_from_weight(full_tensor(layer.base_weight().detach()))
    remembered.base_on_meta = False
    remember_base(module, fresh=True)


def _fill(own: Mapping[str, Any], values: Mapping[str, Tensor], prefix: str = "") -> None:
    for key, tensor in own.items():
        if isinstance(tensor, Tensor):
            copy_full(tensor, values[prefix + key].to(tensor.device))


def _check(values: object, own: Mapping[str, Any]) -> None:
    """Raise AdapterMismatchError if tensors are missing, left over or of another shape."""
    if not isinstance(values, Mapping):
        raise AdapterMismatchError(
            f"{HOOK} returned a {type(values).__name__}; it returns tensors by name. (model)"
        )
    tensors = {key: t for key, t in own.items() if isinstance(t, Tensor)}
    lines = []
    if missing := sorted(tensors.keys() - values.keys()):
        lines.append(f"missing: {first_few(missing)}")
    if extra := sorted(values.keys() - own.keys()):
        lines.append(f"not in the module: {first_few(extra)}")
    shapes = [
        f"{key} {list(values[key].shape)} there, {list(tensor.shape)} here"
        for key, tensor in tensors.items()
        if key in values and values[key].shape != torch.Size(tensor.shape)
    ]
    if shapes:
        lines.append(f"other shape: {first_few(shapes, 2)}")
    if lines:
        raise AdapterMismatchError(
            f"What {HOOK} returned is not the base of this module:\n  " + "\n  ".join(lines)
        )
