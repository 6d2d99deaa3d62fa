"""`load_state_dict` while adapters are merged: what is loaded is the base, and stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import inject_adapter, merge_adapter, unload, unmerge_adapter
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.oft import OftConfig
from tests.helpers.tensors import randomize, trainable


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.split = nn.MultiheadAttention(6, 2, batch_first=True, kdim=6, vdim=6)
        self.lin = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.mT).mT
        x = x + self.mha(x, x, x)[0]
        return self.lin(x + self.split(x, x, x)[0])


IDS = torch.arange(10).reshape(2, 5) % 7
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(
        r=2, target_modules=["embed", "conv", "mha", "split", "lin"], lora_bias=False
    ),
    "dora": LoraConfig(r=2, target_modules=["lin"], use_dora=True),
    "oft": OftConfig(oft_block_size=2, target_modules=["lin"]),
    "bias": LoraConfig(r=2, target_modules=["lin", "conv"], lora_bias=True),
}


def adapted(config: AdapterConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Net().double().eval()
    inject_adapter(net, config)
    torch.manual_seed(1)
    randomize(trainable(net).values(), 0.3)
    return net


def base(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Net().double().state_dict()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_that_is_loaded_into_merged_weights_stays(name: str, assign: bool) -> None:
    net, new = adapted(CONFIGS[name]), base(5)
    expected = adapted(CONFIGS[name])
    expected.load_state_dict(copy.deepcopy(new), strict=False)
    merge_adapter(net)
    net.load_state_dict(copy.deepcopy(new), strict=False, assign=assign)
    torch.testing.assert_close(net(IDS), expected(IDS))  # still merged, into the new base
    assert not torch.equal(net.lin.weight, new["lin.weight"])
    unmerge_adapter(net)
    state = net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in new.items())
    torch.testing.assert_close(net(IDS), expected(IDS))
    unload(net)
    assert not any(module._load_state_dict_post_hooks for module in net.modules())


def test_adapters_that_come_with_it_are_merged() -> None:
    net, other = adapted(CONFIGS["lora"]), adapted(CONFIGS["lora"], seed=5)
    randomize(trainable(other).values(), 0.5)
    merge_adapter(net)
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(net(IDS), other(IDS))
    unmerge_adapter(net)
    torch.testing.assert_close(net(IDS), other(IDS), rtol=0, atol=0)


def test_a_part_of_a_base() -> None:
    net, new = adapted(CONFIGS["lora"]), base(5)
    merge_adapter(net)
    net.load_state_dict({"lin.weight": new["lin.weight"]}, strict=False)
    unmerge_adapter(net)
    old = base(0)
    for key, value in net.state_dict().items():
        if key in old:
            assert torch.equal(value, (new if key == "lin.weight" else old)[key]), key


def test_of_one_module_alone() -> None:
    net: Any = adapted(CONFIGS["lora"])
    merge_adapter(net)
    weight = torch.ones(6, 6, dtype=torch.float64)
    net.lin.load_state_dict({"weight": weight}, strict=False)
    unmerge_adapter(net)
    assert torch.equal(net.lin.weight, weight)


def test_the_state_of_merged_weights_goes_there_and_back() -> None:
    """It holds the merged values under the base's names: they are not taken for another base."""
    net = adapted(CONFIGS["lora"])
    merge_adapter(net)
    merged = copy.deepcopy(net.state_dict())
    expected = net(IDS)
    net.load_state_dict(merged)
    assert torch.equal(net(IDS), expected)
    unmerge_adapter(net)
    old = base(0)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in old.items())
