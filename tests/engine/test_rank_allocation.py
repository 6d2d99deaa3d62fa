"""The allocation of ranks without Lightning: every step as that of peft's allocator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import nn

from lora_lightning import inject_adapter
from lora_lightning.adapters.adalora import AdaLoraConfig
from lora_lightning.engine.rank_allocation import RankAllocator, adalora_adapters
from lora_lightning.errors import AdapterMismatchError, ConfigError
from tests.helpers.adalora_of_peft import adalora_pair, short_name
from tests.helpers.tensors import assert_close_state, randomize, trainable
from tests.helpers.torch_models import OneLayerNet


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"tinit": 3, "tfinal": 4, "deltaT": 2},
        {"tinit": 5, "tfinal": 1, "deltaT": 3, "beta1": 0.6, "beta2": 0.9},
    ],
)
def test_every_step_is_that_of_pefts_allocator(schedule: dict[str, Any]) -> None:
    theirs, ours = adalora_pair(OneLayerNet("linear").double(), **schedule)
    config = adalora_adapters(ours)["layers.0.proj"].config
    allocator = RankAllocator(adalora_adapters(ours), config, 15)
    oracle = PeftAllocator(theirs.base_model.model, theirs.peft_config["default"], "default")
    fallen, optimizers = set(), []
    for model in (theirs, ours):
        optimizers.append(torch.optim.Adam(trainable(model).values(), lr=0.1))
    for step in range(1, 16):
        x = torch.randn(4, 6, dtype=torch.float64)
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert allocator.budget(step) == oracle.budget_schedule(step)[0]
        theirs.base_model.update_and_allocate(step)  # the way it is documented
        oracle = theirs.base_model.rankallocator
        allocator.step()
        for name, p in theirs.base_model.model.named_parameters():
            if ".lora_" in name:
                own = allocator.sensitivity.get(short_name(name))
                assert (own is None) == (name not in oracle.exp_avg_ipt)
                if own is not None:
                    torch.testing.assert_close(
                        own, oracle.exp_avg_ipt[name], rtol=1e-10, atol=1e-10
                    )
                    torch.testing.assert_close(
                        allocator.uncertainty[short_name(name)],
                        oracle.exp_avg_unc[name],
                        rtol=1e-10,
                        atol=1e-10,
                    )
                path, tensor = short_name(name).rsplit(".", 1)
                torch.testing.assert_close(
                    getattr(allocator.adapters[path], tensor), p, rtol=1e-10, atol=1e-10
                )
        pattern = theirs.peft_config["default"].rank_pattern or {}
        masks = {path: mask.tolist() for path, mask in allocator.masks.items()}
        assert masks == {short_name(key).removesuffix(".lora_E"): m for key, m in pattern.items()}
        fallen.add(sum(sum(mask) for mask in masks.values()))
    assert allocator.settled
    assert sum(sum(mask) for mask in masks.values()) == 4
    assert len(fallen) > 2


def test_orthogonality_is_pefts_loss_term() -> None:
    theirs, ours = adalora_pair(OneLayerNet("conv1d").double(), orth_reg_weight=0.7)
    x = torch.randn(4, 6, dtype=torch.float64)
    inner = theirs.base_model.model
    forward = inner.forward
    inner.forward = lambda x: SimpleNamespace(loss=forward(x).square().mean())
    theirs.base_model(x).loss.backward()  # PeftModel's own forward goes past the loss term
    ours(x).square().mean().backward()
    RankAllocator(adalora_adapters(ours), AdaLoraConfig(orth_reg_weight=0.7), 1).add_orthogonality()
    grads = [{short_name(n): p.grad for n, p in trainable(m).items()} for m in (theirs, ours)]
    assert_close_state(*grads, 1e-10)


def test_orthogonality_of_orthogonal_vectors_and_of_a_skipped_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2))
    adapter = model[0].adapters["default"]
    allocator = RankAllocator(adalora_adapters(model), adapter.config, 9)
    allocator.add_orthogonality()
    assert all(p.grad is None for p in adapter.parameters())
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(4))
    adapter.lora_E.grad = torch.zeros(4, 1)
    allocator.add_orthogonality()
    assert torch.equal(adapter.lora_A.grad, torch.zeros(4, 4))  # and not NaN
    assert adapter.lora_B.grad.abs().max() > 0


def test_a_budget_that_does_not_fall_and_a_module_that_is_never_called() -> None:
    """Where peft's kthvalue fails (k = 0), and its `p * p.grad` (None)."""
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=4), "full")
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2), "less")
    for name, left in (("full", {"used": 4, "idle": 4}), ("less", {"used": 4, "idle": 0})):
        adapters = adalora_adapters(model, name)
        randomize(p for adapter in adapters.values() for p in adapter.parameters())
        for p in adapters["used"].parameters():
            p.grad = torch.randn_like(p)
        allocator = RankAllocator(adapters, adapters["used"].config, 3)
        for _ in range(3):
            allocator.step()
        assert {path: int(mask.sum()) for path, mask in allocator.masks.items()} == left


def test_state_of_other_adapters_is_refused() -> None:
    allocators = []
    for width in (8, 6):
        model = nn.Sequential(nn.Linear(width, 8))
        inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2))
        randomize(trainable(model).values())
        model(torch.randn(3, width)).sum().backward()
        allocator = RankAllocator(adalora_adapters(model), AdaLoraConfig(init_r=4, target_r=2), 5)
        allocator.step()
        allocators.append(allocator)
    with pytest.raises(AdapterMismatchError, match=r"sensitivity of shape \(4, 8\) for '0.lora_A'"):
        allocators[1].load_state(allocators[0].state())
    with pytest.raises(ConfigError, match=r"\(lora.total_step\)"):
        RankAllocator({}, AdaLoraConfig())
