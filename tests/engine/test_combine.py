"""Weighted combinations of adapters: peft's numbers where peft is right, dense formulas elsewhere."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import peft
import peft.utils.merge_utils as theirs
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    active_adapters,
    adapter_names,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    set_adapter,
)
from lora_lightning.adapters import registry
from lora_lightning.adapters.base import AdapterSpec, DeltaAdapter
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.engine import task_arithmetic as ours_module
from lora_lightning.engine.combine import add_weighted_adapter
from lora_lightning.engine.task_arithmetic import (
    elected_sign,
    magnitude_prune,
    merge_task_vectors,
    random_prune,
    sum_of_products,
    truncated_product,
    truncated_svd,
)
from lora_lightning.errors import AdapterStateError, ConfigError, LoraError, RankError
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters
from tests.helpers.tensors import bit_equal, randomize

WEIGHTS = [0.75, -0.5, 1.25]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# -- task vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("merge", ["linear", "magnitude_prune", "ties"])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_merges_as_peft_does(merge, sign, density):
    vectors = [randn(5, 8, seed=i) for i in range(3)]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = {
        "linear": lambda: theirs.task_arithmetic(vectors, weights),
        "magnitude_prune": lambda: theirs.magnitude_prune(vectors, weights, density),
        "ties": lambda: theirs.ties(vectors, weights, density, sign),
    }[merge]()
    ours = merge_task_vectors(vectors, WEIGHTS, merge, density=density, majority_sign_method=sign)
    close(ours, expected)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("merge", ["dare_linear", "dare_ties"])
def test_dare_merges_as_peft_does_with_the_same_masks(merge, sign, monkeypatch):
    vectors = [randn(5, 8, seed=i) for i in range(3)]
    pruned = [random_prune(v, 0.4, torch.Generator().manual_seed(i)) for i, v in enumerate(vectors)]
    remaining = iter(pruned)
    monkeypatch.setattr(theirs, "prune", lambda *args, **kwargs: next(remaining))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    options = (sign,) if merge == "dare_ties" else ()
    expected = getattr(theirs, merge)(vectors, weights, 0.4, *options)
    ours = merge_task_vectors(
        vectors,
        WEIGHTS,
        merge,
        density=0.4,
        majority_sign_method=sign,
        generators=[torch.Generator().manual_seed(i) for i in range(3)],
    )
    close(ours, expected)


def test_ties_is_the_algorithm_of_the_paper():
    """Trim, elect, disjoint mean, entry by entry in plain Python (arXiv:2306.01708, Algorithm 1)."""
    vectors = [randn(30, seed=i).tolist() for i in range(4)]
    trimmed = []
    for vector in vectors:
        threshold = sorted(map(abs, vector), reverse=True)[int(0.3 * 30) - 1]
        trimmed.append([x if abs(x) >= threshold else 0.0 for x in vector])
    expected = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [x for x in entries if x * sign > 0]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    ours = merge_task_vectors([torch.tensor(v) for v in vectors], [1.0] * 4, "ties", density=0.3)
    close(ours, torch.tensor(expected), 1e-6)


def test_the_sign_of_the_sum_and_of_the_majority_differ():
    stacked = torch.tensor([[3.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    assert elected_sign(stacked, "total").tolist() == [1, 1, 1]
    assert elected_sign(stacked, "frequency").tolist() == [-1, 1, 1]


def test_magnitude_pruning_keeps_the_largest_and_only_them():
    tensor = torch.tensor([[1.0, -5.0], [3.0, -2.0]])
    assert magnitude_prune(tensor, 0.5).tolist() == [[0.0, -5.0], [3.0, 0.0]]
    assert magnitude_prune(tensor, 0.7).tolist() == [[0.0, -5.0], [3.0, 0.0]]
    assert torch.equal(magnitude_prune(tensor, 1.0), tensor)


def test_random_pruning_keeps_the_share_and_the_mean():
    tensor = randn(400, 500) + 1
    pruned = random_prune(tensor, 0.2, torch.Generator().manual_seed(1))
    kept = pruned != 0
    close(pruned[kept], tensor[kept] / 0.2)
    n = tensor.numel()
    assert abs(kept.double().mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)
    # Each entry has variance x^2 (1 - p) / p around x (arXiv:2311.03099, its expectation).
    spread = math.sqrt(tensor.square().mean() * 0.8 / 0.2 / n)
    assert abs(pruned.mean() - tensor.mean()) < 4 * spread
    assert torch.equal(random_prune(tensor, 1.0, torch.Generator()), tensor)


# -- products of low rank ------------------------------------------------------------------------

# out, in, ranks: a few columns; more than the matrix has; exactly as many; one group of a batch.
SIZES = [(9, 7, (2, 3)), (4, 9, (3, 3)), (9, 4, (3, 3)), (5, 8, (2, 3)), (6, 6, (1,))]


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize(("out", "in_", "ranks"), SIZES)
def test_products_add_up_exactly(out, in_, ranks, batch):
    bs = [randn(*batch, out, r, seed=r) for r in ranks]
    as_ = [randn(*batch, r, in_, seed=10 + r) for r in ranks]
    b, a = sum_of_products(bs, as_)
    assert a.shape[-2] == b.shape[-1] == min(sum(ranks), out, in_)
    close(b @ a, sum(b @ a for b, a in zip(bs, as_, strict=True)))


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize(("out", "in_", "r"), [(12, 10, 4), (10, 12, 4), (12, 10, 2), (5, 4, 4)])
def test_truncation_is_the_best_approximation(out, in_, r, rank, batch):
    b, a = randn(*batch, out, r, seed=1), randn(*batch, r, in_, seed=2)
    us, vh = truncated_product(b, a, rank)
    assert us.shape == (*batch, out, rank)
    assert vh.shape == (*batch, rank, in_)
    # The error is what the singular values beyond `rank` say, by Eckart and Young.
    singular = torch.linalg.svdvals(b @ a)
    error = torch.linalg.matrix_norm(us @ vh - b @ a)
    close(error, singular[..., rank:].square().sum(-1).sqrt(), 1e-10)
    # U S has orthogonal columns of the lengths S, and V^T orthonormal rows.
    close(us.mT @ us, torch.diag_embed(singular[..., :rank].square()), 1e-10)
    close(vh @ vh.mT, torch.eye(rank, dtype=vh.dtype).expand(*batch, rank, rank), 1e-10)


def test_truncation_of_a_thin_product_forms_no_dense_matrix():
    seen = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            found = result if isinstance(result, (tuple, list)) else (result,)
            seen.extend(x.numel() for x in found if isinstance(x, Tensor))
            return result

    b, a = randn(200, 4), randn(4, 300)
    with Sizes():
        truncated_product(b, a, 2)
    assert max(seen) <= 300 * 4


# -- adapters of a model -------------------------------------------------------------------------

INPUTS = {
    "linear": (4, 6),
    "conv1d": (4, 6),
    "conv_1": (2, 4, 9),
    "conv_2": (2, 4, 7, 7),
    "conv_3": (2, 4, 4, 4, 4),
    "grouped": (2, 4, 7, 7),
    "proj": (4, 6),
    "trunk.proj": (4, 6),
}
EVERY = ["embed", *INPUTS]


class Zoo(nn.Module):
    """One module of each kind; adapters are compared module by module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.linear = nn.Linear(6, 8)
        self.conv1d = Conv1D(8, 6)
        self.conv_1 = nn.Conv1d(4, 6, 3)
        self.conv_2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="circular")
        self.conv_3 = nn.Conv3d(4, 6, 2, dilation=2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.proj = nn.Linear(6, 6)
        self.trunk = nn.Sequential(OrderedDict(proj=nn.Linear(6, 6)))
        self.head = nn.Linear(8, 3)


def zoo(**configs: dict) -> nn.Module:
    """A float64 Zoo with LoRA adapters of these names and options, filled with random values."""
    model = Zoo().double()
    for name, options in configs.items():
        inject_adapter(model, LoraConfig(**{"r": 2, "target_modules": EVERY[:-1], **options}), name)
        randomize(p for key, p in named_parameters(model) if f".adapters.{name}." in key)
    return model


def module(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def output(model: nn.Module, path: str, *names: str) -> Tensor:
    """What the adapters `names` together add to the output of one module."""
    if path == "embed":
        x = torch.arange(11)
    else:
        x = randn(*INPUTS[path], seed=7)
    before = active_adapters(model)
    with disable_adapter(model):
        base = module(model, path)(x)
    set_adapter(model, list(names))
    try:
        return (module(model, path)(x) - base).detach()
    finally:
        set_adapter(model, before)


def weighted_outputs(model: nn.Module, path: str, weights: dict[str, float]) -> Tensor:
    """The weighted sum of what the adapters on `path` add to its output."""
    on = [name for name in weights if name in module(model, path).adapters]
    return sum(weights[name] * output(model, path, name) for name in on)


def paths_with(model: nn.Module, name: str) -> list[str]:
    return [path for path, layer in named_adapted_layers(model) if name in layer.adapters]


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"conv_2": 4, "embed": 3},
        "alpha_pattern": {"linear": 5, "conv_3": 7},
    },
    "other-modules": {"target_modules": ["linear", "grouped", "trunk.proj"], "r": 4},
    "lora-bias": {"lora_bias": True, "target_modules": EVERY[1:-1]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["linear", "conv1d"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cat_is_the_exact_sum_on_every_kind_of_module(options):
    bias = {"target_modules": EVERY[1:-1]} if options.get("lora_bias") else {}
    model = zoo(a={"lora_alpha": 5, **bias}, b=options, c={"r": 4, "use_rslora": True, **bias})
    weights = {"a": 0.75, "b": -1.5, "c": 0.3}
    add_weighted_adapter(model, list(weights), list(weights.values()), "new", "cat")
    assert paths_with(model, "new") == [
        path
        for path, layer in named_adapted_layers(model)
        if {"a", "b", "c"} & layer.adapters.keys()
    ]
    for path in paths_with(model, "new"):
        expected = weighted_outputs(model, path, weights)
        assert expected.abs().max() > 0.1
        close(output(model, path, "new"), expected)


def test_cat_of_more_than_the_size_of_a_layer_is_exact_and_fits():
    model = zoo(a={"r": 4}, b={"r": 4}, c={"r": 4})
    add_weighted_adapter(model, ["a", "b", "c"], [1, 2, -3], "new", "cat")
    ranks = {path: module(model, path).adapters["new"].r for path in paths_with(model, "new")}
    assert ranks["linear"] == 6  # not 12: (8, 6) has no more
    assert ranks["conv_2"] == 8  # not 12: 8 channels
    for path in ranks:
        close(output(model, path, "new"), weighted_outputs(model, path, {"a": 1, "b": 2, "c": -3}))


def test_cat_on_groups_of_few_inputs_and_many_outputs():
    model = nn.Sequential(nn.Conv1d(2, 12, 1, groups=2)).double()
    for name in ("a", "b"):
        inject_adapter(model, LoraConfig(r=2, target_modules=["0"]), name)
    randomize(model[0].adapters.parameters())
    x = randn(1, 2, 5)
    with disable_adapter(model):
        base = model(x)
    set_adapter(model, ["a", "b"])
    both = model(x) - base
    add_weighted_adapter(model, ["a", "b"], [1, 1], "new", "cat")
    set_adapter(model, "new")
    close((model(x) - base).detach(), both.detach())


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}], ids=["packed", "separate"])
@pytest.mark.parametrize("combination", ["cat", "svd", "linear", "ties_svd"])
def test_every_projection_of_an_attention(combination, sizes):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, **sizes)}).double()
    for name in ("a", "b"):
        config = LoraConfig(r=2, target_modules=["attn"], use_rslora=name == "b", lora_alpha=2)
        inject_adapter(model, config, name)
    randomize(model["attn"].adapters.parameters())
    density = 0.5 if "ties" in combination else None
    add_weighted_adapter(model, ["a", "b"], [0.5, -2.0], "new", combination, density=density)
    adapters = model["attn"].adapters
    parts = [name for name, _ in adapters["new"].named_children()]
    assert len(parts) == (3 if sizes else 1)
    for part in parts:
        a, b, new = (adapters[name].by_weight()[part] for name in ("a", "b", "new"))
        updates = [dense(a), dense(b)]
        if combination == "ties_svd":
            total = merge_task_vectors(updates, [0.5, -2.0], "ties", density=0.5)
        else:
            total = 0.5 * updates[0] - 2.0 * updates[1]
        if combination == "linear":  # b's scaling is sqrt(2)
            root = math.sqrt(2.0 * math.sqrt(2.0))
            summed_a = math.sqrt(0.5) * a.lora_A - root * b.lora_A
            close(
                dense(new)[0], ((math.sqrt(0.5) * a.lora_B + root * b.lora_B) @ summed_a).detach()
            )
        elif combination == "cat":
            close(dense(new), total)
        else:
            b, a = truncated_svd(total, 2)
            close(dense(new), b @ a, 1e-10)


def test_start_values_can_double_the_rank_beyond_the_size_of_a_layer():
    model = zoo(a={"r": 4, "init_lora_weights": "pissa", "target_modules": ["linear"]})
    add_weighted_adapter(model, ["a"], [-2], "new", "linear")
    assert model.linear.adapters["new"].r == 6  # not 8
    close(output(model, "linear", "new"), weighted_outputs(model, "linear", {"a": -2}))


def test_weights_multiply_the_adapter_as_it_acts_at_present():
    model = zoo(a={}, b={})
    for _, layer in named_adapted_layers(model):
        layer.adapters["a"].set_scaling(0.3)
    add_weighted_adapter(model, ["a", "b"], [0.5, 2.0], "new", "cat")
    for path in paths_with(model, "new"):
        close(output(model, path, "new"), weighted_outputs(model, path, {"a": 0.5, "b": 2.0}))


@pytest.mark.parametrize("svd_rank", [None, 2, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_svd_is_the_best_approximation_of_the_sum(options, svd_rank):
    bias = {"target_modules": EVERY[1:-1]} if options.get("lora_bias") else {}
    model = zoo(a={"lora_alpha": 5, **bias}, b=options)
    add_weighted_adapter(model, ["a", "b"], [0.75, -1.5], "new", svd_rank=svd_rank)
    for path in paths_with(model, "new"):
        adapters = module(model, path).adapters
        on = [(adapters[n], w) for n, w in (("a", 0.75), ("b", -1.5)) if n in adapters]
        total = sum(w * dense(adapter) for adapter, w in on)
        wanted = svd_rank or max(adapter.factors()[0].shape[0] for adapter, _ in on)
        groups = total.shape[0]
        rank = min(wanted // groups, *total.shape[1:])
        new = adapters["new"]
        assert (new.r, new.scaling) == (rank * groups, 1)
        singular = torch.linalg.svdvals(total)
        error = torch.linalg.matrix_norm(dense(new) - total)
        close(error, singular[:, rank:].square().sum(-1).sqrt(), 1e-10)


def dense(adapter: nn.Module) -> Tensor:
    """scaling * B A by group: (groups, out / groups, in)."""
    a, b = (tensor.detach() for tensor in adapter.factors())
    groups = getattr(adapter, "groups", 1)
    parts = zip(a.chunk(groups), b.chunk(groups), strict=True)
    return torch.stack([adapter.scaling * (b @ a) for a, b in parts])


MERGES = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
PRUNED = MERGES[1:]
COMBINATIONS = ["cat", "svd", *MERGES, *(f"{merge}_svd" for merge in PRUNED)]


def content_prune(tensor: Tensor, density: float, *args, **kwargs) -> Tensor:
    """Stands for random pruning in both libraries: what is kept depends on the entry itself."""
    return tensor * ((tensor * 1000).frac().abs() < density) / density


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("weights", [(0.125, 1.125), (0.5, -2.0)], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_same_adapter_as_peft(combination, weights, sign, monkeypatch):
    """On every kind for which peft has the operation (its SVD knows Conv2d alone).

    scaling is 2, and the weights are such that their roots are exact: peft holds them in fp32.
    """
    if sign == "frequency" and "ties" not in combination:
        return  # the same as "total"
    if "dare" in combination:
        monkeypatch.setattr(theirs, "prune", content_prune)
        monkeypatch.setattr(ours_module, "random_prune", content_prune)
    targets = ["embed", "linear", "conv1d", "conv_2"]
    if not combination.endswith("svd"):
        targets += ["conv_1", "conv_3"]
    a = {"target_modules": targets, "lora_alpha": 4}
    b = {"target_modules": targets[1:], "lora_alpha": 4}
    model = zoo(a=a, b=b)
    their_model = peft_beside(model, a=a, b=b)
    options = {"combination_type": combination, "majority_sign_method": sign}
    if combination.removesuffix("_svd") in PRUNED:
        options["density"] = 0.6
    add_weighted_adapter(model, ["a", "b"], weights, "new", **options)
    their_model.add_weighted_adapter(["a", "b"], list(weights), "new", **options)
    for path in targets:
        layer = module(their_model.base_model.model, path)
        expected = layer.get_delta_weight("new").detach()
        expected = expected.t() if path == "conv1d" else expected
        assert expected.abs().max() > 0.05
        close(module(model, path).adapters["new"].delta_weight().detach(), expected, 1e-10)


def peft_model(base: nn.Module, options: dict, name: str) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out for Conv1D
        if not isinstance(base, peft.PeftModel):
            return peft.get_peft_model(base, peft.LoraConfig(**options), name)
        base.add_adapter(name, peft.LoraConfig(**options))
        return base


def peft_beside(model: nn.Module, **configs: dict) -> peft.PeftModel:
    """A peft model with the same adapters and values."""
    theirs_model = None
    for name, options in configs.items():
        theirs_model = peft_model(
            Zoo().double() if theirs_model is None else theirs_model, {"r": 2, **options}, name
        )
        for path in paths_with(model, name):
            mine, layer = (
                module(model, path).adapters[name],
                module(theirs_model.base_model.model, path),
            )
            for tensor, value in mine.named_parameters():
                held = getattr(layer, tensor)[name]
                getattr(held, "weight", held).data.copy_(value)
    return theirs_model


@pytest.mark.parametrize("merge", PRUNED)
def test_dense_merges_on_every_kind_and_whatever_the_ranks(merge, monkeypatch):
    monkeypatch.setattr(ours_module, "random_prune", content_prune)
    model = zoo(a={"use_rslora": True}, b={"r": 4}, c={"target_modules": ["linear"]})
    add_weighted_adapter(
        model, ["a", "b", "c"], [0.5, -1.0, 2.0], "new", f"{merge}_svd", svd_rank=100, density=0.5
    )
    for path in paths_with(model, "new"):
        adapters = module(model, path).adapters
        on = {n: w for n, w in (("a", 0.5), ("b", -1.0), ("c", 2.0)) if n in adapters}
        expected = merge_task_vectors(
            [dense(adapters[name]) for name in on],
            list(on.values()),
            merge,
            density=0.5,
            generators=[torch.Generator()] * len(on),
        )
        close(dense(adapters["new"]), expected, 1e-10)


def test_rslora_does_not_scale_the_result():
    """peft 0.21.2 gives sqrt(r) times the sum: it keeps use_rslora with alpha = r."""
    options = {"target_modules": ["linear"], "use_rslora": True}
    model = zoo(a=options, b=options)
    their_model = peft_beside(model, a=options, b=options)
    add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "new", "cat")
    their_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    adapters = model.linear.adapters
    right = (adapters["a"].delta_weight() + adapters["b"].delta_weight()).detach()
    close(adapters["new"].delta_weight().detach(), right)
    close(their_model.base_model.model.linear.get_delta_weight("new").detach(), 2 * right)


def test_clamping_cuts_both_factors_at_one_quantile():
    model = zoo(a={"target_modules": ["linear"]}, b={"target_modules": ["linear"]})
    add_weighted_adapter(model, ["a", "b"], [1, 1], "free")
    add_weighted_adapter(model, ["a", "b"], [1, 1], "clamped", svd_clamp=0.9)
    add_weighted_adapter(model, ["a", "b"], [1, 1], "whole", svd_clamp=1)
    free, clamped, whole = (
        torch.cat([t.detach().flatten() for t in model.linear.adapters[name].factors()])
        for name in ("free", "clamped", "whole")
    )
    limit = clamped.abs().max()
    close(clamped, free.clamp(-limit, limit))
    both = torch.cat([free, -free])
    assert abs((both <= limit).double().mean() - 0.9) <= 1 / len(free)
    assert torch.equal(whole, free)


def test_dare_depends_on_seed_and_names_alone():
    def combined(seed: int | None, new: str = "new") -> Tensor:
        add_weighted_adapter(model, ["a", "b"], [1, 1], new, "dare_linear", density=0.5, seed=seed)
        return model.linear.adapters[new].delta_weight().detach()

    model = zoo(a={"target_modules": ["linear"]}, b={"target_modules": ["linear"]})
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = combined(None, "first")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(combined(3, "second"), first)
    assert not torch.equal(combined(4, "third"), first)
    torch.manual_seed(4)
    assert not torch.equal(combined(None, "fourth"), first)


def test_dare_chooses_anew_for_every_tensor():
    model = zoo(a={"target_modules": ["proj"]})  # fits trunk.proj too
    add_weighted_adapter(model, ["a"], [1], "new", "dare_linear", density=0.5)
    one, other = (module(model, path).adapters["new"] for path in ("proj", "trunk.proj"))
    choices = [one.lora_A != 0, one.lora_B.t() != 0, other.lora_A != 0]
    assert choices[0].shape == choices[1].shape
    assert len({str(choice) for choice in choices}) == 3


def test_the_new_adapter_is_inactive_frozen_and_changes_nothing():
    model = zoo(a={}, b={})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    y = output(model, "linear", "a")
    add_weighted_adapter(model, ["a", "b"], [1, 1], "new")
    assert adapter_names(model) == ["a", "b", "new"]
    assert active_adapters(model) == ["a"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    after = model.state_dict()
    assert all(bit_equal(after[name], value) for name, value in before.items())
    assert bit_equal(output(model, "linear", "a"), y)


@pytest.mark.parametrize("targets", [["proj"], ["embed", "proj", "trunk.proj"]], ids=str)
def test_the_config_makes_the_same_adapter_again(targets):
    """As it is stored in files: the same modules, ranks and a scaling of 1."""
    exactly = "|".join(map(re.escape, targets))  # "proj" alone, not "trunk.proj"
    model = zoo(
        a={"target_modules": exactly},
        b={"target_modules": "linear|conv_2|proj", "r": 3, "use_rslora": True},
    )
    add_weighted_adapter(model, ["a", "b"], [1, 1], "new", "cat")
    paths = paths_with(model, "new")
    assert set(paths) == {*targets, "linear", "conv_2"}
    config = model.linear.adapters["new"].config
    others = {"embed": 2, "proj": 5, "trunk.proj": 2}
    assert config.r == 3  # what most have
    assert config.rank_pattern == {f"^{re.escape(path)}": others[path] for path in targets}
    if targets != ["proj"]:
        assert config.target_modules == sorted(paths)
    fresh = Zoo().double()
    inject_adapter(fresh, LoraConfig.from_dict(config.to_dict()), "new")
    assert paths_with(fresh, "new") == paths
    for path in paths:
        again, new = module(fresh, path).adapters["new"], module(model, path).adapters["new"]
        assert [p.shape for p in again.parameters()] == [p.shape for p in new.parameters()]
        assert again.scaling == new.scaling == 1
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    theirs = peft_model(Zoo(), {key: getattr(config, key) for key in keys}, "new")
    for path, layer in theirs.base_model.model.named_modules():
        assert isinstance(layer, peft.tuners.lora.LoraLayer) == (path in paths)
        if path in paths:
            assert layer.r["new"] == module(model, path).adapters["new"].r
            assert layer.scaling["new"] == 1


def test_a_trained_copy_is_taken_over_as_it_is():
    model = zoo(a={"modules_to_save": ["head"]}, b={})
    add_weighted_adapter(model, ["b", "a"], [0.5, 0.5], "new")
    copied, new = (model.head.adapters[name].module for name in ("a", "new"))
    assert copied is not new
    assert bit_equal(new.weight, copied.weight)
    assert bit_equal(model.head.weight, copied.weight)  # "a" is the one that acts
    assert not bit_equal(new.weight, model.state_dict()["head.weight"])
    assert not new.weight.requires_grad


@pytest.mark.parametrize(
    ("choice", "shares"),
    [("mean", {"a": 0.75, "b": 0.25}), ("first", {"b": 1}), ("a", {"a": 1}), ("b", {"b": 1})],
)
def test_of_several_trained_modules(choice, shares):
    head = {"modules_to_save": ["head"]}
    model = zoo(a=head, b=head, c={})
    expected = {
        key: sum(model.head.adapters[n].module.state_dict()[key] * w for n, w in shares.items())
        for key in ("weight", "bias")
    }
    add_weighted_adapter(
        model, ["b", "c", "a"], [1.0, 5.0, 3.0], "new", "cat", modules_to_save=choice
    )
    set_adapter(model, "new")
    for key, value in expected.items():
        torch.testing.assert_close(model.head.state_dict()[f"adapters.new.module.{key}"], value)
        torch.testing.assert_close(getattr(model.head, key), value)
    x = randn(4, model.head.in_features, seed=3)
    torch.testing.assert_close(
        model.head(x), torch.nn.functional.linear(x, expected["weight"], expected["bias"])
    )


def test_autocast_narrows_nothing():
    model = zoo(a={}, b={}).float()
    add_weighted_adapter(model, ["a", "b"], [1, 1], "plain")
    with torch.autocast("cpu", torch.bfloat16):
        add_weighted_adapter(model, ["a", "b"], [1, 1], "under")
    for path in paths_with(model, "plain"):
        adapters = module(model, path).adapters
        assert bit_equal(dense(adapters["under"]), dense(adapters["plain"]))


# -- refusals --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OtherConfig(AdapterConfig):
    peft_type = "OTHER"


class OtherAdapter(DeltaAdapter):
    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec, 1.0)
        self.other = spec.parameter(*spec.shape)


def other_type() -> nn.Module:
    model = zoo(a={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._TYPES, OtherConfig, lambda config: {"linear": OtherAdapter})
        inject_adapter(model, OtherConfig(target_modules=["linear"]), "b")
    return model


def merged() -> nn.Module:
    model = zoo(a={"target_modules": ["linear"]}, b={"target_modules": ["linear"]})
    merge_adapter(model)
    return model


def with_nan() -> nn.Module:
    model = zoo(a={}, b={})
    with torch.no_grad():
        model.linear.adapters["b"].lora_A[0, 0] = math.nan
    return model


def on_meta() -> nn.Module:
    model = zoo(a={})
    inject_adapter(model, LoraConfig(r=2), "b", low_cpu_mem_usage=True)
    return model


TWO = {"a": {}, "b": {"r": 4}}
REFUSALS = {
    # the model; what differs from ["a", "b"], [1, 1], "new", "svd"; the error; words of its text
    "unknown": (TWO, {"names": ["a", "bb"]}, AdapterStateError, "No adapter 'bb'.*mean 'b'"),
    "no-names": (TWO, {"names": [], "weights": []}, ConfigError, r"names \[\].*lora.weights"),
    "weights": (TWO, {"weights": [1.0]}, ConfigError, r"weights \[1.0\].*finite weight for each"),
    "nan-weight": (TWO, {"weights": [1.0, math.nan]}, ConfigError, "finite"),
    "taken": (TWO, {"adapter_name": "b"}, AdapterStateError, "already has an adapter 'b'"),
    "bad-name": (TWO, {"adapter_name": "x.y"}, ConfigError, "adapter_name 'x.y'"),
    "type": (TWO, {"combination_type": "tie"}, ConfigError, "known values:.*mean 'ties'"),
    "sign": (TWO, {"majority_sign_method": "sum"}, ConfigError, "majority_sign_method is 'sum'"),
    "no-density": (TWO, {"combination_type": "ties_svd"}, ConfigError, "density is None.*needs"),
    "density": (
        TWO, {"combination_type": "ties_svd", "density": 1.1}, ConfigError, "density is 1.1",
    ),
    "density-0": (
        TWO, {"combination_type": "dare_ties_svd", "density": 0}, ConfigError, "density is 0",
    ),
    "useless-density": (TWO, {"density": 0.5}, ConfigError, "no meaning for .* 'svd'"),
    "useless-rank": (
        TWO, {"combination_type": "cat", "svd_rank": 2}, ConfigError, "svd_rank=2 has no meaning",
    ),
    "rank": (TWO, {"svd_rank": 0}, RankError, "svd_rank is 0"),
    "rank-of-groups": (TWO, {"svd_rank": 3}, RankError, "2 groups of 'grouped'"),
    "clamp": (TWO, {"svd_clamp": 0.2}, ConfigError, "svd_clamp is 0.2"),
    "ranks": (TWO, {"combination_type": "linear"}, RankError, r"2 \('a'\), 4 \('b'\).*'cat'"),
    "dora": (
        {"a": {}, "b": {"use_dora": True, "target_modules": ["linear"]}}, {},
        AdapterStateError, "'b' is a DoRA adapter.*lora.use_dora",
    ),
    "bias": (
        {"a": {}, "b": {"bias": "lora_only"}}, {}, AdapterStateError, "'b' trains .*.bias' in place",
    ),
    "copies": (
        {"a": {"modules_to_save": ["head"]}, "b": {"modules_to_save": ["head"]}}, {},
        AdapterStateError, r"\['a', 'b'\] each train 'head' in full.*modules_to_save='mean'",
    ),
    "no-such-copy": (
        {"a": {"modules_to_save": ["head"]}, "b": {"modules_to_save": ["head"]}},
        {"modules_to_save": "mena"}, ConfigError, "Did you mean 'mean'",
    ),
    "copies-without-a-mean": (
        {"a": {"modules_to_save": ["head"]}, "b": {"modules_to_save": ["head"]}},
        {"modules_to_save": "mean", "weights": [1, -1]}, ConfigError, "add up to 0",
    ),
    "copy-of-one-that-has-none": (
        {"a": {"modules_to_save": ["head"]}, "b": {"modules_to_save": ["head"]}, "c": {}},
        {"modules_to_save": "c", "names": ["a", "b", "c"], "weights": [1, 1, 1]},
        AdapterStateError, r"one of \['a', 'b'\]",
    ),
    "copy-and-update": (
        {"a": {"modules_to_save": ["trunk"]}, "b": {"target_modules": ["trunk.proj"]}}, {},
        AdapterStateError, "'b' adapts 'trunk.proj', but 'a' trains 'trunk' in full",
    ),
    "tokens": (
        {"a": {}, "b": {"target_modules": ["linear"], "trainable_token_indices": {"embed": [3]}}},
        {}, AdapterStateError, "On 'embed', 'b' is of type TrainableTokensAdapter",
    ),
    "other-type": (other_type, {}, AdapterStateError, "On 'linear', 'b' is of type OtherAdapter; only LoRA"),
    "merged": (merged, {}, AdapterStateError, "merged into the base"),
    "not-finite": (with_nan, {}, AdapterStateError, "'b' has values on 'linear' that are not finite"),
    "meta": (on_meta, {}, AdapterStateError, "'b' is on the meta device"),
}  # fmt: skip


@pytest.mark.parametrize(("made", "request_", "error", "text"), REFUSALS.values(), ids=REFUSALS)
def test_refused_before_anything_is_changed(made, request_, error, text):
    model = made() if callable(made) else zoo(**made)
    before = copy.deepcopy(model.state_dict())
    options = {"names": ["a", "b"], "weights": [1, 1], "adapter_name": "new", **request_}
    with pytest.raises(error, match=f"(?s){text}") as caught:
        add_weighted_adapter(model, **options)
    assert isinstance(caught.value, LoraError)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert value.is_meta or bit_equal(after[name], value)
    assert adapter_names(model) == list(made if isinstance(made, dict) else "ab")


def test_refused_while_adapters_are_disabled():
    model = zoo(a={}, b={})
    with disable_adapter(model), pytest.raises(AdapterStateError, match="disabled at present"):
        add_weighted_adapter(model, ["a", "b"], [1, 1], "new")
    assert adapter_names(model) == ["a", "b"]
