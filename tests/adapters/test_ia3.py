"""(IA)^3: peft's numbers on what peft knows, an explicit formula on the rest."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import inject_adapter, scale_adapter
from lora_lightning.adapters.ia3 import Ia3Config
from lora_lightning.errors import AdapterStateError, ConfigError, TargetError
from tests.helpers.compared_with_peft import (
    Chain,
    assert_compiles,
    assert_merges,
    assert_mixes_with_lora,
    assert_same_as_peft,
    close,
    pair,
)
from tests.helpers.tensors import bit_equal, randomize, trainable

NETS = {
    "linear": (lambda: Chain(first=nn.Linear(6, 8), proj=nn.Linear(8, 5)), (4, 3, 6)),
    "without-bias": (
        lambda: Chain(first=nn.Linear(6, 8), proj=nn.Linear(8, 5, bias=False)),
        (4, 6),
    ),
    "conv1D": (lambda: Chain(first=nn.Linear(6, 8), proj=Conv1D(5, 8)), (4, 3, 6)),
    "conv2d": (
        lambda: Chain(first=nn.Conv2d(3, 6, 3), proj=nn.Conv2d(6, 4, (3, 2), stride=2, padding=1)),
        (2, 3, 9, 8),
    ),
    "conv2d-groups": (
        lambda: Chain(first=nn.Conv2d(3, 6, 3), proj=nn.Conv2d(6, 4, 3, groups=2, dilation=2)),
        (2, 3, 9, 8),
    ),
    "conv3d": (
        lambda: Chain(first=nn.Conv3d(2, 4, 1), proj=nn.Conv3d(4, 3, 2, groups=1)),
        (2, 2, 4, 3, 4),
    ),
}
FEEDFORWARD = {"outputs": [], "inputs": ["proj"], "regex": r"pr.*j"}


def ours(**options) -> Ia3Config:
    return Ia3Config(**{"target_modules": ["first", "proj"], **options})


def theirs(**options) -> peft.IA3Config:
    return peft.IA3Config(**{"target_modules": ["first", "proj"], **options})


@pytest.mark.parametrize("feedforward", FEEDFORWARD.values(), ids=FEEDFORWARD)
@pytest.mark.parametrize(("net", "shape"), NETS.values(), ids=NETS)
def test_same_as_peft(net, shape, feedforward) -> None:
    options = {"feedforward_modules": feedforward}
    x = torch.randn(shape, dtype=torch.float64)
    assert_same_as_peft(net().double(), ours(**options), theirs(**options), x)


@pytest.mark.parametrize("feedforward", [[], ["proj"]], ids=str)
def test_conv1d_and_circular_padding_which_peft_does_not_have(feedforward) -> None:
    base = Chain(proj=nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", groups=2)).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    model = copy.deepcopy(base)
    inject_adapter(model, ours(target_modules=["proj"], feedforward_modules=feedforward))
    randomize(trainable(model).values())
    factors = model.proj.adapters["default"].ia3_l.view(1, -1, 1)
    assert factors.shape[1] == (4 if feedforward else 6)
    expected = base.proj(x * factors) if feedforward else base.proj(x) * factors
    close(model(x), torch.tanh(expected))
    assert_merges(base, model, None, x)


@pytest.mark.parametrize("feedforward", [[], ["proj"]], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_mixes_with_lora_in_both_orders(kind, feedforward) -> None:
    conv = kind == "conv"
    base = Chain(proj=nn.Conv2d(4, 6, 3) if conv else nn.Linear(4, 6)).double()
    x = torch.randn((2, 4, 5, 6) if conv else (3, 4), dtype=torch.float64)
    config = ours(target_modules=["proj"], feedforward_modules=feedforward)

    def dense(adapter: nn.Module, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        factors = adapter.ia3_l.detach().flatten()
        if feedforward:
            return torch.einsum("oi...,i->oi...", weight, factors), bias
        return torch.einsum("oi...,o->oi...", weight, factors), bias * factors

    assert_mixes_with_lora(base, config, dense, x)


@pytest.mark.parametrize("feedforward", [[], ["proj"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_a_no_op_bit_for_bit(dtype, feedforward) -> None:
    base = NETS["conv2d"][0]().to(dtype)
    x = torch.randn(2, 3, 9, 8, dtype=dtype)
    model = copy.deepcopy(base)
    inject_adapter(model, ours(feedforward_modules=feedforward))
    assert bit_equal(model(x), base(x))
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


def test_factors_are_not_rounded_to_bfloat16() -> None:
    """Numbers next to 1 lie 1/128 apart there: 1.0115 would be 1.0078 or 1.0156."""
    base = Chain(proj=nn.Linear(256, 64, bias=False)).bfloat16()
    model = copy.deepcopy(base)
    inject_adapter(model, ours(target_modules=["proj"]))
    nn.init.constant_(model.proj.adapters["default"].ia3_l, 1.0115)
    x = torch.randn(64, 256).bfloat16()
    y, before = (net.proj(x).detach().float() for net in (model, base))
    assert ((y * before).sum() / before.square().sum()).item() == pytest.approx(1.0115, abs=1e-3)


def test_random_start() -> None:
    model = Chain(first=nn.Linear(50, 200), proj=nn.Linear(200, 50))
    inject_adapter(model, ours(init_ia3_weights=False), seed=3)
    values = torch.cat([p.detach().flatten() for p in trainable(model).values()])
    assert values.mean().abs() < 0.3
    assert 0.8 < values.std() < 1.2
    theirs_model, _ = pair(
        Chain(proj=nn.Linear(5, 4)),
        ours(target_modules=["proj"]),
        theirs(target_modules=["proj"], feedforward_modules=[]),
        std=None,
    )
    assert all((p == 1).all() for p in trainable(theirs_model).values())


def test_compiles_to_one_graph() -> None:
    base = Chain(first=nn.Linear(6, 8), proj=nn.Linear(8, 5)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_compiles(base, ours(feedforward_modules=["proj"]), x)


def test_names_mean_whole_parts_of_a_path() -> None:
    """peft takes "proj" for the end of "up_proj" too."""
    net = Chain(proj=nn.Linear(6, 8), up_proj=nn.Linear(8, 5))
    inject_adapter(net, ours(target_modules=["proj", "up_proj"], feedforward_modules=["proj"]))
    assert net.proj.adapters["default"].ia3_l.shape == (1, 6)
    assert net.up_proj.adapters["default"].ia3_l.shape == (5, 1)


def test_file_options_mean_the_same_to_peft() -> None:
    config = ours(feedforward_modules=["first"])
    options = config.file_options()
    assert options["feedforward_modules"] == r"(.*\.)?first"
    assert peft.IA3Config(feedforward_modules=options["feedforward_modules"]) is not None
    assert ours().file_options()["feedforward_modules"] == []
    assert Ia3Config.from_file_options(options).is_feedforward("layers.0.first")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"feedforward_modules": ["prj"]},
            TargetError,
            r"feedforward_modules 'prj' fits none of the 2 adapted modules \(first, proj\). Did you "
            r"mean 'proj'\? Its modules must be among target_modules. \(lora.feedforward_modules\)",
        ),
        ({"feedforward_modules": "pro("}, ConfigError, "no regular expression"),
        ({"init_ia3_weights": "ones"}, ConfigError, r"\(lora.init_ia3_weights\)"),
        (
            {"feedforward_modules": "mlp"},
            TargetError,
            r"feedforward_modules 'mlp' fits none of the 2 adapted modules \(first, proj\)",
        ),
        (
            {"target_modules": "all-linear", "feedforward_modules": ["mlp"]},
            TargetError,
            "fits none of the 2 adapted modules",
        ),
        ({"target_modules": ["first", "table"]}, TargetError, "IA3"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(options, error, words) -> None:
    model = Chain(first=nn.Linear(6, 8), proj=nn.Linear(8, 5))
    model.table = nn.Embedding(4, 3)
    with pytest.raises(error, match=words):
        inject_adapter(model, ours(**options))
    assert type(model.first) is nn.Linear
    assert model.first.weight.requires_grad


def test_has_no_scaling() -> None:
    model = Chain(first=nn.Linear(6, 8), proj=nn.Linear(8, 5))
    inject_adapter(model, ours())
    with pytest.raises(AdapterStateError, match="has no scaling"):
        scale_adapter(model, "default", 0.5)
