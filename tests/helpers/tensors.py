"""Tensors of models: which train, random values for them, equality bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.layers.traversal import named_parameters


@torch.no_grad()
def randomize(parameters, std: float = 0.5) -> None:
    """Give adapters values that matter: at their start they do nothing."""
    for parameter in parameters:
        parameter.copy_(torch.randn_like(parameter) * std)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in named_parameters(model) if p.requires_grad}


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Same dtype, shape and bits (`torch.equal` takes -0.0 for 0.0)."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.detach().numpy(force=True).tobytes() == other.detach().numpy(force=True).tobytes()
        if one.dtype != torch.bfloat16
        else one.shape == other.shape
        and torch.equal(one.detach().view(torch.int16), other.detach().view(torch.int16))
    )


def adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of adapters, by their names in the state dict."""
    return {k: v.clone() for k, v in module.state_dict().items() if ".adapters." in k}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """True if both have the same names and values."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """As `same_state`, and says which names differ."""
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def assert_close_state(
    first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float
) -> None:
    """The same names, and values within an absolute and relative tolerance."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=tolerance, atol=tolerance, msg=key)


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bit_equal(found[name], tensor), name
