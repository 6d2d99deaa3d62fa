"""Adapters that nothing calls: a word at the first step, and in `adapter_status`."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import (
    LoraConfig,
    adapter_status,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    set_adapter,
)
from lora_lightning.engine import first_step


@pytest.fixture(autouse=True)
def nobody_else_is_watched() -> None:
    """Models of earlier tests may be waiting for the garbage collector."""
    first_step._watched.clear()


class ReadsPast(nn.Module):
    """`used` is called, the weight of `read` is read past it, `never` is not part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read, self.never = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.read.weight)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Make a step; what was said in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
    return [str(warning.message) for warning in caught]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)


def test_the_first_step_names_what_had_no_gradient() -> None:
    model = nn.ModuleDict({"net": ReadsPast()})
    model.forward = lambda x: model["net"](x)  # type: ignore[method-assign]
    inject_adapter(model, LoraConfig(r=2))
    optimizer = optimizer_of(model)
    (text,) = step(model, optimizer)
    assert text.startswith(
        "2 of 3 adapted modules had no gradient in the first training step (net.read, net.never)"
    )
    assert "exclude_modules: [read, never]. (lora.exclude_modules)" in text
    assert step(model, optimizer) == []
    assert not first_step._hooks  # no cost from now on


def test_nothing_is_said_where_all_are_reached() -> None:
    model = ReadsPast()
    inject_adapter(model, LoraConfig(r=2, target_modules=["used"]))
    assert step(model, optimizer_of(model)) == []
    model = ReadsPast()
    inject_adapter(model, LoraConfig(r=2, exclude_modules=["read", "never"]))
    assert step(model, optimizer_of(model)) == []


def test_two_optimizers_each_speak_of_what_they_step() -> None:
    """The critic's step is not the generator's."""
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    inject_adapter(model, LoraConfig(r=2))
    first, second = optimizer_of(model["one"]), optimizer_of(model["two"])
    assert step(model["one"], first) == []
    assert step(model["two"], second) == []


def test_steps_of_other_models_are_not_looked_at() -> None:
    model, other = ReadsPast(), nn.Linear(4, 4)
    inject_adapter(model, LoraConfig(r=2))
    assert step(other, torch.optim.SGD(other.parameters(), 0.1)) == []
    assert len(step(model, optimizer_of(model))) == 1
    gone = ReadsPast()
    inject_adapter(gone, LoraConfig(r=2))
    del gone
    gc.collect()
    step(other, torch.optim.SGD(other.parameters(), 0.1))
    assert not first_step._hooks


def test_a_step_with_a_closure() -> None:
    model = ReadsPast()
    inject_adapter(model, LoraConfig(r=2))
    optimizer = optimizer_of(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(3, 4)).square().mean()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"2 of 3 adapted modules had no gradient"):
        optimizer.step(closure)


def test_status_names_what_was_not_called() -> None:
    model = ReadsPast()
    inject_adapter(model, LoraConfig(r=2))
    assert adapter_status(model).idle == []  # nothing ran so far
    with disable_adapter(model):
        model(torch.randn(3, 4))
    assert adapter_status(model).idle == []
    model(torch.randn(3, 4))
    status = adapter_status(model)
    assert status.idle == ["read", "never"]
    assert "adapted, but not called so far: read, never" in str(status)
    assert adapter_status(copy.deepcopy(model)).idle == ["read", "never"]
    model.never(torch.randn(3, 4))
    assert adapter_status(model).idle == ["read"]


def test_status_of_merged_and_of_attentions() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapter(model, LoraConfig(r=2))
    merge_adapter(model)
    model(torch.randn(3, 4))
    assert adapter_status(model).idle == []  # what is merged acts without being called
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    inject_adapter(layer, LoraConfig(r=2, target_modules="all-layers"))
    layer(torch.randn(3, 1, 4))
    assert adapter_status(layer).idle == []


def test_compiled_code_is_not_watched() -> None:
    model = ReadsPast()
    inject_adapter(model, LoraConfig(r=2))
    model.used.compile(backend="eager")
    model(torch.randn(3, 4))
    model.never(torch.randn(3, 4))
    assert adapter_status(model).idle == []


def test_what_is_in_eval_mode_does_not_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    inject_adapter(model, LoraConfig(r=2))
    inject_adapter(model, LoraConfig(r=2), "other")
    set_adapter(model, "other")

    def cells() -> list[list[str]]:
        return [line.split() for line in str(adapter_status(model)).replace("│", " ").splitlines()]

    assert ["0", "Linear", "default", "LoraAdapter", "inactive", "no", "16"] in cells()
    eval_mode = ["not", "in", "eval", "mode"]
    assert ["0", "Linear", "other", "LoraAdapter", "active", *eval_mode, "16"] in cells()
    model.train()
    assert ["0", "Linear", "other", "LoraAdapter", "active", "yes", "16"] in cells()
    set_adapter(model, "other", trainable=False)
    assert ["0", "Linear", "other", "LoraAdapter", "active", "no", "16"] in cells()


def test_a_forward_that_was_compiled_by_itself_is_none_that_never_ran() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapter(model, LoraConfig(r=2, target_modules=["0", "1"]))
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    model(torch.randn(2, 4))
    assert adapter_status(model).idle == []
