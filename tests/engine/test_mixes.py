"""Any adapter types together, in any order: against a fold of explicit dense formulas."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lightning
from lora_lightning import (
    active_adapters,
    adapter_names,
    adapter_state_dict,
    adapters_per_row,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    scale_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.checkpoint.fingerprint import base_tensors
from lora_lightning.errors import LoraError
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters
from tests.helpers.tensors import bit_equal, randomize

State = dict[str, Tensor]


def _lora(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    return w + f * 1.5 * s["lora_B"] @ s["lora_A"]


def _dora(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    delta = f * 1.5 * s["lora_B"] @ s["lora_A"]
    gain = s["lora_magnitude_vector"] / (base + delta).norm(dim=1)
    return gain[:, None] * (w + delta)


def _loha(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    one = s["hada_w1_a"] @ s["hada_w1_b"]
    return w + f * 1.5 * one * (s["hada_w2_a"] @ s["hada_w2_b"])


def _lokr(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    return w + f * 1.5 * torch.kron(s["lokr_w1"], s["lokr_w2"])


def _adalora(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    return w + f * 3 / (2 + 1e-5) * s["lora_B"] @ (s["lora_A"] * s["lora_E"])


def _oft(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    q = torch.zeros(w.shape[1], w.shape[1], dtype=w.dtype)  # blocks of 2
    for i, (value,) in enumerate(s["oft_R"].tolist()):
        q[2 * i, 2 * i + 1], q[2 * i + 1, 2 * i] = value, -value
    one = torch.eye(len(q), dtype=w.dtype)
    return w @ ((one - q) @ torch.linalg.inv(one + q)).t()


def _shira(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    result = w.clone()
    for value, row, column in zip(s["shira_weight"], *s["shira_indices"].long(), strict=True):
        result[row, column] += f * value
    return result


def _ia3(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    return w * s["ia3_l"]


def _vera(w: Tensor, base: Tensor, s: State, f: float) -> Tensor:
    a, b = s["vera_A"][:, : w.shape[1]], s["vera_B"][: w.shape[0]]
    return w + f * s["vera_lambda_b"][:, None] * (b @ (s["vera_lambda_d"][:, None] * a))


# Type: (config class, options, the weight after it from: weight, base weight, tensors, factor).
MIXED: dict[str, tuple[str, dict, Callable[..., Tensor]]] = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 3}, _lora),
    "dora": ("LoraConfig", {"r": 2, "lora_alpha": 3, "use_dora": True}, _dora),
    "loha": ("LohaConfig", {"r": 2, "alpha": 3}, _loha),
    "lokr": ("LokrConfig", {"r": 2, "alpha": 3}, _lokr),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 2, "target_r": 1, "lora_alpha": 3, "total_step": 9},
        _adalora,
    ),
    "oft": ("OftConfig", {"oft_block_size": 2, "use_cayley_neumann": False}, _oft),
    "shira": ("ShiraConfig", {"r": 1}, _shira),
    "ia3": ("Ia3Config", {"feedforward_modules": []}, _ia3),
    "vera": ("VeraConfig", {"r": 2}, _vera),
}


def config_for(kind: str, **options) -> lora_lightning.AdapterConfig:
    name, own, _ = MIXED[kind]
    return getattr(lora_lightning, name)(**{"target_modules": ["proj", "out"], **own, **options})


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.proj(x)))


def dense(base: nn.Module, layers: list[tuple[str, str, State, float]]) -> nn.Module:
    """`base` with the fold of the adapters (name, kind, tensors, factor) in its weights."""
    result = copy.deepcopy(base)
    for path in ("proj", "out"):
        own = base.get_submodule(path)
        weight, bias = own.weight.detach(), own.bias.detach()
        for _, kind, state, factor in layers:
            here = {k.removeprefix(path + "."): t for k, t in state.items() if k.startswith(path)}
            shared = {k.rpartition(".")[2]: t for k, t in state.items() if "projections" in k}
            if here:
                here |= shared  # vera_A and vera_B, which the layers have in common
                weight = MIXED[kind][2](weight, own.weight.detach(), here, factor)
                bias = BIAS.get(kind, lambda b, _: b)(bias, here)
        result.get_submodule(path).weight.data = weight
        result.get_submodule(path).bias.data = bias
    return result


BIAS: dict[str, Callable[[Tensor, State], Tensor]] = {
    "ia3": lambda bias, s: bias * s["ia3_l"].flatten()
}


def adapted(kinds: tuple[str, ...], **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    base = Two().double()
    model = copy.deepcopy(base)
    for kind in kinds:
        inject_adapter(model, config_for(kind, **options), kind)
    set_adapter(model, list(kinds))
    randomize([p for p in model.parameters() if p.requires_grad], 0.4)
    return base, model


@pytest.mark.slow
@pytest.mark.parametrize("kinds", list(itertools.permutations(MIXED, 2)), ids="-".join)
def test_two_types_on_the_same_modules(kinds: tuple[str, str], tmp_path) -> None:
    base, model = adapted(kinds)
    x = torch.randn(5, 6, dtype=torch.float64)
    layers = [(kind, kind, adapter_state_dict(model, kind), 1.0) for kind in kinds]
    expected = dense(base, layers)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    set_adapter(model, kinds[::-1])  # the order of addition counts, not of activation
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)

    save_adapter(model, tmp_path, list(kinds))
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path) == list(kinds)
    set_adapter(again, list(kinds))
    assert bit_equal(again(x), model(x))

    merge_adapter(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    unmerge_adapter(model)
    with disable_adapter(model):
        assert bit_equal(model(x), base(x))
    rows = [kinds[0], None, kinds[1], kinds[0], None]
    with adapters_per_row(model, rows):
        mixed = model(x)
    for i, name in enumerate(rows):
        set_adapter(model, [] if name is None else name)
        torch.testing.assert_close(mixed[i], model(x)[i], rtol=1e-12, atol=1e-12)
    delete_adapter(model, kinds[0])
    set_adapter(model, kinds[1])
    torch.testing.assert_close(model(x), dense(base, layers[1:])(x), rtol=1e-9, atol=1e-9)
    folded = merge_and_unload(model)
    assert type(folded.proj) is nn.Linear


NAMES = st.sampled_from(["a", "b", "proj"])


class Mixes(RuleBasedStateMachine):
    """Random sequences over random types; the model against the dense fold, the base bit by bit."""

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.base = Two().double()
        self.model = copy.deepcopy(self.base)
        self.kinds: dict[str, str] = {}  # in the order of addition
        self.factors: dict[str, float] = {}
        self.x = torch.randn(5, 6, dtype=torch.float64)

    def attempt(self, action: Callable[..., object], *args: object) -> bool:
        """Run it; a refusal is fine if it changes nothing."""
        before = {k: t.clone() for k, t in self.model.state_dict().items()}
        active = active_adapters(self.model)
        try:
            action(self.model, *args)
        except LoraError:
            after = self.model.state_dict()
            assert before.keys() == after.keys()
            assert all(bit_equal(t, after[k]) for k, t in before.items())
            assert active == active_adapters(self.model)
            return False
        return True

    def merged(self) -> bool:
        return any(layer.merged_adapters for _, layer in named_adapted_layers(self.model))

    @rule(name=NAMES, kind=st.sampled_from(sorted(MIXED)), where=st.sampled_from(["proj", "both"]))
    def inject(self, name: str, kind: str, where: str) -> None:
        targets = ["proj"] if where == "proj" else ["proj", "out"]
        if self.attempt(inject_adapter, config_for(kind, target_modules=targets), name):
            self.kinds[name], self.factors[name] = kind, 1.0
            own = (p for k, p in named_parameters(self.model) if f".adapters.{name}." in k)
            randomize([p for p in own if p.is_floating_point()], 0.2)

    @rule(names=st.lists(NAMES, max_size=3, unique=True))
    def switch(self, names: list[str]) -> None:
        self.attempt(set_adapter, names)

    @precondition(lambda self: not self.merged())
    @rule()
    def train(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if parameters and self.kinds:
            self.model.zero_grad()
            self.model(self.x).square().mean().backward()
            torch.optim.SGD(parameters, lr=0.05).step()

    @rule(name=NAMES, factor=st.sampled_from([0.0, 0.5, 1.0]))
    def rescale(self, name: str, factor: float) -> None:
        if self.attempt(scale_adapter, name, factor):
            self.factors[name] = factor

    @rule(name=st.none() | NAMES, times=st.sampled_from([1, 10]))
    def merge(self, name: str | None, times: int) -> None:
        for _ in range(times):
            self.attempt(merge_adapter, name)
            if times > 1:
                unmerge_adapter(self.model)

    @rule()
    def unmerge(self) -> None:
        unmerge_adapter(self.model)

    @rule()
    def disable(self) -> None:
        with disable_adapter(self.model):
            assert bit_equal(self.model(self.x), self.base(self.x))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if self.attempt(delete_adapter, name):
            del self.kinds[name], self.factors[name]

    @precondition(lambda self: self.kinds and not self.merged())
    @rule(data=st.data())
    def save_and_load(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.kinds)))
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.model, folder, name)
            other = copy.deepcopy(self.base)
            load_adapter(other, folder, name)
            found = adapter_state_dict(other, name)
            for key, tensor in adapter_state_dict(self.model, name).items():
                assert bit_equal(found[key], tensor)

    @invariant()
    def output_is_the_dense_fold(self) -> None:
        if hasattr(self, "model"):
            assert set(adapter_names(self.model)) == set(self.kinds)
            active = active_adapters(self.model)
            layers = [
                (name, kind, adapter_state_dict(self.model, name), self.factors[name])
                for name, kind in self.kinds.items()
                if name in active
            ]
            expected = dense(self.base, layers)(self.x)
            torch.testing.assert_close(self.model(self.x), expected, rtol=1e-8, atol=1e-8)

    @invariant()
    def base_is_untouched(self) -> None:
        if hasattr(self, "model"):
            found = dict(base_tensors(self.model))
            for key, tensor in self.base.state_dict().items():
                assert bit_equal(found[key].contiguous(), tensor)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            unload(self.model)
            for before, after in zip(self.base.modules(), self.model.modules(), strict=True):
                assert type(before) is type(after)
                assert before.__dict__.keys() == after.__dict__.keys()
            for key, tensor in self.base.state_dict().items():
                assert bit_equal(self.model.state_dict()[key], tensor)


TestMixes = pytest.mark.slow(Mixes.TestCase)
TestMixes.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, derandomize=True, database=None
)


class Kinds(nn.Module):
    """One module of every kind; in half precision, where drift would show."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 8)
        self.gpt2 = Conv1D(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gpt2(self.linear(self.embed(ids)))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


ON_KINDS = {
    "lora": ["embed", "linear", "gpt2", "conv", "attention"],
    "dora": ["embed", "linear", "gpt2", "conv"],
    "loha": ["linear", "gpt2", "conv", "attention"],
    "lokr": ["linear", "gpt2", "conv", "attention"],
    "adalora": ["linear", "gpt2", "attention"],
    "oft": ["linear", "gpt2", "conv", "attention"],
    "shira": ["linear", "gpt2", "attention"],
    "ia3": ["linear", "gpt2", "conv", "attention"],
    "vera": ["linear", "gpt2", "attention"],
}


class BaseInHalf(RuleBasedStateMachine):
    """Base tensors stay bit-identical in bf16 whatever is done on whatever kind of module."""

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.base = Kinds().bfloat16()
        self.model = copy.deepcopy(self.base)
        self.ids = torch.arange(8).view(2, 4)
        self.objects = {k: id(p) for k, p in self.model.named_parameters()}

    @rule(name=NAMES, kind=st.sampled_from(sorted(ON_KINDS)), data=st.data())
    def inject(self, name: str, kind: str, data) -> None:
        targets = data.draw(st.lists(st.sampled_from(ON_KINDS[kind]), min_size=1, unique=True))
        try:
            inject_adapter(self.model, config_for(kind, target_modules=targets), name)
        except LoraError:
            return
        randomize([p for k, p in named_parameters(self.model) if f".adapters.{name}." in k], 0.2)

    @rule(names=st.lists(NAMES, max_size=3, unique=True))
    def switch(self, names: list[str]) -> None:
        with_names = [name for name in names if name in adapter_names(self.model)]
        if not any(layer.merged_adapters for _, layer in named_adapted_layers(self.model)):
            set_adapter(self.model, with_names)

    @rule()
    def train(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        merged = any(layer.merged_adapters for _, layer in named_adapted_layers(self.model))
        if parameters and adapter_names(self.model) and not merged:
            self.model.zero_grad()
            self.model(self.ids).float().square().mean().backward()
            torch.optim.SGD(parameters, lr=0.05).step()

    @rule(times=st.sampled_from([1, 10]))
    def merge(self, times: int) -> None:
        for _ in range(times):
            try:
                merge_adapter(self.model)
            except LoraError:
                return
            self.model(self.ids)
            if times > 1:
                unmerge_adapter(self.model)

    @rule()
    def unmerge(self) -> None:
        unmerge_adapter(self.model)

    @rule()
    def disable(self) -> None:
        with disable_adapter(self.model):
            assert bit_equal(self.model(self.ids), self.base(self.ids))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        try:
            delete_adapter(self.model, name)
        except LoraError:
            return

    @invariant()
    def base_is_untouched(self) -> None:
        if hasattr(self, "model"):
            found = dict(base_tensors(self.model))
            for key, tensor in self.base.state_dict().items():
                assert bit_equal(found[key].contiguous(), tensor), key
            for key, parameter in self.model.named_parameters():
                if key in self.objects:
                    assert id(parameter) == self.objects[key]

    def teardown(self) -> None:
        if hasattr(self, "model"):
            unload(self.model)
            assert list(self.model.state_dict()) == list(self.base.state_dict())
            for key, tensor in self.base.state_dict().items():
                assert bit_equal(self.model.state_dict()[key], tensor)


TestBaseInHalf = pytest.mark.slow(BaseInHalf.TestCase)
TestBaseInHalf.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, derandomize=True, database=None
)
