"""VeRA: peft's numbers, and one pair of matrices however many layers there are."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    adapter_state_dict,
    delete_adapter,
    inject_adapter,
    load_adapter_state_dict,
    scale_adapter,
    set_adapter,
)
from lora_lightning.adapters.vera import Projections, VeraConfig
from lora_lightning.engine.construction import BuildContext
from lora_lightning.engine.injection import extend_adapter
from lora_lightning.errors import AdapterStateError, ConfigError, RankError, TargetError
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
    "linear": lambda: Chain(first=nn.Linear(6, 9), proj=nn.Linear(9, 5), last=nn.Linear(5, 7)),
    "without-bias": lambda: Chain(first=nn.Linear(6, 4, bias=False), proj=nn.Linear(4, 9)),
    "conv1D": lambda: Chain(first=nn.Linear(6, 8), proj=Conv1D(5, 8)),
}
OPTIONS = {
    "plain": {},
    "other-key": {"projection_prng_key": 41},
    "dropout": {"vera_dropout": 0.4},
    "large-r": {"r": 20},
}


def ours(**options) -> VeraConfig:
    return VeraConfig(**{"target_modules": "all-linear", "r": 4, **options})


def theirs(**options) -> peft.VeraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"target_modules": ["first", "proj", "last"], "r": 4, **options}
        return peft.VeraConfig(**options)


def adapters(model: nn.Module, name: str = "default") -> list[nn.Module]:
    return [module.adapters[name] for module in model.children()]


def matrices(model: nn.Module) -> list[Projections]:
    return [module for module in model.modules() if isinstance(module, Projections)]


# -- against peft ------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_same_as_peft(net, options, saved, monkeypatch) -> None:
    options = {**options, "save_projection": saved}
    base, x = net().double(), torch.randn(4, 3, 6, dtype=torch.float64)
    if "vera_dropout" in options:  # the same elements, whatever else the two draw
        monkeypatch.setattr(
            nn.Dropout, "forward", lambda self, x: x * (x > 0) if self.training else x
        )
    assert_same_as_peft(base, ours(**options), theirs(**options), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matrices_and_start_are_those_of_peft(dtype) -> None:
    fresh, mine = pair(NETS["linear"]().to(dtype), ours(), theirs(), std=None)
    (found,) = matrices(mine)
    for name in ("vera_A", "vera_B"):
        expected = getattr(fresh.base_model, name)["default"]
        assert bit_equal(getattr(found, name), expected)
    for adapter in adapters(mine):
        assert (adapter.vera_lambda_b == 0).all()
        assert (adapter.vera_lambda_d == 0.1).all()


# -- explicit formulas -------------------------------------------------------------------------


def change(adapter: nn.Module, shared: Projections) -> Tensor:
    out, into = len(adapter.vera_lambda_b), adapter.spec.shape[1]
    b, d = adapter.vera_lambda_b.detach().diag(), adapter.vera_lambda_d.detach().diag()
    return b @ shared.vera_B[:out] @ d @ shared.vera_A[:, :into]


def test_mixes_with_lora_in_both_orders() -> None:
    base = Chain(proj=nn.Linear(6, 5)).double()
    x = torch.randn(3, 6, dtype=torch.float64)

    def dense(adapter: nn.Module, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight + change(adapter, adapter.projections), bias

    assert_mixes_with_lora(base, ours(target_modules=["proj"]), dense, x)


def test_two_of_them_have_matrices_of_their_own() -> None:
    """peft wants one seed for all; here each adapter keeps its own."""
    base = NETS["linear"]().double()
    model = copy.deepcopy(base)
    inject_adapter(model, ours(), "a")
    inject_adapter(model, ours(projection_prng_key=5, r=6, target_modules=["proj"]), "b")
    set_adapter(model, ["a", "b"])
    randomize(trainable(model).values())
    one, other = matrices(model)
    assert other.vera_A.shape == (6, 9)
    delta = change(model.proj.adapters["a"], one) + change(model.proj.adapters["b"], other)
    x = torch.randn(3, 9, dtype=torch.float64)
    close(model.proj(x), base.proj(x) + x @ delta.t())
    assert_merges(base, model, None, torch.randn(3, 6, dtype=torch.float64))


def test_a_scaled_update() -> None:
    base = NETS["linear"]().double()
    model = copy.deepcopy(base)
    inject_adapter(model, ours())
    randomize(trainable(model).values())
    x = torch.randn(3, 6, dtype=torch.float64)
    whole = model.first(x) - base.first(x)
    scale_adapter(model, "default", 0.5)
    close(model.first(x) - base.first(x), whole / 2)


# -- one pair of matrices ----------------------------------------------------------------------


def same_memory(model: nn.Module) -> bool:
    pairs = {
        (adapter.matrices(torch.device("cpu"))[0].data_ptr(), adapter.shared[0].vera_B.data_ptr())
        for adapter in adapters(model)
    }
    return len(pairs) == 1 and len(matrices(model)) == 1


def test_matrices_exist_once_whatever_is_done_to_the_model() -> None:
    model = NETS["linear"]()
    inject_adapter(model, ours())
    randomize(trainable(model).values())
    x = torch.randn(2, 6)
    y = model(x)
    assert same_memory(model)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).double().float(),
    ):
        assert same_memory(other)
        assert matrices(other)[0] is not matrices(model)[0]
        assert bit_equal(other(x), y)
    model.to(torch.bfloat16)
    assert same_memory(model)
    assert matrices(model)[0].vera_A.dtype == torch.float32  # as trained
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_meta_device_and_back() -> None:
    model = NETS["linear"]()
    inject_adapter(model, ours(save_projection=False))
    randomize(trainable(model).values())
    state = adapter_state_dict(model)
    assert not any("vera_A" in name for name in state)
    other = copy.deepcopy(model)
    delete_adapter(other, "default")
    inject_adapter(other, ours(save_projection=False), low_cpu_mem_usage=True)
    assert matrices(other)[0].vera_A.is_meta
    load_adapter_state_dict(other, state)
    assert same_memory(other)
    x = torch.randn(2, 6)
    assert bit_equal(other(x), model(x))


def test_matrices_come_from_the_state_where_they_are_saved() -> None:
    model = NETS["linear"]()
    inject_adapter(model, ours())
    state = adapter_state_dict(model)
    assert [name for name in state if "vera_A" in name] == ["first.projections.vera_A"]
    randomize(state.values())  # another torch may have drawn others
    other = copy.deepcopy(model)
    load_adapter_state_dict(other, state)
    x = torch.randn(2, 6)
    assert bit_equal(other(x), model(x))
    assert bit_equal(matrices(other)[0].vera_B, state["first.projections.vera_B"])


def test_matrices_go_with_the_adapter() -> None:
    model = NETS["linear"]()
    inject_adapter(model, ours())
    delete_adapter(model, "default")
    gc.collect()
    assert not matrices(model)
    assert list(model.state_dict()) == list(NETS["linear"]().state_dict())


def test_they_do_not_train_and_no_random_number_is_used_up() -> None:
    model = NETS["linear"]()
    before = torch.get_rng_state()
    inject_adapter(model, ours(), seed=0)
    assert bit_equal(torch.get_rng_state(), before)
    assert {name.rpartition(".")[2] for name in trainable(model)} == {
        "vera_lambda_b",
        "vera_lambda_d",
    }


def test_a_model_that_grows() -> None:
    model = Chain(first=nn.Linear(6, 9))
    extend_adapter(model, BuildContext(ours(), "default"))
    model.proj = nn.Linear(5, 7)
    extend_adapter(model, BuildContext(ours(), "default"))
    assert same_memory(model)
    model.last = nn.Linear(6, 3)
    extend_adapter(model, BuildContext(ours(), "default"))
    assert same_memory(model)
    model.wide = nn.Linear(5, 12)
    with pytest.raises(AdapterStateError, match="5 inputs and 12 outputs joins a VeRA adapter"):
        extend_adapter(model, BuildContext(ours(), "default"))
    assert type(model.wide) is nn.Linear


# -- start, precision, options -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_a_no_op_bit_for_bit(dtype) -> None:
    base = NETS["linear"]().to(dtype)
    model = copy.deepcopy(base)
    inject_adapter(model, ours())
    x = torch.randn(4, 6, dtype=dtype)
    assert bit_equal(model(x), base(x))
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


def test_random_start() -> None:
    model = NETS["linear"]()
    inject_adapter(model, ours(init_weights=False, r=500), seed=3)
    adapter = model.proj.adapters["default"]
    assert (adapter.vera_lambda_b == 1).all()
    assert 0.8 < adapter.vera_lambda_d.std() < 1.2


def test_autocast() -> None:
    model = NETS["linear"]()
    inject_adapter(model, ours())
    randomize(trainable(model).values())
    x = torch.randn(4, 6)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    assert_compiles(NETS["without-bias"](), ours(), torch.randn(4, 6))


def test_file_options_are_those_of_peft() -> None:
    options = ours(bias="lora_only").file_options()
    assert options["bias"] == "vera_only"
    assert VeraConfig.from_file_options(options) == ours(bias="lora_only")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0}, RankError, r"\(lora.r\)"),
        ({"vera_dropout": 1}, ConfigError, r"\(lora.vera_dropout\)"),
        ({"d_initial": 0}, ConfigError, r"\(lora.d_initial\)"),
        ({"projection_prng_key": "abc"}, ConfigError, r"'abc'; it is an integer"),
        ({"save_projection": 3}, ConfigError, r"\(lora.save_projection\)"),
        ({"target_modules": ["conv"]}, TargetError, "VERA"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(options, error, words) -> None:
    model = NETS["linear"]()
    model.conv = nn.Conv2d(3, 3, 3)
    with pytest.raises(error, match=words):
        inject_adapter(model, ours(**options))
    assert type(model.first) is nn.Linear
    assert model.first.weight.requires_grad
