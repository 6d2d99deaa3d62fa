"""OFT: peft's numbers where peft is right, an explicit rotation elsewhere."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    LoraConfig,
    inject_adapter,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.adapters.oft import OftAdapter, OftConfig
from lora_lightning.errors import ConfigError, RankError
from tests.helpers.compared_with_peft import (
    Chain,
    assert_compiles,
    assert_merges,
    assert_mixes_with_lora,
    assert_same_as_peft,
    close,
    gradients,
    pair,
)
from tests.helpers.tensors import bit_equal, randomize, trainable

pytestmark = pytest.mark.filterwarnings("ignore:.*does not divide")

NETS = {
    "linear": (lambda: Chain(first=nn.Linear(8, 12), proj=nn.Linear(12, 5)), (4, 3, 8)),
    "without-bias": (
        lambda: Chain(first=nn.Linear(8, 12, bias=False), proj=nn.Linear(12, 4)),
        (4, 8),
    ),
    "conv-1x1": (
        lambda: Chain(first=nn.Conv2d(8, 12, 1, stride=2), proj=nn.Conv2d(12, 5, 1, padding=1)),
        (2, 8, 6, 5),
    ),
}
OPTIONS = {
    "blocks-of-4": {"oft_block_size": 4},
    "two-blocks": {"r": 2, "oft_block_size": 0},
    "adjusted": {"oft_block_size": 5},
    "too-large": {},
    "adjusted-r": {"r": 3, "oft_block_size": 0},
    "exact": {"oft_block_size": 4, "use_cayley_neumann": False},
    **{f"{n}-terms": {"oft_block_size": 4, "num_cayley_neumann_terms": n} for n in range(2, 8)},
    "shared": {"oft_block_size": 4, "block_share": True},
    "shared-exact": {"r": 2, "oft_block_size": 0, "block_share": True, "use_cayley_neumann": False},
    "constrained": {"oft_block_size": 4, "coft": True, "eps": 0.2},
    "constrained-shared": {"oft_block_size": 4, "coft": True, "eps": 0.5, "block_share": True},
    "constrained-loosely": {"oft_block_size": 4, "coft": True, "eps": 50.0},
}


def ours(**options) -> OftConfig:
    return OftConfig(**{"target_modules": ["first", "proj"], **options})


def theirs(**options) -> peft.OFTConfig:
    return peft.OFTConfig(**{"target_modules": ["first", "proj"], **options})


def rotation_of(turn: Tensor) -> Tensor:
    return torch.block_diag(*turn.detach()) + torch.eye(turn.shape[0] * turn.shape[1]).double()


def rotation(adapter: OftAdapter) -> Tensor:
    """R, dense, from its definition."""
    config = adapter.config
    blocks = []
    stored = adapter.oft_R.detach().double()
    for values in stored if len(stored) > 1 else stored.expand(adapter.blocks, -1):
        q = torch.zeros(adapter.size, adapter.size, dtype=torch.float64)
        upper = [(i, j) for i in range(adapter.size) for j in range(i + 1, adapter.size)]
        for (i, j), value in zip(upper, values, strict=True):
            q[i, j], q[j, i] = value, -value
        one = torch.eye(adapter.size, dtype=torch.float64)
        if config.use_cayley_neumann:
            powers = [torch.linalg.matrix_power(q, k) for k in range(5)]
            blocks.append(powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + powers[4])
        else:
            blocks.append((one - q) @ torch.linalg.inv(one + q))
    return torch.block_diag(*blocks)


# -- against peft ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("net", "shape"), NETS.values(), ids=NETS)
def test_same_as_peft(net, shape, options) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    assert_same_as_peft(net().double(), ours(**options), theirs(**options), x)


@pytest.mark.parametrize("options", [{"oft_block_size": 4}, {"r": 3, "oft_block_size": 0}], ids=str)
def test_embedding_same_as_peft(options) -> None:
    base = Chain(proj=nn.Embedding(7, 12, padding_idx=2)).double()
    options = {"target_modules": ["proj"], **options}
    assert_same_as_peft(base, ours(**options), theirs(**options), torch.arange(14).view(2, 7) % 7)


@pytest.mark.parametrize("options", [{}, {"use_cayley_neumann": False}, {"block_share": True}])
def test_larger_kernel_merges_as_in_peft_and_starts_as_a_no_op_unlike_there(options) -> None:
    base = Chain(proj=nn.Conv2d(4, 6, 3, padding=1)).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    options = {"target_modules": ["proj"], "oft_block_size": 6, **options}
    fresh, mine = pair(base, ours(**options), theirs(**options), std=None)
    assert bit_equal(mine(x), base(x))
    assert (fresh(x) - base(x)).abs().max() > 0.1  # overlapping patches, added up
    theirs_model, mine = pair(base, ours(**options), theirs(**options))
    assert_merges(base, mine, theirs_model, x)


def test_constraint_trains_as_in_peft() -> None:
    base = Chain(first=nn.Linear(8, 12), proj=nn.Linear(12, 5)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    options = {"oft_block_size": 4, "coft": True, "eps": 0.1}
    models = pair(base, ours(**options), theirs(**options))
    for model in models:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.05)
        for _ in range(4):
            gradients(model, x)
            optimizer.step()
    for expected, found in zip(*(trainable(model).values() for model in models), strict=True):
        close(found, expected)
    before = copy.deepcopy(models[1].state_dict())
    merge_adapter(models[1])
    unmerge_adapter(models[1])
    models[1].eval()(x)
    assert all(bit_equal(t, before[name]) for name, t in models[1].state_dict().items())


# -- explicit formulas -------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_transformers_conv1d_and_the_definition(exact) -> None:
    base = Chain(proj=Conv1D(5, 12)).double()
    model = copy.deepcopy(base)
    config = ours(target_modules=["proj"], oft_block_size=4, use_cayley_neumann=not exact)
    inject_adapter(model, config)
    randomize(trainable(model).values(), 0.2)
    r = rotation(model.proj.adapters["default"])
    if exact:
        close(r @ r.t(), torch.eye(12, dtype=torch.float64))
    x = torch.randn(3, 12, dtype=torch.float64)
    close(model(x), torch.tanh(base.proj(x @ r)))
    assert_merges(base, model, None, x)


CONVS = {
    "1d-circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 7)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2, padding=1), (2, 4, 9, 8)),
    "2d-groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5)),
    "2d-groups-1x1": (lambda: nn.Conv2d(8, 6, 1, groups=2), (2, 8, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 2, 3, 4, 3)),
    "2d-unbatched": (lambda: nn.Conv2d(8, 6, 1), (8, 5, 5)),
}


@pytest.mark.parametrize(("conv", "shape"), CONVS.values(), ids=CONVS)
def test_convolutions_have_their_kernel_rotated(conv, shape) -> None:
    base = Chain(proj=conv()).double()
    model = copy.deepcopy(base)
    inject_adapter(model, ours(target_modules=["proj"], oft_block_size=4))
    randomize(trainable(model).values(), 0.2)
    x = torch.randn(shape, dtype=torch.float64)
    expected = copy.deepcopy(base)
    with torch.no_grad():
        expected.proj.weight.copy_(
            rotated(model.proj.adapters["default"], base.proj.weight, base.proj.groups)
        )
    close(model(x), expected(x))
    assert_merges(base, model, None, x)


def rotated(adapter: OftAdapter, weight: Tensor, groups: int = 1) -> Tensor:
    r = rotation(adapter).to(weight)
    size = len(r) // groups
    parts = [
        part.flatten(1) @ r[g * size : (g + 1) * size, g * size : (g + 1) * size].t()
        for g, part in enumerate(weight.detach().chunk(groups))
    ]
    return torch.cat(parts).view_as(weight)


@pytest.mark.parametrize("kind", ["linear", "conv-1x1", "conv-3x3"])
def test_mixes_with_lora_in_both_orders(kind) -> None:
    module = {
        "linear": lambda: nn.Linear(8, 6),
        "conv-1x1": lambda: nn.Conv2d(8, 6, 1),
        "conv-3x3": lambda: nn.Conv2d(8, 6, 3, padding=1),
    }[kind]
    base = Chain(proj=module()).double()
    x = torch.randn((3, 8) if kind == "linear" else (2, 8, 5, 6), dtype=torch.float64)
    config = ours(target_modules=["proj"], oft_block_size=4)
    assert_mixes_with_lora(base, config, lambda a, w, b: (rotated(a, w), b), x)


def test_mixes_with_a_trained_copy_below() -> None:
    base = Chain(proj=nn.Conv2d(4, 6, 3), last=nn.Conv2d(6, 2, 1)).double()
    model = copy.deepcopy(base)
    inject_adapter(model, LoraConfig(r=1, target_modules=["last"], modules_to_save=["proj"]), "a")
    inject_adapter(model, ours(target_modules=["proj"], oft_block_size=4), "b")
    set_adapter(model, ["a", "b"])
    randomize(trainable(model).values(), 0.2)
    saved = model.proj.adapters["a"].module
    weight = rotated(model.proj.adapters["b"], saved.weight)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    close(model.proj(x), nn.functional.conv2d(x, weight, saved.bias))


def test_block_dropout_keeps_some_blocks_from_rotating_in_training() -> None:
    """peft makes the dropout, but never calls it."""
    base = Chain(proj=nn.Linear(400, 3, bias=False)).double()
    model = copy.deepcopy(base)
    inject_adapter(model, ours(target_modules=["proj"], oft_block_size=2, module_dropout=0.3))
    randomize(trainable(model).values(), 0.2)
    adapter = model.proj.adapters["default"]
    full = adapter.eval().turn()
    turn = adapter.train().forward_turn()
    dropped = (turn == 0).all(dim=2).all(dim=1)
    assert 0.15 < dropped.double().mean() < 0.45
    assert bit_equal(turn[~dropped], full[~dropped])
    assert not bit_equal(adapter.forward_turn(), turn)  # others each time
    merge_adapter(model)  # all of them, also in training
    close(model.proj.weight, base.proj.weight @ rotation_of(full).t())


# -- start, precision, compilation -------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_a_no_op_bit_for_bit(dtype, exact) -> None:
    base = Chain(first=nn.Linear(8, 12), proj=nn.Linear(12, 5)).to(dtype)
    model = copy.deepcopy(base)
    inject_adapter(model, ours(oft_block_size=4, use_cayley_neumann=not exact))
    x = torch.randn(4, 8, dtype=dtype)
    assert bit_equal(model(x), base(x))
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


def test_small_rotations_survive_bfloat16() -> None:
    """cos(0.05) is 1 in bfloat16: an R rounded as a whole would not keep lengths."""
    base = Chain(proj=nn.Linear(64, 64, bias=False)).bfloat16()
    nn.init.eye_(base.proj.weight)
    inject_adapter(base, ours(target_modules=["proj"], oft_block_size=2, use_cayley_neumann=False))
    nn.init.constant_(base.proj.adapters["default"].oft_R, 0.05)
    x = torch.randn(512, 64).bfloat16()
    y = base.proj(x).detach().float()
    assert (y.norm() / x.float().norm()).item() == pytest.approx(1, abs=2e-4)


def test_autocast_makes_the_rotation_in_float32() -> None:
    model = Chain(proj=nn.Linear(32, 4))
    inject_adapter(model, ours(target_modules=["proj"], use_cayley_neumann=False))
    randomize(trainable(model).values(), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turn = model.proj.adapters["default"].turn()
        y = model.proj(torch.randn(3, 32))
    assert turn.dtype == torch.float32
    r = turn[0] + torch.eye(32)
    torch.testing.assert_close(r @ r.t(), torch.eye(32), atol=1e-5, rtol=0)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow)  # test_compile.py has one of each type
        for kind in ("linear", "linear-constrained", "conv")
    ],
)
def test_compiles_to_one_graph(kind) -> None:
    conv = kind == "conv"
    extra = {"coft": True, "eps": 0.1, "use_cayley_neumann": False} if "-" in kind else {}
    base = Chain(proj=nn.Conv2d(4, 6, 3) if conv else nn.Linear(8, 6)).double()
    x = torch.randn((2, 4, 5, 6) if conv else (3, 8), dtype=torch.float64)
    assert_compiles(base, ours(target_modules=["proj"], oft_block_size=4, **extra), x)


def test_random_start() -> None:
    model = Chain(proj=nn.Linear(640, 3))
    inject_adapter(model, ours(target_modules=["proj"], init_weights=False), seed=3)
    (values,) = trainable(model).values()
    assert 0.09 < values.std() < 0.11


# -- what is said ------------------------------------------------------------------------------


def test_an_adjusted_size_is_told() -> None:
    model = Chain(first=nn.Linear(8, 12), proj=nn.Linear(12, 5))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        inject_adapter(model, ours(oft_block_size=5))
    assert [str(w.message) for w in told] == [
        "oft_block_size=5 does not divide 8, the width of an adapted layer: 4 is used there. "
        "(lora.oft_block_size)",
        "oft_block_size=5 does not divide 12, the width of an adapted layer: 4 is used there. "
        "(lora.oft_block_size)",
    ]
    assert "r=2, oft_block_size=4" in repr(model)


def test_file_options_are_those_of_peft() -> None:
    options = ours(bias="lora_only").file_options()
    assert options["bias"] == "oft_only"
    assert OftConfig.from_file_options(
        {key: value for key, value in options.items() if key != "peft_version"}
    ) == ours(bias="lora_only")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of other meanings in older versions
        peft.OFTConfig.from_peft_type(**options, peft_type="OFT")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 8}, ConfigError, r"r=8 and oft_block_size=32: .*exactly one"),
        ({"oft_block_size": 0}, ConfigError, r"\(lora.oft_block_size\)"),
        ({"oft_block_size": -4}, ConfigError, "exactly one"),
        ({"num_cayley_neumann_terms": 1}, ConfigError, "at least 2: the first term alone"),
        ({"module_dropout": 1.0}, ConfigError, r"\(lora.module_dropout\)"),
        ({"eps": 0}, ConfigError, r"\(lora.eps\)"),
        ({"coft": "yes"}, ConfigError, r"\(lora.coft\)"),
        (
            {"target_modules": ["prime"], "oft_block_size": 2},
            RankError,
            r"'prime' \(weight \(2, 7\)\) reads 7 values; blocks of 1",
        ),
        (
            {"target_modules": ["grouped"], "oft_block_size": 8},
            RankError,
            r"'grouped' has 2 groups that read 36 values each, which blocks of 8 do not divide",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(options, error, words) -> None:
    model = nn.Module()
    model.first, model.proj = nn.Linear(8, 8), nn.Linear(8, 8)
    model.prime, model.grouped = nn.Linear(7, 2), nn.Conv2d(8, 8, 3, groups=2)
    with pytest.raises(error, match=words):
        inject_adapter(model, ours(**options))
    assert type(model.grouped) is nn.Conv2d
    assert model.first.weight.requires_grad
