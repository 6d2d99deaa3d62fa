"""Size, singular values and rank of updates, against dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import LoraConfig, inject_adapter, merge_adapter
from lora_lightning.engine.update_spectrum import (
    copy_change,
    dense_singular_values,
    energy_rank,
    entropy_rank,
    low_rank_singular_values,
    update_spectra,
)
from lora_lightning.layers.traversal import named_adapted_layers
from tests.helpers.adapter_types import Net, adapted_by_us, net

LOW_RANK = ["lora", "rslora", "dora", "pissa", "adalora", "vera"]
DENSE = ["loha", "lokr", "oft", "shira", "ia3"]
KINDS = ["linear", "conv1D", "embed", "conv2d"]
NOT_THERE = {("embed", t) for t in ("pissa", "adalora", "vera", "loha", "lokr", "shira", "ia3")} | {
    ("conv2d", t) for t in ("pissa", "vera", "shira")
}


def moved(model: nn.Module) -> nn.Module:
    """All that trains, moved by as much as it is large."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def change_by_merging(model: Net) -> tuple[Tensor, Tensor]:
    (_, layer), *_ = named_adapted_layers(model)
    before = layer.base_weight().detach().clone()
    merge_adapter(model)
    return before, layer.dense_weight().detach() - before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOW_RANK + DENSE)
def test_against_what_merging_adds(name: str, kind: str) -> None:
    if (kind, name) in NOT_THERE:
        return
    model = adapted_by_us(net(kind, torch.float64), name)
    (_, layer), *_ = named_adapted_layers(moved(model))
    found = update_spectra(layer, "default")["weight"]
    before, change = change_by_merging(model)
    assert found.norm == pytest.approx(float(change.norm()), rel=1e-6)
    assert found.relative == pytest.approx(float(change.norm() / before.norm()), rel=1e-6)
    assert found.moved
    assert found.low_rank == (name in LOW_RANK)
    if name != "dora":  # the magnitudes give it full rank; its values are those of B A
        dense = torch.linalg.svdvals(change.flatten(1))
        several = min(len(dense), len(found.values))
        torch.testing.assert_close(found.values[:several], dense[:several], rtol=1e-6, atol=1e-6)
        assert float(dense[several:].abs().sum()) < 1e-6


def test_dora_has_the_values_of_b_a() -> None:
    model = adapted_by_us(net("linear", torch.float64), "dora")
    (_, layer), *_ = named_adapted_layers(moved(model))
    adapter = layer.adapters["default"].by_weight()["weight"]
    product = adapter.scaling * adapter.lora_B @ adapter.lora_A
    dense = torch.linalg.svdvals(product)
    found = update_spectra(layer, "default")["weight"]
    torch.testing.assert_close(found.values, dense[:4].detach())
    assert found.limit == 4


def test_a_grouped_convolution_reads_all_channels() -> None:
    model = adapted_by_us(net("grouped", torch.float64), "lora")
    (_, layer), *_ = named_adapted_layers(moved(model))
    adapter = layer.adapters["default"].by_weight()["weight"]
    a, b = adapter.lora_A.flatten(1), adapter.lora_B.flatten(1)
    dense = torch.cat([b[:4] @ a[:2], b[4:] @ a[2:]]) * adapter.scaling
    dense = dense.detach()
    found = update_spectra(layer, "default")["weight"]
    torch.testing.assert_close(found.values, torch.linalg.svdvals(dense)[:4])
    assert found.norm == pytest.approx(float(dense.norm()))


def test_experts_are_taken_together() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64)
    b = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    dense = torch.linalg.svdvals(0.5 * b @ a)[:, :2]
    found = low_rank_singular_values(a, b, 0.5)
    torch.testing.assert_close(found, dense.square().sum(0).sqrt())
    assert float(found.norm()) == pytest.approx(float((0.5 * b @ a).norm()))


def test_a_rank_above_the_weights_own() -> None:
    a, b = torch.randn(9, 4), torch.randn(5, 9)
    found = low_rank_singular_values(a, b)
    torch.testing.assert_close(found, torch.linalg.svdvals(b.double() @ a.double()))


def test_what_never_moved() -> None:
    for name in ("lora", "pissa", "dora", "adalora", "oft", "ia3"):
        model = adapted_by_us(net("linear", torch.float32), name)
        (_, layer), *_ = named_adapted_layers(model)
        found = update_spectra(layer, "default")["weight"]
        assert not found.moved, name
        assert (found.used_rank, found.entropy_rank) == (0, 0.0), name
        (_, layer), *_ = named_adapted_layers(moved(model))
        assert update_spectra(layer, "default")["weight"].moved, name


def test_ranks_by_hand() -> None:
    values = torch.tensor([3.0, 1.0, 0.1])  # squares 9, 1, 0.01: shares 0.899, 0.0999, 0.001
    assert energy_rank(values) == 2
    assert energy_rank(values, 0.89) == 1
    assert energy_rank(values, 0.9999) == 3
    assert energy_rank(torch.ones(100)) == 99
    assert energy_rank(torch.zeros(4)) == 0
    p = [3 / 4.1, 1 / 4.1, 0.1 / 4.1]
    assert entropy_rank(values) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))
    assert entropy_rank(torch.ones(16)) == pytest.approx(16)
    assert entropy_rank(torch.zeros(4)) == 0


def test_rows_and_columns_of_zeros_change_nothing() -> None:
    delta = torch.zeros(50, 20, dtype=torch.float64)
    delta[3, 4:9], delta[40, 2:6] = torch.randn(5), torch.randn(4)
    dense = torch.linalg.svdvals(delta)
    torch.testing.assert_close(dense_singular_values(delta), dense[:2])
    assert dense_singular_values(torch.zeros(3, 3)).tolist() == [0]


def test_what_trains_in_full() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    old = {name: p.detach().clone() for name, p in model["head"].named_parameters()}
    inject_adapter(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    layers = dict(named_adapted_layers(moved(model)))
    new = {name: p.detach() for name, p in layers["head"].named_parameters() if name in old}
    change = math.sqrt(sum(float((new[n] - old[n]).square().sum()) for n in old))
    size = math.sqrt(sum(float(old[n].square().sum()) for n in old))
    assert copy_change(layers["head"], "default") == pytest.approx((change, size), rel=1e-5)
    assert change > 0
    assert copy_change(layers["body"], "default") is None
    assert update_spectra(layers["head"], "default") == {}
