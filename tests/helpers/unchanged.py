"""What a refused action must leave as it was: everything that can be seen of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_lightning.engine.bias import trained_biases
from tests.helpers.tensors import bit_equal


def unchanged_check(model: nn.Module) -> Callable[[], None]:
    """Call the result to assert that nothing about `model` has changed since."""
    before = _state(model)

    def check() -> None:
        after = _state(model)
        assert list(after) == list(before)
        for key, value in before.items():
            if isinstance(value, Tensor):
                assert bit_equal(value, after[key]), key
            else:
                assert value == after[key], key

    return check


def _state(model: nn.Module) -> dict[str, Any]:
    """Tensors bit by bit, which of them train, and the state of every module."""
    found: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = "meta" if tensor.is_meta else tensor.detach().clone()
        found[f"{name}: object"] = (id(tensor), tensor.requires_grad)
    for path, module in model.named_modules():
        found[f"{path}: class"] = type(module)
        found[f"{path}: mode"] = module.training
        found[f"{path}: attributes"] = sorted(module.__dict__)
        for attribute in ("active_adapters", "merged_adapters", "row_adapters"):
            found[f"{path}: {attribute}"] = list(getattr(module, attribute, None) or ())
        for attribute in ("config", "scaling", "config_scaling", "adapters_enabled"):
            found[f"{path}: {attribute}"] = getattr(module, attribute, None)
    for name, _, record in trained_biases(model):
        found[f"{name}: hidden"] = record.hidden.clone()
        found[f"{name}: shown"] = (record.adapter_name, record.shown)
    found["keys"] = list(model.state_dict())
    return found
