"""LoHa and LoKr: peft's numbers on what peft knows, an explicit formula on the rest."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization as peft_factorization
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    disable_adapter,
    inject_adapter,
    merge_adapter,
    scale_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.adapters import lycoris
from lora_lightning.adapters.loha import LohaConfig
from lora_lightning.adapters.lokr import LokrConfig, factorization
from lora_lightning.adapters.lycoris import LycorisAdapter
from lora_lightning.errors import ConfigError, RankError, TargetError
from tests.helpers.tensors import bit_equal, randomize, trainable

TYPES = {"loha": (LohaConfig, peft.LoHaConfig), "lokr": (LokrConfig, peft.LoKrConfig)}
Build = Callable[[], nn.Module]

# name: (module, shape of its input, options); the same words for both libraries. alpha / r is a
# binary fraction everywhere: peft rounds LoHa's to float32 even in float64.
CASES: dict[str, tuple[Build, tuple[int, ...], dict]] = {
    "linear": (lambda: nn.Linear(48, 64), (3, 5, 48), {"r": 2}),
    "linear-narrow": (lambda: nn.Linear(6, 3, bias=False), (4, 6), {"r": 5, "alpha": 5}),
    "linear-prime": (lambda: nn.Linear(13, 7), (4, 13), {"r": 2, "alpha": 5}),
    "effective-means-nothing": (
        lambda: nn.Linear(16, 36),
        (4, 16),
        {"r": 2, "use_effective_conv2d": True},
    ),
    "patterns": (
        lambda: nn.Linear(48, 64),
        (4, 48),
        {"r": 4, "rank_pattern": {"pro.": 1, "proj": 3}, "alpha_pattern": {"proj": 1.5}},
    ),
    "conv1d": (lambda: nn.Conv1d(16, 36, 3), (2, 16, 9), {"r": 2}),
    "conv1d-full": (lambda: nn.Conv1d(6, 4, 3, padding=1, dilation=2), (2, 6, 9), {"r": 4}),
    "conv1d-effective": (
        lambda: nn.Conv1d(16, 36, 3, stride=2),
        (2, 16, 9),
        {"r": 2, "use_effective_conv2d": True},
    ),
    "conv1d-grouped": (lambda: nn.Conv1d(8, 12, 3, groups=2), (2, 8, 9), {"r": 1}),
    "conv1d-1": (
        lambda: nn.Conv1d(6, 4, 1),
        (2, 6, 9),
        {"r": 4, "use_effective_conv2d": True},
    ),
    "conv2d": (
        lambda: nn.Conv2d(16, 36, 3, stride=2, padding=1, dilation=2),
        (2, 16, 9, 8),
        {"r": 1},
    ),
    "conv2d-full": (lambda: nn.Conv2d(4, 6, (3, 2)), (2, 4, 7, 7), {"r": 8}),
    "conv2d-effective": (
        lambda: nn.Conv2d(16, 36, 3, bias=False),
        (2, 16, 6, 7),
        {"r": 1, "use_effective_conv2d": True},
    ),
    "conv2d-same": (lambda: nn.Conv2d(16, 36, (1, 3), padding="same"), (2, 16, 6, 7), {"r": 1}),
    "conv2d-grouped": (lambda: nn.Conv2d(18, 36, 3, groups=2), (2, 18, 5, 6), {"r": 1}),
    "conv2d-split-rows": (lambda: nn.Conv2d(6, 6, 3, groups=3), (2, 6, 5, 6), {"r": 1}),
    "conv2d-depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 6), {"r": 2}),
    "conv2d-1x1": (
        lambda: nn.Conv2d(64, 36, 1),
        (2, 64, 3, 4),
        {"r": 2, "use_effective_conv2d": True},
    ),
}
ROWS = [pytest.param(kind, case, {}, id=f"{kind}-{case}") for kind in TYPES for case in CASES] + [
    pytest.param("lokr", case, extra, id=f"lokr-{case}-{next(iter(extra))}")
    for case in ("linear", "conv1d", "conv2d", "conv2d-effective", "conv2d-grouped")
    for extra in ({"decompose_both": True}, {"decompose_factor": 4}, {"decompose_factor": 5})
]


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(lycoris, "SMALL", 0)  # as on large layers


class Net(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        self.proj = build()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def adapted(build: Build, config, dtype: torch.dtype = torch.float64, std: float | None = 0.5):
    model = Net(build).to(dtype)
    inject_adapter(model, config, seed=1)
    if std is not None:
        randomize(trainable(model).values(), std)
    return model


def adapter_of(model: nn.Module) -> LycorisAdapter:
    return model.proj.adapters["default"]


def pair(kind: str, build: Build, options: dict):
    """The same net adapted by peft and by us, with the same random adapter values."""
    config, peft_config = TYPES[kind]
    base = Net(build).double()
    ours = copy.deepcopy(base)
    inject_adapter(ours, config(target_modules=["proj"], **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft_config(target_modules=["proj"], **options)
        )
    theirs.double()
    values = tensors_of(theirs)
    mine = dict(adapter_of(ours).named_parameters())
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in values.items()}
    randomize(values.values())
    with torch.no_grad():
        for name, value in values.items():
            mine[name].copy_(value)
    return base, theirs, ours


def tensors_of(theirs: nn.Module) -> dict[str, Tensor]:
    """peft's adapter tensors by our names."""
    return {
        name.split(".")[-2]: p
        for name, p in theirs.named_parameters()
        if name.split(".")[-2].startswith(("hada_", "lokr_"))
    }


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10, msg: str = "") -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=msg or None)


# -- against peft ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "case", "extra"), ROWS)
def test_outputs_gradients_merged_weight_and_base_are_pefts(kind, case, extra):
    build, shape, options = CASES[case]
    base, theirs, ours = pair(kind, build, {**options, **extra})
    x = torch.randn(shape, dtype=torch.float64)
    before = base(x)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [theirs.train()(inputs[0]), ours.train()(inputs[1])]
    assert (outputs[1] - before).abs().max() > 1e-3
    close(outputs[1], outputs[0])
    weights = torch.randn_like(before)
    for y in outputs:
        (y * weights).sum().backward()
    close(inputs[1].grad, inputs[0].grad)
    mine = dict(adapter_of(ours).named_parameters())
    for name, value in tensors_of(theirs).items():
        assert value.grad.abs().max() > 1e-4
        # peft's own backward takes the other factor's core for these two; ours is compared with
        # the dense formula below.
        if not (kind == "loha" and adapter_of(ours).effective and name.endswith("_a")):
            close(mine[name].grad, value.grad, msg=name)

    with disable_adapter(ours):
        assert bit_equal(ours(x), before)
    kept = ours.proj.weight.detach().clone()
    merge_adapter(ours)
    theirs.merge_adapter()
    close(ours.proj.weight, theirs.base_model.model.proj.base_layer.weight)
    close(ours(x), outputs[1])
    unmerge_adapter(ours)
    assert bit_equal(ours.proj.weight, kept)
    unload(ours)
    assert type(ours.proj) is type(base.proj)


@pytest.mark.parametrize(
    ("kind", "options"), [("loha", {}), ("lokr", {}), ("lokr", {"rank_dropout_scale": True})]
)
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv1d-full"])
def test_dropout_is_pefts_draw_for_draw(kind, case, options):
    build, shape, given = CASES[case]
    dropout = {"rank_dropout": 0.4, "module_dropout": 0.3}
    base, theirs, ours = pair(kind, build, {**given, **options, **dropout})
    x = torch.randn(shape, dtype=torch.float64)
    dropped = 0
    for seed in range(12):
        torch.manual_seed(seed)
        expected = theirs.train()(x)
        torch.manual_seed(seed)
        y = ours.train()(x)
        close(y, expected, 1e-5 if options else 1e-10)  # peft rescales LoKr's rows in float32
        dropped += torch.equal(y, base(x))
    assert 0 < dropped < 12
    close(ours.eval()(x), theirs.eval()(x))


RESET = {
    True: "reset_adapter_parameters",
    False: "reset_adapter_parameters_random",
    "lycoris": "reset_adapter_parameters_lycoris_way",
}


@pytest.mark.parametrize("start", RESET)
@pytest.mark.parametrize("case", ["linear", "conv1d", "conv2d-full", "conv2d-effective", "both"])
@pytest.mark.parametrize("kind", TYPES)
def test_start_values_are_distributed_as_pefts(kind, case, start):
    if kind == "loha" and start == "lycoris":
        start = True  # a start of LoKr alone
    build, _, options = CASES["linear" if case == "both" else case]
    options = {**options, "init_weights": start}
    if (kind, case) == ("lokr", "both"):
        options["decompose_both"] = True
    _, theirs, ours = pair(kind, build, options)
    found: dict[str, list[Tensor]] = {name: [] for name in tensors_of(theirs)}
    expected = copy.deepcopy(found)
    for seed in range(20):
        getattr(theirs.base_model.model.proj, RESET[start])("default")
        again = Net(build)
        inject_adapter(again, adapter_of(ours).config, seed=seed)
        for name, value in tensors_of(theirs).items():
            found[name].append(getattr(adapter_of(again), name).detach())
            expected[name].append(value.detach().clone())
    for name in found:
        one, other = torch.stack(found[name]), torch.stack(expected[name])
        bound = one[0][0].numel() ** -0.5
        assert bool(one.any()) == bool(other.any()), name
        assert one.abs().max() <= bound * (1 + 1e-6)
        if one.any():
            assert not torch.equal(one[0], one[1])
            assert one.abs().max() > 0.9 * bound
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.15), name


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 5, 8, 16, 100, 5000])
def test_factorization_is_pefts(factor):
    for dimension in (*range(1, 130), 768, 3072, 4096, 11008, 30522):
        assert factorization(dimension, factor) == peft_factorization(dimension, factor), dimension


# -- what peft does not know, by an explicit formula -------------------------------------------


def explicit_delta(adapter: LycorisAdapter, config) -> Tensor:
    """The update by definition, element by element where that is the definition."""
    t = dict(adapter.named_parameters())
    shape, scaling = adapter.spec.shape, config.alpha / config.r

    def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
        whole = torch.tensordot(a, torch.tensordot(core, b, dims=([1], [0])), dims=([0], [0]))
        return whole.movedim(-1, 1).reshape(a.shape[1], b.shape[1], *shape[2:])

    if isinstance(config, LohaConfig):
        if "hada_t1" in t:
            one = tucker(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"])
            two = tucker(t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
        else:
            one = t["hada_w1_a"] @ t["hada_w1_b"]
            two = t["hada_w2_a"] @ t["hada_w2_b"]
        return scaling * (one * two).reshape(shape)
    w1 = t["lokr_w1"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = (t["lokr_w2_a"] @ t["lokr_w2_b"]).unflatten(1, (-1, *shape[2:]))
    return scaling * torch.kron(w1.reshape(*w1.shape, *(1 for _ in shape[2:])), w2.contiguous())


EXPLICIT: dict[str, tuple[Build, tuple[int, ...], dict]] = {
    f"{mode}-{padding}-{dims}d": (
        lambda conv=conv, padding=padding, mode=mode: conv(
            16, 36, 3, padding=padding, dilation=2, padding_mode=mode
        ),
        (2, 16, *(7, 6, 5)[:dims]),
        {"r": 1},
    )
    for dims, conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))
    for padding in (1, "same")
    for mode in ("zeros", "circular", "reflect", "replicate")
    if not (mode == "reflect" and dims == 3)
} | {
    "transformers-Conv1D": (lambda: Conv1D(36, 16), (2, 5, 16), {"r": 2}),
    "1d-effective": (
        lambda: nn.Conv1d(16, 36, 3),
        (2, 16, 7),
        {"r": 1, "use_effective_conv2d": True},
    ),
    "2d-effective": (
        lambda: nn.Conv2d(16, 36, (3, 2), groups=2),
        (2, 16, 4, 5),
        {"r": 1, "use_effective_conv2d": True},
    ),
    "3d-effective": (
        lambda: nn.Conv3d(16, 36, 2, stride=2),
        (2, 16, 4, 5, 4),
        {"r": 1, "use_effective_conv2d": True},
    ),
    "3d-full": (lambda: nn.Conv3d(4, 4, 2, groups=2), (2, 4, 3, 3, 3), {"r": 4}),
    "unbatched": (lambda: nn.Conv2d(16, 36, 3), (16, 5, 4), {"r": 1}),
    "vector": (lambda: nn.Linear(16, 36), (16,), {"r": 2}),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", EXPLICIT)
def test_forward_and_gradients_are_those_of_the_dense_formula(kind, case):
    build, shape, options = EXPLICIT[case]
    config = TYPES[kind][0](target_modules=["proj"], **options)
    ours = adapted(build, config)
    base = Net(build).double()
    base.load_state_dict(ours.state_dict(), strict=False)
    delta = explicit_delta(adapter_of(ours), config)
    stored = delta.t() if "Conv1D" in case else delta
    x = torch.randn(shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    expected = torch.func.functional_call(
        base, {"proj.weight": base.proj.weight.detach() + stored}, (inputs[0],)
    )
    y = ours(inputs[1])
    close(y, expected)
    assert (y - base(x)).abs().max() > 1e-3
    weights = torch.randn_like(y)
    tensors = list(adapter_of(ours).parameters())
    wanted = torch.autograd.grad((expected * weights).sum(), [inputs[0], *tensors])
    found = torch.autograd.grad((y * weights).sum(), [inputs[1], *tensors])
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    merge_adapter(ours)
    close(ours(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "start"), [("loha", True), ("lokr", True), ("lokr", "lycoris")])
@pytest.mark.parametrize("case", CASES)
def test_the_start_is_bit_equal_to_the_base(kind, case, dtype, start):
    build, shape, options = CASES[case]
    x = torch.randn(shape, dtype=dtype)
    model = Net(build).to(dtype)
    before = model(x)
    config = TYPES[kind][0](target_modules=["proj"], init_weights=start, **options)
    inject_adapter(model, config)
    assert bit_equal(model(x), before)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


STEPS = ["linear", "conv2d", "conv2d-full", "conv1d-full"]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", STEPS)
def test_bf16_base_and_autocast_are_near_float64(kind, case):
    build, shape, options = CASES[case]
    config = TYPES[kind][0](target_modules=["proj"], **options)
    model = adapted(build, config, torch.bfloat16, std=0.4)
    exact = copy.deepcopy(model).double()
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.autograd.grad(exact(x.double()).sum(), [x, *adapter_of(exact).parameters()])
    for used, autocast in ((model, False), (copy.deepcopy(model).float(), True)):
        given = x if not autocast else x.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = used(given)
        assert y.dtype == torch.bfloat16
        assert (y.double() - exact(x.double())).norm() < 0.02 * y.norm()
        found = torch.autograd.grad(y.sum(), [given, *adapter_of(used).parameters()])
        assert {g.dtype for g in found[1:]} == {torch.float32}
        for one, other in zip(found, wanted, strict=True):
            assert (one.double() - other).norm() < 0.03 * other.norm() + 0.02


# -- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_rank_dropout_drops_whole_rows_in_training_alone(kind):
    config = TYPES[kind][0](r=2, rank_dropout=0.3)
    model = adapted(lambda: nn.Linear(16, 400, bias=False), config)
    x = torch.randn(3, 16, dtype=torch.float64)
    with disable_adapter(model):
        base = model(x)
    full = model.eval()(x) - base
    update = model.train()(x) - base
    kept = update.abs().amax(0) > 1e-12
    assert 0.6 < kept.double().mean() < 0.8
    factor = 1 / kept.double().mean() if kind == "loha" else 1
    close(update[:, kept], full[:, kept] * factor)
    merge_adapter(model)  # while training: merging is no place for dropout
    close(model(x), base + full)


def test_dropping_every_row_gives_the_base_where_peft_divides_by_zero():
    config = LohaConfig(r=2, rank_dropout=0.9)
    model = adapted(lambda: nn.Linear(6, 3), config)
    x = torch.randn(4, 6, dtype=torch.float64)
    with disable_adapter(model):
        base = model(x)
    outputs = [model.train()(x) for _ in range(20)]
    assert all(torch.isfinite(y).all() for y in outputs)
    assert any(torch.equal(y, base) for y in outputs)


@pytest.mark.parametrize("kind", TYPES)
def test_a_dropped_module_still_has_gradients(kind):  # DistributedDataParallel waits for them
    model = adapted(lambda: nn.Linear(6, 8), TYPES[kind][0](r=2, module_dropout=0.999))
    x = torch.randn(4, 6, dtype=torch.float64)
    y = model.train()(x)
    with disable_adapter(model):
        assert torch.equal(y, model(x))
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in trainable(model).values())


# -- what is kept for backward -----------------------------------------------------------------


def kept_for_backward(model: nn.Module, *inputs: Tensor) -> dict[int, int]:
    """Bytes of every storage that autograd keeps, parameters of the base not counted."""
    kept: dict[int, int] = {}
    held = []
    base = {p.data_ptr() for p in model.parameters() if not p.requires_grad}

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        if tensor.data_ptr() not in base:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    return kept


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind in TYPES for case in ("linear", "full", "conv")]
)
def test_nothing_of_the_weights_size_is_kept(kind, case):
    build = (lambda: nn.Conv2d(64, 64, 3)) if case == "conv" else (lambda: nn.Linear(64, 64))
    x = torch.randn(2, 64, 5, 5) if case == "conv" else torch.randn(7, 64)
    x.requires_grad_()
    options = {"target_modules": ["proj"], "r": 8 if case == "full" else 1}
    ours, theirs = Net(build), Net(build)
    inject_adapter(ours, TYPES[kind][0](**options))
    peft.inject_adapter_in_model(TYPES[kind][1](**options), theirs)
    dense = 4 * ours.proj.weight.numel()
    of_ours, of_theirs = kept_for_backward(ours, x), kept_for_backward(theirs, x)
    assert dense in of_theirs.values()  # so it would be noticed
    factors = sum(4 * p.numel() for p in trainable(ours).values())
    assert dense not in of_ours.values()
    assert sum(of_ours.values()) <= 4 * x.numel() + 2 * factors
    assert sum(of_ours.values()) < sum(of_theirs.values())


def test_loha_of_a_large_rank_keeps_one_dense_kernel_like_peft():
    model = adapted(lambda: nn.Conv2d(16, 16, 3), LohaConfig(target_modules=["proj"]), torch.float)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    kept = list(kept_for_backward(model, x).values())
    assert kept.count(4 * model.proj.weight.numel()) == 1


# -- derivatives, compilers, transforms --------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", TYPES)
def test_small_layers_keep_more_and_compute_the_same(kind, case, monkeypatch):
    build, shape, options = CASES[case]
    model = adapted(build, TYPES[kind][0](target_modules=["proj"], **options))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tensors = [x, *trainable(model).values()]
    lean = torch.autograd.grad(model(x).square().sum(), tensors)
    kept = sum(kept_for_backward(model, x).values())
    monkeypatch.undo()
    assert lycoris.SMALL == 2**16
    for one, other in zip(torch.autograd.grad(model(x).square().sum(), tensors), lean, strict=True):
        close(one, other)
    if adapter_of(model).uses_factors:
        assert sum(kept_for_backward(model, x).values()) > kept


def functions_of(model: nn.Module, x: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    parameters = trainable(model)
    tensors = [x, *(p.detach().clone().requires_grad_() for p in parameters.values())]

    def call(given: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(
            model, dict(zip(parameters, values, strict=True)), (given,)
        )

    return call, tensors


@pytest.mark.parametrize("in_steps", [True, False])
@pytest.mark.parametrize("case", ["linear", "conv"])
@pytest.mark.parametrize("kind", TYPES)
def test_first_and_second_derivatives(kind, case, in_steps):
    build = (lambda: nn.Linear(4, 4)) if case == "linear" else (lambda: nn.Conv2d(4, 4, 1))
    model = adapted(build, TYPES[kind][0](target_modules=["proj"], r=1))
    adapter_of(model).uses_factors = in_steps
    shape = (2, 4) if case == "linear" else (2, 4, 2, 1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    call, tensors = functions_of(model, x)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("kind", TYPES)
def test_function_transforms(kind):
    model = adapted(lambda: nn.Linear(4, 6), TYPES[kind][0](r=1))
    call, tensors = functions_of(model, torch.randn(3, 4, dtype=torch.float64))

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        return call(x, *values).square().sum()

    every = tuple(range(1, len(tensors)))
    by_row = torch.func.vmap(torch.func.grad(loss, every), (0, *(None for _ in every)))(*tensors)
    expected = torch.autograd.grad(loss(*tensors), tensors[1:])
    for one, other in zip(by_row, expected, strict=True):
        close(one.sum(0), other)


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, "linear") for kind in TYPES]
    + [
        pytest.param(kind, case, marks=pytest.mark.slow)
        for kind, case in (
            *itertools.product(TYPES, ("conv2d-effective", "dropout")),
            ("lokr", "conv2d"),
            ("lokr", "conv1d-full"),
        )
    ],
)
def test_compiles_whole_and_rescaling_does_not_recompile(kind, case):
    build, shape, options = CASES["linear" if case == "dropout" else case]
    if case == "dropout":
        options = {**options, "rank_dropout": 0.3, "module_dropout": 0.3}
    model = adapted(build, TYPES[kind][0](target_modules=["proj"], **options), torch.float32)
    x = torch.randn(shape)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for factor in (0.5, 3.0):
        scale_adapter(model, "default", factor)
        results = []
        for used in (model, compiled):
            torch.manual_seed(7)
            model.zero_grad()
            y = used(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in trainable(model).values())])
        for one, other in zip(*results, strict=True):
            close(one, other, 1e-4)
    assert counter.frame_count == 1


# -- edges and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", ["linear", "conv2d"])
def test_an_empty_batch(kind, case):
    build, (_, *shape), options = CASES[case]
    model = adapted(build, TYPES[kind][0](target_modules=["proj"], **options))
    x = torch.randn(0, *shape, dtype=torch.float64)
    y = model(x)
    with disable_adapter(model):
        assert y.shape == model(x).shape
    y.sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_updates_act_in_steps_where_that_pays():
    def in_steps(build: Build, kind: str, r: int = 8) -> bool:
        model = adapted(build, TYPES[kind][0](target_modules=["proj"], r=r))
        return adapter_of(model).uses_factors

    assert in_steps(lambda: nn.Linear(6, 3), "lokr")
    assert in_steps(lambda: nn.Conv2d(64, 64, 3), "lokr", 2)
    assert in_steps(lambda: nn.Conv2d(128, 64, 3, groups=2), "lokr", 1)
    assert not in_steps(lambda: nn.Conv2d(16, 16, 3), "lokr")
    assert not in_steps(lambda: nn.Conv2d(64, 64, 3, padding_mode="circular"), "lokr", 2)
    assert not in_steps(lambda: nn.Conv2d(96, 96, 3, groups=3), "lokr", 1)  # 8 rows of 12 in 3
    assert in_steps(lambda: nn.Linear(256, 256), "loha")
    assert not in_steps(lambda: nn.Linear(256, 256), "loha", 9)
    assert in_steps(lambda: nn.Conv2d(64, 64, 3, padding_mode="circular"), "loha", 2)
    assert not in_steps(lambda: nn.Conv2d(64, 64, 3, groups=2), "loha", 2)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (LohaConfig, {"alpha": 0}, "alpha"),
        (LohaConfig, {"rank_dropout": 1.0}, "rank_dropout"),
        (LohaConfig, {"module_dropout": -0.1}, "module_dropout"),
        (LohaConfig, {"init_weights": "lycoris"}, "init_weights"),
        (LokrConfig, {"init_weights": "lycori"}, "Did you mean 'lycoris'"),
        (LokrConfig, {"decompose_factor": 0}, "decompose_factor"),
        (LokrConfig, {"decompose_factor": 2.0}, "decompose_factor"),
    ],
)
def test_bad_options_are_named(config, options, words):
    with pytest.raises(ConfigError, match=words):
        config(**options)


@pytest.mark.parametrize("config", [LohaConfig, LokrConfig])
@pytest.mark.parametrize("r", [0, -1, 2.0, True])
def test_a_rank_is_a_positive_integer(config, r):
    with pytest.raises(RankError, match=r"lora\.r\b"):
        config(r=r)


def test_a_rank_beyond_the_larger_side_is_refused_by_loha_and_means_full_to_lokr():
    model = Net(lambda: nn.Linear(6, 8))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(RankError, match="at most 8"):
        inject_adapter(model, LohaConfig(r=9, target_modules=["proj"]))
    assert type(model.proj) is nn.Linear
    assert all(bit_equal(p, before[name]) for name, p in model.state_dict().items())
    inject_adapter(model, LokrConfig(r=10**9, alpha=10**9))  # how LyCORIS users ask for it
    assert {p.numel() for p in trainable(model).values()} == {4, 12}


@pytest.mark.parametrize("config", [LohaConfig, LokrConfig])
def test_defaults_are_pefts(config):
    theirs = TYPES[config.peft_type.lower()][1]()
    mine = config().to_dict()
    for key in mine.keys() - {"target_modules", "bias"}:
        assert mine[key] == getattr(theirs, key), key
    assert config.from_dict(mine) == config()
    assert theirs.peft_type.value == config.peft_type


def test_embeddings_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4))
    with pytest.raises(TargetError, match="Embedding"):
        inject_adapter(model, LohaConfig(target_modules=["0"]))


def test_print_shows_rank_and_alpha():
    assert "LokrAdapter(r=3, alpha=6)" in repr(
        adapted(lambda: nn.Linear(6, 8), LokrConfig(r=3, alpha=6))
    )
