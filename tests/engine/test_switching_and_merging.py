"""Whatever is done to the adapters, the base comes back bit for bit, and outputs are as written."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from lora_lightning import (
    LoraConfig,
    active_adapters,
    adapter_names,
    adapter_state_dict,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.checkpoint.fingerprint import base_tensors
from lora_lightning.errors import AdapterMismatchError, AdapterStateError, LoraError
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters
from tests.helpers.adapted_models import adapted
from tests.helpers.tensors import assert_bit_equal, bit_equal, copied_state, randomize, trainable
from tests.helpers.torch_models import WIDTH, OneLayerNet, Transformer, example_input, token_ids

# -- any sequence of operations ----------------------------------------------------------------

KINDS = {
    "qv": {"target_modules": ["q", "v"]},
    "many": {"target_modules": ["q", "mlp.0", "embed"], "use_rslora": True},
    "head": {"target_modules": ["out"], "modules_to_save": ["head"]},
    "bias": {"target_modules": ["k"], "bias": "all"},
}
NAMES = st.sampled_from(["a", "b", "attn"])


class Adapters(RuleBasedStateMachine):
    """Compares the model with a plain one whose weights are computed from the adapters' tensors."""

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.base = Transformer(depth=1).double()
        self.model = copy.deepcopy(self.base)
        self.configs: dict[str, LoraConfig] = {}
        self.ids = token_ids()
        self.plain = self.base(self.ids).detach()

    def expected(self) -> Tensor:
        weights = copied_state(self.base)
        active = active_adapters(self.model)
        for name in sorted(active, key=lambda name: bool(self.configs[name].modules_to_save)):
            config, state = self.configs[name], adapter_state_dict(self.model, name)
            scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
            for key, a in state.items():
                path, _, tensor = key.rpartition(".")
                if tensor in ("lora_A", "lora_embedding_A"):
                    delta = scale * state[key[:-1] + "B"] @ a
                    wide = tensor == "lora_embedding_A" or path.endswith("mlp.0")
                    weights[f"{path}.weight"] = weights[f"{path}.weight"] + (
                        delta.T if wide else delta
                    )
                elif tensor in ("weight", "bias"):
                    weights[key] = a
        return torch.func.functional_call(self.base, weights, (self.ids,)).detach()

    def attempt(self, action, *args) -> bool:
        """Run it; a refusal is fine if it changes nothing."""
        before, active = copied_state(self.model), active_adapters(self.model)
        grads = list(trainable(self.model))
        try:
            action(self.model, *args)
        except AdapterStateError:
            assert_bit_equal(copied_state(self.model), before)
            assert (active, grads) == (active_adapters(self.model), list(trainable(self.model)))
            return False
        return True

    def merged(self) -> bool:
        return any(layer.merged_adapters for _, layer in named_adapted_layers(self.model))

    @rule(name=NAMES, kind=st.sampled_from(sorted(KINDS)), r=st.integers(1, 3))
    def inject(self, name: str, kind: str, r: int) -> None:
        config = LoraConfig(r=r, lora_alpha=3, **KINDS[kind])
        if self.attempt(inject_adapter, config, name):
            self.configs[name] = config
            randomize(
                (p for key, p in named_parameters(self.model) if f".adapters.{name}." in key), 0.2
            )

    @rule(names=st.lists(NAMES, max_size=3, unique=True), trainable=st.booleans())
    def switch(self, names: list[str], trainable: bool) -> None:
        def action(model):
            set_adapter(model, names, trainable=trainable)

        if self.attempt(action):
            assert set(active_adapters(self.model)) == set(names)

    @precondition(lambda self: not self.merged())
    @rule()
    def train(self) -> None:
        parameters = list(trainable(self.model).values())
        if parameters and self.configs:  # a model that never had adapters is not frozen
            self.model.zero_grad()
            self.model(self.ids).square().mean().backward()
            torch.optim.SGD(parameters, lr=0.05).step()

    @rule(name=st.none() | NAMES)
    def merge(self, name: str | None) -> None:
        self.attempt(merge_adapter, name)

    @rule()
    def unmerge(self) -> None:
        unmerge_adapter(self.model)
        assert not self.merged()

    @rule()
    def disable(self) -> None:
        before, grads = copied_state(self.model), list(trainable(self.model))
        with disable_adapter(self.model):
            assert bit_equal(self.model(self.ids), self.plain)
            with disable_adapter(self.model):
                assert bit_equal(self.model(self.ids), self.plain)
            assert bit_equal(self.model(self.ids), self.plain)
        assert_bit_equal(copied_state(self.model), before)
        assert grads == list(trainable(self.model))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if self.attempt(delete_adapter, name):
            del self.configs[name]

    @precondition(lambda self: self.configs)
    @rule(data=st.data())
    def save_and_load(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.configs)))
        if not self.merged():
            state = {k: v.clone() for k, v in adapter_state_dict(self.model, name).items()}
            load_adapter_state_dict(self.model, {k: v + 1 for k, v in state.items()}, name)
            load_adapter_state_dict(self.model, state, name)
            assert_bit_equal(adapter_state_dict(self.model, name), state)

    @rule()
    def fold_a_copy(self) -> None:
        folded = merge_and_unload(copy.deepcopy(self.model))
        torch.testing.assert_close(folded(self.ids), self.expected(), rtol=1e-9, atol=1e-9)
        assert [type(m) for m in folded.modules()] == [type(m) for m in self.base.modules()]
        assert list(folded.state_dict()) == list(self.base.state_dict())

    @invariant()
    def output_is_what_the_tensors_say(self) -> None:
        if hasattr(self, "model"):
            assert set(adapter_names(self.model)) == set(self.configs)
            torch.testing.assert_close(self.model(self.ids), self.expected(), rtol=1e-9, atol=1e-9)

    @invariant()
    def base_is_untouched(self) -> None:
        if hasattr(self, "model"):
            expected, found = copied_state(self.base), dict(base_tensors(self.model))
            # What a trained copy replaces is left out; the teardown looks at it.
            assert {key for key in expected if not key.startswith("head.")} <= set(found)
            assert_bit_equal(found, {key: expected[key] for key in found})

    def teardown(self) -> None:
        if hasattr(self, "model"):
            unload(self.model)
            assert_bit_equal(copied_state(self.model), copied_state(self.base))
            for before, after in zip(self.base.modules(), self.model.modules(), strict=True):
                assert type(before) is type(after)
                assert before.__dict__.keys() == after.__dict__.keys()


TestAdapters = pytest.mark.slow(Adapters.TestCase)
TestAdapters.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, derandomize=True, database=None
)


# -- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["linear", "conv1d", "embedding", "embedding-scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ten_merges_leave_no_drift(layer, dtype):
    model = OneLayerNet(layer).to(dtype)
    before = copied_state(model)
    adapted(model, target_modules=["proj"])
    x = example_input(layer, dtype)
    first = model(x)
    for _ in range(10):
        merge_adapter(model)
        assert not torch.equal(model.layers[0].proj.weight, before["layers.0.proj.weight"])
        unmerge_adapter(model)
    assert bit_equal(model(x), first)
    assert_bit_equal(
        {n: t for n, t in copied_state(model).items() if ".adapters." not in n}, before
    )


def test_subtracting_would_drift():
    """The negative control: what unmerging by subtraction leaves behind in bf16."""
    weight, delta = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    again = weight.clone()
    for _ in range(10):
        again = (again + delta) - delta
    assert not torch.equal(again, weight)


def test_merging_in_bf16_rounds_once():
    model = adapted(nn.Sequential(nn.Linear(16, 16).bfloat16()), r=4)
    weight = model[0].weight.detach().clone()
    adapter = model[0].adapters["default"]
    merge_adapter(model)
    exact = weight.double() + adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    wrong = (model[0].weight.double() - exact).abs() > exact.abs() * 2**-8
    assert not wrong.any()


def test_merging_twice_and_one_after_the_other():
    model = adapted(nn.Sequential(nn.Linear(6, 5)).double())
    adapted(model, "second", lora_alpha=3)
    set_adapter(model, ["default", "second"])
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    merge_adapter(model, "second")
    torch.testing.assert_close(model(x), expected)
    merge_adapter(model, "second")
    merge_adapter(model)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)
    assert [h.merged_adapters for _, h in named_adapted_layers(model)] == [["default", "second"]]


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("target", ["embed", "head"])
def test_tied_weights_are_not_merged(target):
    model = adapted(tied(), target_modules=[target])
    before = copied_state(model)
    for merge in (merge_adapter, merge_and_unload):
        with pytest.raises(AdapterStateError) as caught:
            merge(model)
        assert f"The weight of {target!r} is shared with another module" in str(caught.value)
        assert "Untie them first" in str(caught.value)
        assert_bit_equal(copied_state(model), before)
    assert active_adapters(model) == ["default"]


def test_values_that_are_not_finite_are_not_merged():
    model = adapted(Transformer(), target_modules=["q", "k"])
    before = copied_state(model)
    model.layers[1].attn.k.adapters["default"].lora_B.data[0, 0] = float("nan")
    broken = copied_state(model)
    for merge in (merge_adapter, merge_and_unload):
        with pytest.raises(AdapterStateError) as caught:
            merge(model)
        assert "values that are not finite" in str(caught.value)
        assert_bit_equal(copied_state(model), broken)
        assert not any(layer.merged_adapters for _, layer in named_adapted_layers(model))
    assert bit_equal(model.layers[0].attn.q.weight, before["layers.0.attn.q.weight"])


def test_a_refused_merge_and_unload_leaves_the_active_adapters_alone():
    model = adapted(Transformer(), target_modules=["q"])
    adapted(model, "broken", target_modules=["q"])
    model.layers[0].attn.q.adapters["broken"].lora_A.data.fill_(float("inf"))
    with pytest.raises(AdapterStateError):
        merge_and_unload(model, "broken")
    assert active_adapters(model) == ["default"]
    assert all(".default." in name for name in trainable(model))


def test_overflow_of_a_narrow_weight_is_refused():
    model = nn.Sequential(nn.Linear(4, 4).half())
    inject_adapter(model, LoraConfig(r=2))
    for parameter in trainable(model).values():
        parameter.data.fill_(400)  # delta = scaling 4 * r 2 * 160,000: finite in fp32, not in fp16
    before = model[0].weight.detach().clone()
    with pytest.raises(AdapterStateError, match="not finite"):
        merge_adapter(model)
    assert bit_equal(model[0].weight, before)


def test_parametrized_and_meta_weights_are_not_merged():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    inject_adapter(model, LoraConfig(r=2, target_modules=r"0"))
    with pytest.raises(AdapterStateError, match="computed from other tensors"):
        merge_adapter(model)
    meta = nn.Sequential(nn.Linear(4, 4, device="meta"))
    inject_adapter(meta, LoraConfig(r=2))
    with pytest.raises(AdapterStateError, match="meta device"):
        merge_adapter(meta)


STATE_ERRORS = {  # what is done to a model with adapters "one" (active, merged) and "two": words
    "switch": (
        lambda model: set_adapter(model, "two"),
        ["Adapters ['one'] are merged into the base", "call unmerge_adapter(model) before"],
    ),
    "delete": (
        lambda model: delete_adapter(model, "one"),
        ["Adapters ['one'] are merged", "Call unmerge_adapter(model) first"],
    ),
    "inject": (
        lambda model: inject_adapter(model, LoraConfig(r=1, target_modules=["q"]), "three"),
        ["Adapters ['one'] are merged", "Call unmerge_adapter(model) first"],
    ),
    "inject again": (
        lambda model: inject_adapter(model, LoraConfig(r=1), "one"),
        ["already has an adapter 'one'", "delete_adapter(model, 'one')", "another name"],
    ),
    "merge inactive": (
        lambda model: merge_adapter(model, "two"),
        ["Adapter 'two' is not active (active: ['one'])", "set_adapter(model, 'two')"],
    ),
    "unknown": (
        lambda model: set_adapter(model, "ones"),
        ["No adapter 'ones'; the model has ['one', 'two'].", "Did you mean 'one'?"],
    ),
    "delete unknown": (
        lambda model: delete_adapter(model, "five"),
        ["The model has no adapter 'five'; it has ['one', 'two']."],
    ),
    "state of unknown": (
        lambda model: adapter_state_dict(model, "five"),
        ["No adapter 'five'; the model has ['one', 'two']."],
    ),
}


@pytest.mark.parametrize(("action", "words"), STATE_ERRORS.values(), ids=STATE_ERRORS)
def test_message(action, words):
    model = adapted(Transformer(), "one", target_modules=["q"])
    adapted(model, "two", target_modules=["q", "k"])
    merge_adapter(model)
    before = copied_state(model)
    with pytest.raises(LoraError) as caught:
        action(model)
    for word in words:
        assert word in str(caught.value)
    assert_bit_equal(copied_state(model), before)
    assert active_adapters(model) == ["one"]


def test_two_copies_of_one_module_cannot_both_be_active():
    model = adapted(Transformer(), "one", target_modules=["q"], modules_to_save=["head"])
    adapted(model, "two", target_modules=["q"], modules_to_save=["head"])
    with pytest.raises(AdapterStateError) as caught:
        set_adapter(model, ["one", "two"])
    assert "Adapters ['one', 'two'] each train 'head' in full" in str(caught.value)
    assert active_adapters(model) == ["one"]


def test_state_that_does_not_fit_names_every_difference():
    model = adapted(Transformer(), target_modules=["q"])
    state = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    wrong = dict(state, **{"x.lora_A": torch.zeros(2)})
    del wrong["layers.0.attn.q.lora_A"]
    wrong["layers.1.attn.q.lora_B"] = torch.zeros(WIDTH, 5)
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter_state_dict(model, {k: v + 1 for k, v in wrong.items()})
    text = str(caught.value)
    assert "does not fit adapter 'default'" in text
    assert "missing in the checkpoint: layers.0.attn.q.lora_A" in text
    assert "only in the checkpoint: x.lora_A" in text
    assert "other shape: layers.1.attn.q.lora_B [8, 5] in the checkpoint, [8, 2] here" in text
    assert_bit_equal(adapter_state_dict(model), state)


# -- faults of peft that must not come back ----------------------------------------------------


@pytest.mark.parametrize("action", [merge_adapter, merge_and_unload])
def test_nothing_is_merged_below_a_trained_copy(action):
    model = adapted(Transformer(), "one", target_modules=["q"], modules_to_save=["head"])
    adapted(model, "two", target_modules=["head"])
    set_adapter(model, ["one", "two"])
    before, output = copied_state(model), model(token_ids())
    with pytest.raises(AdapterStateError, match="'one' has a trained copy in the place of 'head'"):
        action(model)
    assert_bit_equal(copied_state(model), before)
    assert bit_equal(model(token_ids()), output)


def test_whatever_goes_wrong_in_merging_leaves_nothing_merged():
    model = adapted(Transformer(), "one", target_modules=["q"])
    inject_adapter(model, LoraConfig(r=2, target_modules=["k"]), "empty", low_cpu_mem_usage=True)
    set_adapter(model, ["one", "empty"])
    before = model.layers[0].attn.q.weight.clone()
    with pytest.raises(AdapterStateError, match="on the meta device"):
        merge_adapter(model)
    assert bit_equal(model.layers[0].attn.q.weight, before)
    assert not any(layer.merged_adapters for _, layer in named_adapted_layers(model))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_disabling_leaves_requires_grad_as_it_was(is_trainable):
    """peft: a frozen adapter comes out of `disable_adapter` trainable."""
    model = adapted(Transformer(), target_modules=["q"], bias="all", modules_to_save=["head"])
    set_adapter(model, "default", trainable=is_trainable)
    before = {p: p.requires_grad for p in model.parameters()}
    assert any(before.values()) is is_trainable
    with disable_adapter(model):
        assert {p: p.requires_grad for p in model.parameters()} == before
    assert {p: p.requires_grad for p in model.parameters()} == before


def test_disabling_ends_with_an_exception_too():
    model = adapted(Transformer(), target_modules=["q"], bias="all")
    merge_adapter(model)
    before, expected = copied_state(model), model(token_ids())
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert_bit_equal(copied_state(model), before)
    assert bit_equal(model(token_ids()), expected)


def test_no_state_is_loaded_into_a_merged_adapter():
    model = adapted(Transformer(), target_modules=["q"])
    state = {name: tensor + 1 for name, tensor in adapter_state_dict(model).items()}
    merge_adapter(model)
    with pytest.raises(AdapterStateError, match="'default' is merged into the base"):
        load_adapter_state_dict(model, state)
    unmerge_adapter(model)
    load_adapter_state_dict(model, state)
    assert_bit_equal(adapter_state_dict(model), state)


def test_a_saved_head_does_not_take_overhead_along():
    model = nn.ModuleDict({n: nn.Linear(3, 3) for n in ("head", "overhead", "subhead", "q")})
    adapted(model, target_modules=["q"], modules_to_save=["head"])
    assert {path for path, _ in named_adapted_layers(model)} == {"head", "q"}
    assert {name.split(".")[0] for name in trainable(model)} == {"head", "q"}


@pytest.mark.parametrize("name", ["lin", "lora_A", "module", "weight", "default", "adapters"])
def test_an_adapter_named_like_a_part_saves_what_is_its_own(name):
    """peft tells adapters apart by substrings of the names of their tensors."""
    model = nn.ModuleDict(
        {"lin": nn.Linear(3, 3), "lin2": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    )
    adapted(model, "other", target_modules=["lin", "lin2"], modules_to_save=["head"])
    adapted(model, name, target_modules=["lin"], modules_to_save=["head"])
    state = adapter_state_dict(model, name)
    assert set(state) == {"lin.lora_A", "lin.lora_B", "head.weight", "head.bias"}
    assert bit_equal(state["lin.lora_A"], model["lin"].adapters[name].lora_A)
    assert len(adapter_state_dict(model, "other")) == 6
    fresh = nn.ModuleDict(
        {"lin": nn.Linear(3, 3), "lin2": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    )
    inject_adapter(fresh, LoraConfig(r=2, target_modules=["lin"], modules_to_save=["head"]), name)
    load_adapter_state_dict(fresh, state, name)
    assert_bit_equal(adapter_state_dict(fresh, name), state)


def test_max_norm_does_not_touch_the_adapter():
    """peft renormalises lora_embedding_A in place on every forward."""
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5))
    adapted(model, target_modules=["0"])
    adapter = model[0].adapters["default"]
    before = adapter.lora_embedding_A.detach().clone()
    ids = torch.arange(9)
    base = nn.functional.embedding(ids, model[0].weight.detach().clone(), max_norm=0.5)
    found = model(ids)
    assert bit_equal(adapter.lora_embedding_A, before)
    delta = adapter.scaling * (adapter.lora_embedding_B @ before).T
    torch.testing.assert_close(found, base + delta)


def test_max_norm_and_merging_agree_or_merging_is_refused():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5))
    adapted(model, target_modules=["0"])
    expected = model(torch.arange(9)).detach()
    try:
        merge_adapter(model)
    except AdapterStateError:
        return
    torch.testing.assert_close(model(torch.arange(9)), expected)


# -- switching and disabling --------------------------------------------------------------------


def test_policy_and_reference_in_one_graph():
    """DPO, KTO and KL penalties: a disabled forward between a forward and its backward."""
    for bias in ("none", "all"):
        model = adapted(Transformer(), target_modules=["q"], bias=bias)
        policy = model(token_ids())
        with disable_adapter(model), torch.no_grad():
            reference = model(token_ids())
        (policy - reference).square().mean().backward()
        assert all(p.grad is not None for p in trainable(model).values()), bias


def test_switching_inside_disable_acts_afterwards_or_is_refused():
    ids = token_ids()
    model = adapted(Transformer(), "one", target_modules=["q"])
    adapted(model, "two", target_modules=["k"], bias="all")
    set_adapter(model, "two")
    randomize(p for name, p in trainable(model).items() if name.endswith("bias"))
    expected = model(ids)
    set_adapter(model, [])
    base = model(ids)
    set_adapter(model, "one")
    before = model(ids)
    with disable_adapter(model):
        try:
            set_adapter(model, "two")
        except AdapterStateError:
            expected = before
        assert bit_equal(model(ids), base)
    assert bit_equal(model(ids), expected)


@pytest.mark.parametrize("action", [merge_adapter, unload, merge_and_unload, unmerge_adapter])
def test_other_actions_inside_disable_act_afterwards_or_are_refused(action):
    ids = token_ids()
    model = Transformer()
    base = model(ids)
    adapted(model, target_modules=["q"])
    expected = model(ids)
    with disable_adapter(model):
        try:
            action(model)
        except AdapterStateError:
            action = merge_adapter
        if action is not merge_and_unload:
            assert bit_equal(model(ids), base)
    torch.testing.assert_close(model(ids), base if action is unload else expected)
    unload(model)
    assert all("enabled" not in key for module in model.modules() for key in module.__dict__)


def test_merging_under_autocast_is_as_exact():
    model = adapted(nn.Sequential(nn.Linear(16, 16)), r=4)
    merge_adapter(model)
    expected = copied_state(model)
    with torch.autocast("cpu", torch.bfloat16), disable_adapter(model):
        pass
    assert_bit_equal(copied_state(model), expected)
    unmerge_adapter(model)
    with torch.autocast("cpu", torch.bfloat16):
        merge_adapter(model)
    assert_bit_equal(copied_state(model), expected)


def test_a_module_wrapped_later_is_not_merged_for_good():
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    before = copied_state(model)
    nn.utils.parametrize.register_parametrization(model[1], "bias", nn.Tanh())
    with pytest.raises(AdapterStateError, match="was wrapped by other code"):
        merge_and_unload(model)
    assert bit_equal(model[0].weight, before["0.weight"])
    assert bit_equal(model[1].weight, before["1.weight"])
