"""Biases of the base that train: with their adapter they come, go, merge and are frozen again."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_lightning import (
    Ia3Config,
    LoraConfig,
    adapter_names,
    adapter_state_dict,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.checkpoint.fingerprint import base_tensors
from lora_lightning.engine.switching import set_trainable
from lora_lightning.errors import AdapterStateError
from tests.helpers.adapted_models import adapted
from tests.helpers.tensors import assert_bit_equal, bit_equal, copied_state, randomize, trainable
from tests.helpers.torch_models import Transformer, token_ids


def train(model: nn.Module, *inputs: Tensor) -> None:
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    model(*inputs).square().mean().backward()
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize("option", ["lora_only", "all"])
def test_trained_biases_go_and_come_back(option):
    base = Transformer()
    model = adapted(copy.deepcopy(base), target_modules=["q", "mlp.0"], bias=option)
    ids = token_ids()
    names = {name for name in trainable(model) if ".adapters." not in name}
    every = {name for name, _ in base.named_parameters() if name.endswith("bias")}
    adapted_too = {name for name in every if name.endswith(("q.bias", "mlp.0.bias"))}
    assert names == (every if option == "all" else adapted_too)
    train(model, ids)
    trained = {name: model.get_parameter(name).detach().clone() for name in names}
    moved = [not torch.equal(value, base.get_parameter(name)) for name, value in trained.items()]
    assert any(moved)
    found = model(ids)
    with disable_adapter(model):
        assert bit_equal(model(ids), base(ids))
    assert bit_equal(model(ids), found)
    set_adapter(model, [])
    assert bit_equal(model(ids), base(ids))
    assert_bit_equal({k: v for k, v in adapter_state_dict(model).items() if k in names}, trained)
    set_adapter(model, "default")
    assert bit_equal(model(ids), found)
    folded = merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(folded(ids), found)
    unload(model)
    assert_bit_equal(copied_state(model), copied_state(base))


def test_one_bias_cannot_train_with_two_adapters():
    model = adapted(Transformer(), "one", target_modules=["q"], bias="lora_only")
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(AdapterStateError) as caught:
        inject_adapter(model, LoraConfig(r=2, target_modules=["q", "k"], bias="lora_only"), "two")
    text = str(caught.value)
    assert "The bias of 'layers.0.attn.q' already trains with adapter 'one'" in text
    assert "it cannot also train with 'two'" in text
    assert "Use bias='none' for one of them. (lora.bias)" in text
    assert adapter_names(model) == ["one"]  # everything is checked before anything is touched
    assert before == [(n, type(m)) for n, m in model.named_modules()]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q"], bias="all", lora_bias=True),
        Ia3Config(target_modules=["q"], feedforward_modules=[], bias="all"),
    ],
    ids=lambda config: config.peft_type,
)
def test_a_trained_bias_that_is_merged_into_goes_and_comes_back(config):
    base = Transformer()
    model = copy.deepcopy(base)
    inject_adapter(model, config)
    randomize(trainable(model).values())
    ids = token_ids()
    output, state = model(ids), {k: v.clone() for k, v in adapter_state_dict(model).items()}
    merge_adapter(model)
    assert_bit_equal(adapter_state_dict(model), state)
    assert_bit_equal(dict(base_tensors(model)), dict(base_tensors(base)))
    with disable_adapter(model):
        assert bit_equal(model(ids), base(ids))
        assert_bit_equal(adapter_state_dict(model), state)
    torch.testing.assert_close(model(ids), output)
    unmerge_adapter(model)
    assert bit_equal(model(ids), output)
    unload(model)
    assert_bit_equal(copied_state(model), copied_state(base))


def test_switching_the_bias_of_another_adapter_beside_a_merged_one():
    base = Transformer()
    model = adapted(copy.deepcopy(base), "one", target_modules=["q"], lora_bias=True)
    adapted(model, "two", target_modules=["k"], bias="all")
    set_adapter(model, "two")
    randomize(p for name, p in trainable(model).items() if name.endswith("bias"))
    both = ["one", "two"]
    set_adapter(model, both)
    output = model(token_ids())
    set_adapter(model, "one")
    merge_adapter(model)
    set_adapter(model, both)
    torch.testing.assert_close(model(token_ids()), output)
    unmerge_adapter(model)
    assert bit_equal(model(token_ids()), output)
    merge_adapter(model, "one")
    delete_adapter(model, "two")
    unload(model)
    assert_bit_equal(copied_state(model), copied_state(base))


class TiedBias(nn.Module):
    """As in BERT's language model head: one bias, known to two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.q(x))


def test_a_tied_bias_is_trained_and_kept_once():
    base = TiedBias()
    model = adapted(copy.deepcopy(base), target_modules=["q"], bias="all")
    x = torch.randn(3, 4)
    train(model, x)
    found = model(x)
    with disable_adapter(model):
        assert bit_equal(model(x), base(x))
    assert bit_equal(model(x), found)
    unload(model)
    assert_bit_equal(copied_state(model), copied_state(base))


@pytest.mark.parametrize("lora_bias", [False, True])
def test_nothing_is_merged_into_a_tied_bias(lora_bias):
    model = adapted(TiedBias(), target_modules=["q"], lora_bias=lora_bias)
    model.q.bias = model.bias
    before, output = copied_state(model), model(torch.ones(1, 4))
    if lora_bias:
        with pytest.raises(AdapterStateError, match="bias of 'q' is shared"):
            merge_adapter(model)
        assert_bit_equal(copied_state(model), before)
    else:  # the bias is not written
        merge_adapter(model)
        torch.testing.assert_close(model(torch.ones(1, 4)), output)


def test_the_bias_of_a_deleted_adapter_is_frozen_again():
    model = adapted(Transformer(), "one", target_modules=["q"], bias="all")
    adapted(model, "two", target_modules=["q"])
    delete_adapter(model, "one")
    set_adapter(model, "two")
    assert all(".adapters.two." in name for name in trainable(model))


def test_the_bias_of_an_inactive_adapter_does_not_train():
    model = adapted(Transformer(), "one", target_modules=["q"])
    adapted(model, "two", target_modules=["q"], bias="all")
    set_trainable(model, "two", True)
    assert not any(name.endswith("bias") for name in trainable(model))
    set_adapter(model, "two")
    assert any(name.endswith("bias") for name in trainable(model))


def test_bias_all_trains_the_biases_that_peft_trains():
    """Parameters called `bias`; not an LSTM's `bias_ih_l0` or an attention's `in_proj_bias`."""

    def model():
        modules = {"lin": nn.Linear(4, 4), "mha": nn.MultiheadAttention(4, 2), "rnn": nn.LSTM(4, 4)}
        return nn.ModuleDict(modules)

    theirs = peft.get_peft_model(
        model(),
        peft.LoraConfig(r=2, target_modules=["lin"], bias="all"),
        autocast_adapter_dtype=True,
    )
    expected = {
        name.removeprefix("base_model.model.").replace("base_layer.", "")
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    ours = model()
    inject_adapter(ours, LoraConfig(r=2, target_modules=["lin"], bias="all"))
    assert {name for name in trainable(ours) if ".adapters." not in name} == expected
    assert expected == {"lin.bias", "mha.out_proj.bias"}
