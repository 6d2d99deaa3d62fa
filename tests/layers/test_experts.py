"""LoRA on fused experts and other parameters: peft's numbers, one formula, and no dense delta."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lora_lightning import (
    LoraConfig,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.adapters.base import Adapter, MultiWeightAdapter
from lora_lightning.adapters.lora.experts import LoraExpertsAdapter
from lora_lightning.errors import AdapterStateError, ConfigError, RankError, TargetError
from lora_lightning.layers import experts as experts_file
from lora_lightning.layers.experts import AdaptedExperts
from lora_lightning.layers.low_rank_weight import LowRankWeight
from tests.helpers.tensors import bit_equal, randomize, trainable

EXPERTS, HIDDEN, INNER, CHOSEN, TOKENS = 4, 16, 24, 2, 10
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts_per_tok": CHOSEN}
MODULES = {
    "mixtral": (MixtralExperts, lambda: MixtralConfig(num_local_experts=EXPERTS, **SIZES)),
    "qwen3_moe": (
        Qwen3MoeExperts,
        lambda: Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=INNER, **SIZES),
    ),
    "gpt_oss": (
        GptOssExperts,
        lambda: GptOssConfig(
            num_local_experts=EXPERTS, rope_parameters={"rope_type": "default"}, **SIZES
        ),
    ),
}


class Net(nn.Module):
    """An ordinary Linear, the experts of one layer, and a head."""

    def __init__(self, model: str, implementation: str = "eager") -> None:
        super().__init__()
        kind, config = MODULES[model]
        config = config()
        config._experts_implementation = implementation
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.experts = kind(config)
        self.head = nn.Linear(HIDDEN, 3)
        randomize(self.experts.parameters(), 0.3)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.head(self.experts(self.proj(x), index, weights))


def net(
    model: str, implementation: str = "eager", dtype: torch.dtype = torch.float64, **options
) -> Net:
    module = Net(model, implementation).to(dtype)
    if options:
        adapt(module, **options)
    return module


def adapt(module: nn.Module, name: str = "default", **options) -> LoraConfig:
    options = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": BOTH, **options}
    config = LoraConfig(**options)
    inject_adapter(module, config, name)
    randomize(p for n, p in module.named_parameters() if f"adapters.{name}." in n)
    return config


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    # Expert 3 gets no token: the gradients of what is not chosen are zero, not missing.
    index = torch.stack([torch.randperm(EXPERTS - 1)[:CHOSEN] for _ in range(TOKENS)])
    x, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, CHOSEN)
    return x.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()


def gradients(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of what is trained and of the inputs."""
    wanted = {**trainable(module), "x": inputs[0], "weights": inputs[-1]}
    y = module(*inputs)
    found = torch.autograd.grad(y.float().square().sum(), list(wanted.values()))
    return y.detach(), dict(zip(wanted, found, strict=True))


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def updates(module: nn.Module, parameter: str, adapter: str = "default") -> Tensor:
    """The update in the parameter's layout, from lora_A and lora_B by the layout of the files."""
    part = module.adapters[adapter].by_weight()[parameter]
    a, b, r = part.lora_A.detach(), part.lora_B.detach(), part.r
    if getattr(module, parameter).dim() == 2:
        return part.scaling * b @ a
    one_by_one = [part.scaling * b[:, e::EXPERTS] @ a[e * r : (e + 1) * r] for e in range(EXPERTS)]
    delta = torch.stack(one_by_one)
    return delta.mT if getattr(module, "is_transposed", False) else delta


@pytest.fixture
def double_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own grouped product, which unlike torch's knows float64."""
    monkeypatch.setattr(transformers.integrations.moe, "_can_use_grouped_mm", lambda *args: False)


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.usefixtures("double_grouped_mm")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model", MODULES)
def test_same_as_peft(model: str, implementation: str) -> None:
    options = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["proj"],
        "target_parameters": BOTH,
        "rank_pattern": {"experts.down_proj": 2, "proj": 4},
        "alpha_pattern": {"gate_up_proj": 7},
    }
    base = net(model, implementation)
    ours = copy.deepcopy(base)
    adapt(ours, **options)
    theirs = peft_model(copy.deepcopy(base), **options)
    names = copy_to_peft(ours, theirs)

    inputs = batch()
    y, grads = gradients(ours, inputs)
    peft_y, peft_grads = gradients(theirs, inputs)
    assert (y - base(*inputs)).abs().max() > 0.1
    assert_close(y, peft_y)
    assert len(grads) == len(peft_grads) == 8
    for name, grad in grads.items():
        assert_close(grad, peft_grads[names.get(name, name)])

    with disable_adapter(ours):
        assert bit_equal(ours(*inputs), base(*inputs))
    merge_adapter(ours)
    merged = theirs.merge_and_unload()
    for name in ("gate_up_proj", "down_proj"):
        assert_close(getattr(ours.experts, name), getattr(merged.experts, name))
    assert_close(ours(*inputs), y)
    unmerge_adapter(ours)
    for name, parameter in base.named_parameters():
        assert bit_equal(ours.get_parameter(name), parameter)


def peft_model(base: nn.Module, **options) -> nn.Module:
    with warnings.catch_warnings():  # of patterns for parameters, which it says it ignores
        warnings.simplefilter("ignore", RuntimeWarning)
        return peft.get_peft_model(base, peft.LoraConfig(**options))


def copy_to_peft(ours: Net, theirs: nn.Module) -> dict[str, str]:
    """Peft gets our adapter, by the keys of its files; returns its parameter names by ours."""
    places = ours.experts.file_places(list(ours.experts.adapters["default"]._modules))
    files = get_peft_model_state_dict(theirs)
    names = {}
    for name in trainable(ours):
        module, _, rest = name.partition(".adapters.default.")
        parameter, _, tensor = rest.rpartition(".")
        key = f"base_model.model.{module}.{places.get(parameter, '')}{tensor}.weight"
        assert files.pop(key).shape == ours.get_parameter(name).shape
        names[name] = key.removesuffix("weight") + "default.weight"
        with torch.no_grad():
            theirs.get_parameter(names[name]).copy_(ours.get_parameter(name))
    assert not files
    return names


@pytest.mark.parametrize("parameters", [BOTH[:1], BOTH[1:], BOTH[::-1], [*BOTH, "down_proj_bias"]])
def test_file_places_are_pefts(parameters: list[str]) -> None:
    ours = net("gpt_oss", target_parameters=parameters)
    copy_to_peft(
        ours, peft_model(net("gpt_oss"), r=3, target_modules=[], target_parameters=parameters)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["proj"], "rank_pattern": {"experts.down_proj": 2, "proj": 1}},
        {"target_parameters": ["down_proj", "down_proj_bias", "head.weight"]},
    ],
)
def test_folders_go_to_peft_and_come_back(options: dict, tmp_path: Path) -> None:
    base, inputs = net("gpt_oss"), batch()
    ours = copy.deepcopy(base)
    adapt(ours, **options)
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_close(theirs(*inputs), ours(*inputs))
    theirs.save_pretrained(tmp_path / "theirs")
    back = copy.deepcopy(base)
    load_adapter(back, tmp_path / "theirs")
    assert bit_equal(back(*inputs), ours(*inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model", MODULES)
def test_the_formula(model: str, implementation: str) -> None:
    """Expert by expert and token by token, with W + delta written out, in torch's own kernels."""
    ours = net(model, implementation, torch.float32, r=2)
    x, index, weights = batch(torch.float32)
    module, z = ours.experts, ours.proj(x)
    up, down = (
        getattr(module, name) + updates(module, name) for name in ("gate_up_proj", "down_proj")
    )
    if not module.is_transposed:
        up, down = up.mT, down.mT
    expected = torch.zeros_like(z)
    for token in range(TOKENS):
        for choice in range(CHOSEN):
            e = index[token, choice]
            inner = z[token] @ up[e]
            if model == "gpt_oss":
                inner = module._apply_gate(inner + module.gate_up_proj_bias[e])
                outer = inner @ down[e] + module.down_proj_bias[e]
            else:
                outer = F.silu(inner[:INNER]) * inner[INNER:] @ down[e]
            expected[token] += weights[token, choice] * outer
    assert_close(module(z, index, weights), expected, 1e-5)


def test_llama4_is_read_by_bmm() -> None:
    class Config:
        num_local_experts, intermediate_size, hidden_size, hidden_act = 4, INNER, HIDDEN, "silu"

    module = nn.Sequential()
    module.experts = Llama4TextExperts(Config()).double()
    randomize(module.experts.parameters(), 0.3)
    adapt(module)
    x = torch.randn(EXPERTS, 5, HIDDEN, dtype=torch.float64)
    up, down = (
        getattr(module.experts, n) + updates(module.experts, n)
        for n in ("gate_up_proj", "down_proj")
    )
    gate, value = (x @ up).chunk(2, -1)
    assert_close(module(x), ((value * F.silu(gate)) @ down).view(-1, HIDDEN))


@pytest.mark.usefixtures("double_grouped_mm")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_adapters_add_up(implementation: str) -> None:
    ours = net("gpt_oss", implementation, r=3)
    adapt(ours, "second", r=2, target_parameters=BOTH[:1])
    set_adapter(ours, ["default", "second"])
    inputs = batch()
    y, grads = gradients(ours, inputs)
    plain = unload(copy.deepcopy(ours))
    with torch.no_grad():
        plain.experts.down_proj += updates(ours.experts, "down_proj")
        for name in ("default", "second"):
            plain.experts.gate_up_proj += updates(ours.experts, "gate_up_proj", name)
    assert_close(y, plain(*inputs))
    assert len(grads) == 8
    assert all(grad.abs().max() > 1e-6 for grad in grads.values())
    set_adapter(ours, "second")
    alone = ours(*inputs)
    delete_adapter(ours, "default")
    assert bit_equal(ours(*inputs), alone)
    delete_adapter(ours, "second")
    assert type(ours.experts) is GptOssExperts


# -- no dense delta ----------------------------------------------------------------------------


def largest_saved(ours: Net, inputs: tuple[Tensor, ...]) -> int:
    """Bytes of the largest tensor kept for backward that is none of the net's own."""
    own = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    sizes = [0]

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        ours(*inputs)
    return max(sizes)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("model", MODULES)
def test_no_dense_weight_is_made(
    model: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = net(model, implementation, torch.float32, r=1)
    dense = ours.experts.gate_up_proj.nbytes
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in batch(torch.float32)]
    assert largest_saved(ours, inputs) < dense / 2
    # The negative control: experts that are not known to read by torch operations get the sum.
    monkeypatch.setattr(experts_file, "LOW_RANK_PACKAGES", ())
    assert largest_saved(ours, inputs) >= dense


def test_no_dense_weight_where_each_token_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = net("mixtral", "batched_mm", torch.float32, r=3)

    def refuse(self: LowRankWeight) -> None:
        raise AssertionError("the sum was made")

    monkeypatch.setattr(LowRankWeight, "dense", refuse)
    gradients(ours, batch(torch.float32))
    monkeypatch.setattr(experts_file, "LOW_RANK_PACKAGES", ())
    with pytest.raises(AssertionError, match="the sum was made"):
        ours(*batch(torch.float32))


class Product(torch.autograd.Function):
    """Stands for a kernel of somebody's own, which knows tensors only."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.einsum("ti,eoi->teo", x, weight)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.einsum("teo,eoi->ti", g, weight), torch.einsum("teo,ti->eoi", g, x)


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, 5, HIDDEN, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.w)


def test_a_kernel_that_knows_tensors_only() -> None:
    model = nn.Sequential(Stranger())
    adapt(model, target_parameters=["w"])
    part = model[0].adapters["default"].by_weight()["w"]
    x = torch.randn(7, HIDDEN, dtype=torch.float64)
    weight = model[0].w + updates(model[0], "w")
    y = model(x)
    assert_close(y, torch.einsum("ti,eoi->teo", x, weight))
    grads = torch.autograd.grad(y.square().sum(), [part.lora_A, part.lora_B])
    a, b = (t.detach().requires_grad_() for t in (part.lora_A, part.lora_B))
    delta = torch.einsum(
        "ork,kri->koi",
        b.view(5, 3, EXPERTS),
        a.view(EXPERTS, 3, HIDDEN),
    )
    y = torch.einsum("ti,eoi->teo", x, model[0].w + 5 / 3 * delta)
    for grad, expected in zip(grads, torch.autograd.grad(y.square().sum(), [a, b]), strict=True):
        assert_close(grad, expected)


OPERATIONS = {
    "linear": lambda w, x: F.linear(x, w[1], x[:, 0].new_ones(5)),
    "linear of all": lambda w, x: F.linear(x, w[1].mT.contiguous().mT),
    "row times": lambda w, x: x[0] @ w[2].T,
    "transposed": lambda w, x: x @ w.transpose(1, 2),
    "transpose twice": lambda w, x: torch.matmul(w.mT.transpose(-1, -2), x.T),
    "from the left": lambda w, x: w @ x.T,
    "bmm": lambda w, x: torch.bmm(x.expand(4, 7, 6), w.mT),
    "bmm from the left": lambda w, x: torch.bmm(w, x.T.expand(4, 6, 7)),
    "mm": lambda w, x: torch.mm(x, w[torch.tensor(3)].t()),
    "slice": lambda w, x: x @ w[1:3].mT,
    "index": lambda w, x: w[torch.tensor([3, 0, 3])] @ x.T,
    "expert by expert": lambda w, x: sum(x @ w[e].T for e in range(4)),
    "converted": lambda w, x: F.linear(x.float(), w[0].float()).double(),
    "itself": lambda w, x: w @ w.mT,
    "mask": lambda w, x: w[torch.tensor([True, False, True, True])],
    "two keys": lambda w, x: w[1, 2:],
    "einsum": lambda w, x: torch.einsum("ti,eoi->teo", x, w),
    "view": lambda w, x: x @ w.view(-1, 6).T,
    "permute": lambda w, x: x @ w.permute(1, 2, 0).reshape(6, -1),
    "other transpose": lambda w, x: w.transpose(0, 2) * 1.0,
    "arithmetic": lambda w, x: (2 * w - w / 2 + 1) * w,
    "method": lambda w, x: w.sum(-1),
    "list": lambda w, x: torch.stack([w, w]),
    "iteration": lambda w, x: torch.cat(list(w)),
    "metadata": lambda w, x: x.new_full((w.size(0), w.shape[1]), w.dim() + w.ndim + len(w)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_low_rank_weight_answers_like_its_sum(operation: str) -> None:
    shapes = ((4, 5, 6), (4, 5, 2), (4, 2, 6), (7, 6))
    w, left, right, x = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    tolerance = 1e-5 if operation == "converted" else 1e-10
    answer = OPERATIONS[operation](LowRankWeight(w, left, right), x)
    expected = OPERATIONS[operation](w + left @ right, x)
    assert type(answer) is Tensor
    assert_close(answer, expected, tolerance)
    if expected.requires_grad:
        inputs = [w, left, right]
        grads = torch.autograd.grad(answer.square().sum(), inputs)
        for grad, other in zip(
            grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True
        ):
            assert_close(grad, other, tolerance)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_grouped_mm_with_any_rank(rank: int) -> None:
    w, left, right = torch.randn(4, 8, 16), torch.randn(4, 8, rank), torch.randn(4, rank, 16)
    x, offs = torch.randn(9, 8), torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    answer = F.grouped_mm(x, LowRankWeight(w, left, right), offs=offs)
    assert_close(answer, F.grouped_mm(x, w + left @ right, offs=offs), 1e-5)


# -- matrices ----------------------------------------------------------------------------------


def test_matrices_same_as_peft() -> None:
    """A router's weight, a Linear's and a stack of biases, which peft takes for a matrix."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = MODULES["gpt_oss"][1]()
            config._experts_implementation = "eager"
            self.gate = MixtralTopKRouter(MixtralConfig(num_local_experts=EXPERTS, **SIZES))
            self.experts = GptOssExperts(config)
            self.lin = nn.Linear(HIDDEN, HIDDEN)
            randomize([*self.gate.parameters(), *self.experts.parameters()], 0.3)

        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            _, weights, index = self.gate(self.lin(x))
            return self.experts(x, index, weights)

    options = {
        "target_modules": [],
        "target_parameters": ["gate.weight", "lin.weight", "gate_up_proj_bias"],
        "r": 2,
    }
    base = Block().double()
    ours, x = copy.deepcopy(base), torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    adapt(ours, **options)
    theirs = peft_model(copy.deepcopy(base), lora_alpha=5, **options)
    for module in ("gate", "lin", "experts"):
        (part,) = getattr(ours, module).adapters["default"].children()
        wrapper = theirs.get_submodule(f"base_model.model.{module}")
        with torch.no_grad():
            wrapper.lora_A["default"].weight.copy_(part.lora_A)
            wrapper.lora_B["default"].weight.copy_(part.lora_B)
    y = ours(x)
    assert_close(y, theirs(x))
    assert (y - base(x)).abs().max() > 0.1
    merge_adapter(ours)
    assert_close(ours(x), y)


# -- precision, recomputation, compilation -------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_half_precision(
    precision: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 adapters under half-precision maths: no further from the truth than the dense sum."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    half = net("mixtral", implementation, dtype, r=4)
    exact = net("mixtral", r=4)
    exact.load_state_dict(half.state_dict())
    inputs = batch(dtype)
    exact_inputs = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    expected, truth = gradients(
        exact, [t.requires_grad_(t.is_floating_point()) for t in exact_inputs]
    )

    def errors() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            y, grads = gradients(half, inputs)
        assert y.dtype == torch.bfloat16
        assert all(grads[name].dtype == torch.float32 for name in trainable(half))
        pairs = {"y": (y, expected), **{name: (grads[name], truth[name]) for name in grads}}
        return {n: float((got - want).norm() / want.norm()) for n, (got, want) in pairs.items()}

    ours = errors()
    monkeypatch.setattr(experts_file, "LOW_RANK_PACKAGES", ())
    for name, error in errors().items():
        assert ours[name] < 1.5 * error + 1e-3 < 0.1, name


def test_gradient_checkpointing() -> None:
    ours = net("gpt_oss", r=2)
    inputs = batch()
    y, grads = gradients(ours, inputs)
    wrapped = nn.Module()
    wrapped.net = ours
    wrapped.forward = lambda *args: checkpoint(ours, *args, use_reentrant=False)
    again, other = gradients(wrapped, inputs)
    assert bit_equal(y, again)
    assert all(bit_equal(other[n if n in other else f"net.{n}"], g) for n, g in grads.items())


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiles_without_a_graph_break(implementation: str) -> None:
    torch._dynamo.reset()
    ours = net("gpt_oss", implementation, torch.float32, r=3)
    adapt(ours, "second", r=2)
    set_adapter(ours, ["default", "second"])
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    inputs = batch(torch.float32)

    def same() -> Tensor:
        y, grads = gradients(ours, inputs)
        z = compiled(*inputs)
        assert_close(z.detach(), y, 1e-5)
        found = torch.autograd.grad(z.square().sum(), list(trainable(ours).values()))
        for grad, name in zip(found, trainable(ours), strict=True):
            assert_close(grad, grads[name], 1e-4)
        return y

    outputs = [same()]
    for part in ours.experts.adapters["default"].children():
        part.set_scaling(0.3)
    outputs.append(same())
    for active in (["second"], []):
        ours.experts.active_adapters = active
        outputs.append(compiled(*inputs).detach())
        assert_close(outputs[-1], ours(*inputs).detach(), 1e-5)
    assert all((a - b).abs().max() > 1e-2 for a, b in pairwise(outputs))
    assert counter.frame_count == 1  # nothing was compiled again
    assert "gate_up_proj" not in ours.experts.__dict__


@pytest.mark.filterwarnings("ignore:The .grad attribute:")  # torch's own, at every graph break
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_compiles_with_a_graph_break(implementation: str) -> None:
    """The loop over experts breaks on its own; bfloat16 in `grouped_mm` because of dynamo."""
    torch._dynamo.reset()
    ours = net("mixtral", implementation, torch.bfloat16, r=3)
    inputs = batch(torch.bfloat16)
    compiled = torch.compile(ours, backend="eager")
    y, grads = gradients(ours, inputs)
    z = compiled(*inputs)
    assert_close(z.float(), y.float(), 1e-2)
    found = torch.autograd.grad(z.float().square().sum(), list(trainable(ours).values()))
    for grad, name in zip(found, trainable(ours), strict=True):
        assert_close(grad, grads[name], 1e-1)
    assert "gate_up_proj" not in ours.experts.__dict__


# -- the module stays itself -------------------------------------------------------------------


def test_parameters_are_covered_during_forward_only() -> None:
    ours = net("mixtral", r=3)
    parameter = ours.experts.gate_up_proj
    x, index, weights = batch()
    with pytest.raises(RuntimeError):
        ours(x[:, :3], index, weights)
    with pytest.raises(RuntimeError):
        ours.experts(x[:, :3], index, weights)
    assert ours.experts.gate_up_proj is parameter
    assert "gate_up_proj" not in ours.experts.__dict__
    assert not parameter.requires_grad
    assert parameter.grad is None
    for duplicate in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert bit_equal(duplicate(x, index, weights), ours(x, index, weights))
    plain = net("mixtral")
    assert set(plain.state_dict()) < set(ours.state_dict())


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = x @ self.w
        return self(x, depth - 1) @ self.w if depth else x


def test_a_module_that_calls_itself() -> None:
    model = nn.Sequential(Recursive())
    adapt(model, target_parameters=["w"])
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    w = model[0].w + updates(model[0], "w")
    assert_close(model(x), x @ torch.linalg.matrix_power(w, 5), 1e-8)


def test_threads_do_not_see_each_others_covers() -> None:
    ours = net("mixtral", r=3)
    inputs = batch()
    expected, grads = gradients(ours, inputs)
    failures = []

    def work() -> None:
        for _ in range(20):
            y, found = gradients(ours, inputs)
            if not bit_equal(y, expected) or not all(
                bit_equal(found[name], grad) for name, grad in grads.items()
            ):
                failures.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert "gate_up_proj" not in ours.experts.__dict__


def test_experts_that_are_called_twice() -> None:
    ours = net("mixtral", r=3)
    inputs = batch()

    def twice(module: Net) -> Tensor:
        x, index, weights = inputs
        return module.experts(module.experts(x, index, weights), index, weights)

    plain = unload(copy.deepcopy(ours)).requires_grad_(False)
    deltas = []
    for name in ("gate_up_proj", "down_proj"):
        part = ours.experts.adapters["default"].by_weight()[name]
        deltas.append(part.delta_weight())
        plain.experts.__dict__[name] = getattr(plain.experts, name) + deltas[-1]
    wanted = list(trainable(ours).values())
    found = torch.autograd.grad(twice(ours).square().sum(), wanted)
    for grad, expected in zip(
        found, torch.autograd.grad(twice(plain).square().sum(), wanted), strict=True
    ):
        assert_close(grad, expected)


def test_a_tied_parameter_is_not_merged() -> None:
    tied = net("mixtral")
    tied.second = net("mixtral").experts
    tied.second.down_proj = tied.experts.down_proj
    adapt(tied)
    with pytest.raises(AdapterStateError, match="shared with another module"):
        merge_adapter(tied)


def test_an_adapter_on_a_trained_copy() -> None:
    ours = net("mixtral")
    inject_adapter(ours, LoraConfig(target_modules=["proj"], modules_to_save=["experts"]), "copy")
    with torch.no_grad():
        for parameter in ours.experts.adapters["copy"].parameters():
            parameter.mul_(1.5)
    adapt(ours, "low-rank")
    set_adapter(ours, ["copy", "low-rank"])
    x, index, weights = batch()
    plain = net("mixtral").experts
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            value = 1.5 * ours.state_dict()[f"experts.{name}"] + updates(
                ours.experts, name, "low-rank"
            )
            getattr(plain, name).copy_(value)
    assert_close(ours.experts(x, index, weights), plain(x, index, weights))


class Doubling(Adapter):
    """An adapter that is no sum: W' = 2 W."""

    def transform_weight(self, weight: Tensor, base: object) -> Tensor:
        return 2 * weight


def test_adapters_that_are_no_sum_are_folded() -> None:
    ours = net("mixtral", r=3)
    adapter = ours.experts.adapters["default"]
    spec = adapter.by_weight()["gate_up_proj"].spec
    adapter.add_module("gate_up_proj", Doubling(spec))
    ours.experts.active_adapters = ["default"]
    x, index, weights = batch()
    plain = net("mixtral").experts
    with torch.no_grad():
        plain.gate_up_proj.copy_(2 * ours.experts.gate_up_proj)
        plain.down_proj.copy_(ours.experts.down_proj + updates(ours.experts, "down_proj"))
    y = ours.experts(x, index, weights)
    assert_close(y, plain(x, index, weights))
    merge_adapter(ours)
    assert_close(ours.experts(x, index, weights), y)


# -- start values and refusals -----------------------------------------------------------------


@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_start_values(start: bool | str) -> None:
    ours = net("mixtral")
    inject_adapter(
        ours,
        LoraConfig(
            r=8, init_lora_weights=start, target_modules=[], target_parameters=BOTH, use_rslora=True
        ),
    )
    part = ours.experts.adapters["default"].by_weight()["gate_up_proj"]
    assert isinstance(part, LoraExpertsAdapter)
    assert isinstance(ours.experts, AdaptedExperts)
    assert part.scaling == pytest.approx(8 / 8**0.5)
    assert part.lora_A.shape == (8 * EXPERTS, HIDDEN)
    assert part.lora_A.dtype == torch.float64
    std = 1 / 8 if start == "gaussian" else HIDDEN**-0.5 / 3**0.5
    assert part.lora_A.std().item() == pytest.approx(std, rel=0.1)
    bound = (8 * EXPERTS) ** -0.5 / 3**0.5
    assert part.lora_B.std().item() == pytest.approx(0 if start is not False else bound, rel=0.1)
    if start is not False:
        inputs = batch()
        assert bit_equal(ours(*inputs), unload(copy.deepcopy(ours))(*inputs))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_parameters": ["experts.gate_proj"]}, TargetError, "'experts.gate_up_proj'"),
        ({"target_parameters": ["head.bias"]}, TargetError, r"head.bias.*shape \(3,\)"),
        ({"target_parameters": ["listed.0"]}, TargetError, "never called itself"),
        ({"target_parameters": ["weight_hh_l0"]}, TargetError, "read past its name"),
        ({"target_parameters": ["packed"]}, TargetError, "torch.int8"),
        (
            {"target_parameters": ["proj.weight"], "target_modules": ["proj"]},
            TargetError,
            "target_modules has 'proj' already",
        ),
        (
            {"target_parameters": BOTH, "modules_to_save": ["experts"]},
            TargetError,
            "modules_to_save has 'experts' already",
        ),
        ({"target_parameters": "experts.gate_up_proj"}, ConfigError, "it is a list"),
        ({"target_parameters": None}, ConfigError, "nothing would be adapted"),
        ({"target_parameters": BOTH, "lora_dropout": 0.1}, ConfigError, "lora_dropout"),
        ({"target_parameters": BOTH, "use_dora": True}, ConfigError, "use_dora"),
        ({"target_parameters": BOTH, "lora_bias": True}, ConfigError, "lora_bias"),
        ({"target_parameters": BOTH, "init_lora_weights": "pissa"}, ConfigError, "pissa"),
        ({"target_parameters": BOTH, "r": 17}, RankError, "at most 16"),
        (
            {"target_parameters": BOTH, "rank_pattern": {"experts": 2}},
            TargetError,
            "rank_pattern 'experts' fits none",
        ),
    ],
)
def test_refusals_change_nothing(options: dict, error: type[Exception], words: str) -> None:
    module = net("mixtral")
    module.listed = nn.ParameterList([torch.zeros(4, 4)])
    module.rnn = nn.LSTM(4, 4)
    module.packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    module.inner = nn.Module()
    module.inner.packed = module.packed
    before = {name: type(m) for name, m in module.named_modules()}
    with pytest.raises(error, match=words):
        inject_adapter(module, LoraConfig(**{"target_modules": [], **options}))
    assert {name: type(m) for name, m in module.named_modules()} == before
    assert all(p.requires_grad for n, p in module.named_parameters() if "packed" not in n)


def test_rows_and_resized_parameters_are_refused() -> None:
    ours = net("mixtral", r=3)
    inputs = batch()
    ours.experts.row_adapters = ["default", *[None] * (TOKENS - 1)]
    with pytest.raises(AdapterStateError, match="mix the rows"):
        ours(*inputs)
    ours.experts.row_adapters = None
    ours.experts.down_proj = nn.Parameter(ours.experts.down_proj[:2].detach())
    with pytest.raises(AdapterStateError, match=r"shape \(2, 16, 24\).*made for \(4, 16, 24\)"):
        ours(*inputs)


def test_a_parametrization_does_not_hide_an_adapter() -> None:
    ours = net("mixtral", r=3)
    nn.utils.parametrize.register_parametrization(ours.experts, "down_proj", nn.Identity())
    with pytest.raises(AdapterStateError, match="is parametrized, and"):
        ours(*batch())


def test_parts_carry_the_parameter_names() -> None:
    ours = net("mixtral", r=3)
    assert isinstance(ours.experts.adapters["default"], MultiWeightAdapter)
    assert set(trainable(ours)) == {
        f"experts.adapters.default.{parameter}.{tensor}"
        for parameter in ("gate_up_proj", "down_proj")
        for tensor in ("lora_A", "lora_B")
    }
