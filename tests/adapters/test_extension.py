"""The worked example of CONTRIBUTING is complete: an adapter type in one piece of code."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning import (
    LoraCallback,
    LoraConfig,
    adapter_state_dict,
    inject_adapter,
    load_adapter,
    merge_adapter,
    register_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.errors import ConfigError
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.markdown import recipe
from tests.helpers.tensors import bit_equal, randomize


@pytest.fixture(scope="session")  # a type can be registered once in a process
def example() -> dict[str, Any]:
    code = recipe("## A new adapter type")
    assert len(code.splitlines()) < 60
    module = types.ModuleType("example")
    sys.modules["example"] = module  # where dataclasses look their annotations up
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    return module.__dict__


def test_it_runs_merges_mixes_and_saves(example: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    model = copy.deepcopy(base)
    x = torch.randn(3, 6, dtype=torch.float64)
    inject_adapter(model, example["GainConfig"](strength=2.0), "gain")
    assert bit_equal(model(x), base(x))
    inject_adapter(model, LoraConfig(r=2), "lora")
    set_adapter(model, ["gain", "lora"])
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    gain, lora = adapter_state_dict(model, "gain"), adapter_state_dict(model, "lora")
    factor = 1 + 2 * gain["0.gain_g"]
    weight = factor[:, None] * base[0].weight + 4 * lora["0.lora_B"] @ lora["0.lora_A"]
    expected = x @ weight.t() + factor * base[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    unmerge_adapter(model)
    save_adapter(model, tmp_path, ["gain", "lora"])
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    set_adapter(again, ["gain", "lora"])
    assert bit_equal(again(x), model(x))


def test_it_trains_and_resumes_in_lightning(example: dict[str, Any], tmp_path: Path) -> None:
    module = Net()
    trainer = make_trainer(tmp_path, LoraCallback(example["GainConfig"]()))
    trainer.fit(module, Data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trained = adapter_state_dict(module)
    assert all(tensor.any() for tensor in trained.values())
    again = Net()
    load_adapter(again, tmp_path / "x.ckpt")
    assert all(bit_equal(t, adapter_state_dict(again)[k]) for k, t in trained.items())


def test_two_types_cannot_share_a_name(example: dict[str, Any]) -> None:
    class Other(example["GainConfig"]):
        pass

    with pytest.raises(ConfigError, match="GAIN"):
        register_adapter(Other, {})


def test_an_unregistered_config_is_refused(example: dict[str, Any]) -> None:
    class Unknown(LoraConfig):
        peft_type = "UNKNOWN"

    with pytest.raises(ConfigError, match="register_adapter"):
        inject_adapter(nn.Sequential(nn.Linear(3, 3)), Unknown(r=1))
