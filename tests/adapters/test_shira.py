"""SHiRA: peft's numbers, and both ways to compute the sparse product."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    adapter_state_dict,
    inject_adapter,
    load_adapter_state_dict,
    merge_adapter,
    scale_adapter,
)
from lora_lightning.adapters.shira import ShiraConfig, SparseProduct
from lora_lightning.errors import ConfigError, RankError, TargetError
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

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # peft's sparse tensors


def ours(**options) -> ShiraConfig:
    return ShiraConfig(**{"target_modules": ["first", "proj"], "r": 1, **options})


def theirs(**options) -> peft.ShiraConfig:
    return peft.ShiraConfig(**{"target_modules": ["first", "proj"], "r": 1, **options})


# Few of 36 x 40 entries train: a sparse product; most of 6 x 8: a dense one.
SIZES = {"sparse": (36, 40, 44), "dense": (6, 8, 5)}


def chain(size: str, bias: bool = True) -> Chain:
    a, b, c = SIZES[size]
    return Chain(first=nn.Linear(a, b, bias=bias), proj=nn.Linear(b, c)).double()


def example(size: str) -> Tensor:
    return torch.randn(4, 3, SIZES[size][0], dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", [None, 7], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_same_as_peft(size, seed, bias) -> None:
    base = chain(size, bias)
    fresh, mine = pair(base, ours(random_seed=seed), theirs(random_seed=seed), std=None)
    assert mine.first.adapters["default"]._product_is_sparse(example(size)) == (size == "sparse")
    for name in ("first", "proj"):  # the same random choice
        indices = fresh.base_model.model.get_submodule(name).shira_indices["default"]
        assert bit_equal(mine.get_submodule(name).adapters["default"].shira_indices, indices)
    options = {"random_seed": seed}
    assert_same_as_peft(base, ours(**options), theirs(**options), example(size))


def every_third(base_layer: nn.Module, r: int, **_) -> Tensor:
    mask = torch.zeros_like(base_layer.weight)
    mask.view(-1)[: 3 * r * sum(mask.shape) : 3] = 1
    return mask


def every_third_of(weight: Tensor, r: int) -> Tensor:
    layer = nn.Module()
    layer.weight = weight
    return every_third(layer, r)


def largest(weight: Tensor, r: int) -> Tensor:
    least = weight.abs().flatten().topk(r * sum(weight.shape)).values[-1]
    return weight.abs() >= least


def test_mask_of_a_function_same_as_peft() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the function is still to come
        config = theirs(mask_type="third")
    config.mask_fn = every_third
    mine = ours(mask_type="third", mask_fn=every_third_of)
    assert_same_as_peft(chain("sparse"), mine, config, example("sparse"))


def test_mask_from_the_weight() -> None:
    base = chain("sparse")
    model = copy.deepcopy(base)
    inject_adapter(model, ours(mask_type="largest", mask_fn=largest))
    rows, columns = model.proj.adapters["default"].shira_indices.long()
    expected = base.proj.weight.detach().abs().flatten().sort().values[-84:]
    close(base.proj.weight.detach()[rows, columns].abs().sort().values, expected)
    x = example("sparse")
    assert bit_equal(model(x), base(x))


def test_transformers_conv1d() -> None:
    base = Chain(proj=Conv1D(40, 36)).double()
    model = copy.deepcopy(base)
    inject_adapter(model, ours(target_modules=["proj"]))
    randomize(trainable(model).values())
    adapter = model.proj.adapters["default"]
    dense = torch.zeros(40, 36, dtype=torch.float64)
    for (row, column), value in zip(adapter.shira_indices.t(), adapter.shira_weight, strict=True):
        dense[row, column] = value.detach()
    x = torch.randn(3, 36, dtype=torch.float64)
    close(model(x), torch.tanh(base.proj(x) + x @ dense.t()))
    assert_merges(base, model, None, x)


@pytest.mark.parametrize("size", SIZES)
def test_mixes_with_lora_in_both_orders(size) -> None:
    base = Chain(proj=chain(size).first)

    def dense(adapter: nn.Module, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.clone()
        for (i, j), value in zip(adapter.shira_indices.t(), adapter.shira_weight, strict=True):
            weight[i, j] += value.detach()
        return weight, bias

    assert_mixes_with_lora(base, ours(target_modules=["proj"]), dense, example(size))


# -- the sparse product ------------------------------------------------------------------------


def sparse_problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(5, 7, dtype=dtype, requires_grad=True)
    values = torch.randn(6, dtype=dtype, requires_grad=True)
    flat = torch.randperm(4 * 7)[:6].sort().values  # rows without any entry among them
    return x, values, torch.stack([flat // 7, flat % 7]).int()


def test_gradients_of_the_sparse_product() -> None:
    x, values, indices = sparse_problem()
    product = lambda x, v: SparseProduct.apply(x, v, indices, (4, 7))  # noqa: E731
    torch.autograd.gradcheck(product, (x, values))
    torch.autograd.gradgradcheck(product, (x, values))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "values"])
def test_only_wanted_gradients_are_computed(wanted) -> None:
    x, values, indices = sparse_problem()
    x.requires_grad_(wanted[0])
    values.requires_grad_(wanted[1])
    y = SparseProduct.apply(x, values, indices, (4, 7))
    y.square().sum().backward()
    dense = torch.zeros(4, 7, dtype=torch.float64)
    dense[tuple(indices.long())] = values.detach()
    close(y.detach(), x.detach() @ dense.t())
    if wanted[0]:
        close(x.grad, 2 * y.detach() @ dense)
    else:
        close(values.grad, (2 * y.detach().t() @ x)[tuple(indices.long())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sparse_and_dense_products_agree(dtype, monkeypatch) -> None:
    base = chain("sparse").to(dtype)
    inject_adapter(base, ours())
    randomize(trainable(base).values())
    x = example("sparse").to(dtype)
    y, found = base(x), gradients(base, x)
    monkeypatch.setattr("lora_lightning.adapters.shira.SPARSE_SHARE", 0)
    assert not base.first.adapters["default"]._product_is_sparse(x)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(y, base(x), atol=tolerance, rtol=tolerance)
    for name, gradient in gradients(base, x).items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm()
        assert gradient.dtype == torch.float32


def test_autocast() -> None:
    model = chain("sparse").float()
    inject_adapter(model, ours())
    randomize(trainable(model).values())
    x = example("sparse").float()
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.1)


def test_entries_of_a_file_in_any_order() -> None:
    model = chain("sparse")
    inject_adapter(model, ours())
    randomize(trainable(model).values())
    x = example("sparse")
    y = model(x)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    for name in ("first", "proj"):
        shuffled = torch.randperm(len(state[f"{name}.shira_weight"]))
        for tensor in ("shira_weight", "shira_indices"):
            state[f"{name}.{tensor}"] = state[f"{name}.{tensor}"][..., shuffled]
    load_adapter_state_dict(model, state)
    assert not model.first.adapters["default"]._product_is_sparse(x)
    close(model(x), y)


@pytest.mark.parametrize("shape", [(36,), (2, 36), (2, 3, 4, 36), (0, 36)], ids=str)
def test_inputs_of_any_number_of_dimensions(shape) -> None:
    base = Chain(proj=chain("sparse").first)
    model = copy.deepcopy(base)
    inject_adapter(model, ours(target_modules=["proj"]))
    randomize(trainable(model).values())
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    merge_adapter(model)
    close(y, model(x))


# -- start, options, state ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_starts_as_a_no_op_bit_for_bit(size, dtype) -> None:
    base = chain(size).to(dtype)
    model = copy.deepcopy(base)
    inject_adapter(model, ours())
    x = example(size).to(dtype)
    assert bit_equal(model(x), base(x))
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


def test_entries_stay_integers_and_are_saved() -> None:
    model = chain("sparse")
    inject_adapter(model, ours(random_seed=3, init_weights=False))
    state = adapter_state_dict(model)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "first.shira_weight": (76,),
        "first.shira_indices": (2, 76),
        "proj.shira_weight": (84,),
        "proj.shira_indices": (2, 84),
    }
    assert state["proj.shira_weight"].std() > 0.5
    model.to(torch.bfloat16)
    assert model.proj.adapters["default"].shira_indices.dtype == torch.int32
    other = chain("sparse")
    inject_adapter(other, ours(random_seed=4), low_cpu_mem_usage=True)
    load_adapter_state_dict(other, state)
    assert bit_equal(adapter_state_dict(other)["proj.shira_indices"], state["proj.shira_indices"])


def test_a_scaled_update() -> None:
    base = chain("sparse")
    model = copy.deepcopy(base)
    inject_adapter(model, ours(target_modules=["proj"]))
    randomize(trainable(model).values())
    x = torch.randn(3, 40, dtype=torch.float64)
    change = model.proj(x) - base.proj(x)
    scale_adapter(model, "default", 0.5)
    close(model.proj(x) - base.proj(x), change / 2)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    assert_compiles(chain("sparse"), ours(), example("sparse"))


def test_a_function_is_no_plain_value() -> None:
    config = ours(mask_type="largest", mask_fn=largest)
    options = config.to_dict()
    assert "mask_fn" not in options
    assert ShiraConfig.from_dict(options) == ours()  # the choice itself is in the tensors
    assert pickle.loads(pickle.dumps(config)) == config
    model = chain("sparse")
    inject_adapter(model, config)
    other = chain("sparse")
    inject_adapter(other, ShiraConfig.from_dict(options))
    load_adapter_state_dict(other, adapter_state_dict(model))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0}, RankError, r"\(lora.r\)"),
        (
            {"r": 4},
            RankError,
            r"r=4 asks for 56 entries of 'first', whose weight \(8, 6\) has 48: at most r=3 fits",
        ),
        ({"mask_type": "largest"}, ConfigError, r"any other needs one. \(lora.mask_fn\)"),
        ({"mask_fn": largest}, ConfigError, "a random choice takes no function"),
        (
            {"mask_type": "all", "mask_fn": lambda w, r: torch.ones_like(w)},
            ConfigError,
            r"mask_fn chooses 48 entries in a mask of shape \(8, 6\) for 'first'; it should be 14",
        ),
        (
            {"mask_type": "flat", "mask_fn": lambda w, r: torch.ones(r * sum(w.shape))},
            ConfigError,
            r"mask of shape \(14,\) for 'first'; .* of the weight's \(8, 6\)",
        ),
        ({"target_modules": ["conv"]}, TargetError, "SHIRA"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(options, error, words) -> None:
    model = chain("dense")
    model.conv = nn.Conv2d(3, 3, 3)
    with pytest.raises(error, match=words):
        inject_adapter(model, ours(**options))
    assert type(model.first) is nn.Linear
    assert model.first.weight.requires_grad
