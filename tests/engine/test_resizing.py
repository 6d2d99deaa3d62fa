"""Vocabularies that are resized while embeddings or heads carry adapters."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_lightning import (
    AdapterStateError,
    LohaConfig,
    LoraConfig,
    delete_adapter,
    inject_adapter,
    merge_and_unload,
    save_adapter,
    unload,
)

IDS = torch.tensor([[1, 5, 2]])


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


CARRIED: dict[str, tuple[Any, Any]] = {
    "head": (llama, LoraConfig(r=2, target_modules=["q_proj", "lm_head"])),
    "table": (llama, LoraConfig(r=2, target_modules=["embed_tokens"])),
    "tied table": (lambda: llama(True), LoraConfig(r=2, target_modules=["embed_tokens"])),
    "another type": (llama, LohaConfig(r=2, target_modules=["lm_head"])),
    "rows": (llama, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3])),
    "rows of a tied head": (
        lambda: llama(True),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]),
    ),
    "copy": (llama, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "bias": (bert, LoraConfig(r=2, target_modules=["query"], bias="all")),
    "encoder": (t5, LoraConfig(r=2, target_modules=r"encoder\.embed_tokens")),
}


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("size", [10, 16], ids=["shrink", "grow"])
@pytest.mark.parametrize(("build", "config"), CARRIED.values(), ids=CARRIED)
def test_what_carries_adapters_is_not_resized(build: Any, config: Any, size: int) -> None:
    model = build()
    inject_adapter(model, config)
    types = [type(module) for module in model.modules()]
    before = state_of(model)
    for resize in (
        lambda: model.resize_token_embeddings(size),
        lambda: model.resize_token_embeddings(new_num_tokens=size, mean_resizing=False),
        lambda: model.resize_token_embeddings(None, 7),
        lambda: model.resize_token_embeddings(pad_to_multiple_of=7),
    ):
        with pytest.raises(
            AdapterStateError, match=r"carries adapters and would be resized from 12"
        ):
            resize()
    assert [type(module) for module in model.modules()] == types
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.vocab_size == 12


def test_no_change_of_size_and_other_targets_pass() -> None:
    model = llama()
    inject_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    expected = model(IDS).logits
    assert model.resize_token_embeddings() is model.model.embed_tokens
    model.resize_token_embeddings(12)
    model.resize_token_embeddings(pad_to_multiple_of=4)
    assert torch.equal(model(IDS).logits, expected)
    other = llama()
    inject_adapter(other, LoraConfig(r=2, target_modules=["q_proj"]))
    other.resize_token_embeddings(14)
    assert other(torch.tensor([[13]])).logits.shape == (1, 1, 14)


@pytest.mark.parametrize("which", ["input", "output"])
def test_a_module_with_adapters_is_not_exchanged(which: str) -> None:
    model = llama()
    inject_adapter(model, LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    new = nn.Embedding(12, 8) if which == "input" else nn.Linear(8, 12, bias=False)
    expected = model(IDS).logits
    with pytest.raises(AdapterStateError, match="carries adapters and would be exchanged"):
        getattr(model, f"set_{which}_embeddings")(new)
    getattr(model, f"set_{which}_embeddings")(getattr(model, f"get_{which}_embeddings")())
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(
    "take_off", [unload, merge_and_unload, lambda m: delete_adapter(m, "default")]
)
def test_without_adapters_it_is_resized_as_ever(take_off: Any) -> None:
    model = llama()
    attributes = [set(module.__dict__) for module in model.modules()]
    inject_adapter(model, LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    take_off(model)
    assert [set(module.__dict__) for module in model.modules()] == attributes
    model.resize_token_embeddings(14)
    assert model(torch.tensor([[13]])).logits.shape == (1, 1, 14)


def test_inside_a_module_of_the_user_s_and_in_copies() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = llama()

    model = Module()
    inject_adapter(model, LoraConfig(r=2, target_modules=["lm_head"]))
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(AdapterStateError, match="would be resized"):
            each.network.resize_token_embeddings(14)
    loaded = pickle.loads(pickle.dumps(model.network))
    with pytest.raises(AdapterStateError, match=r"'lm_head' .* would be resized"):
        loaded.resize_token_embeddings(14)


def test_a_table_that_was_resized_past_its_adapters_is_refused(tmp_path: Path) -> None:
    model = llama()
    inject_adapter(model.model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.resize_token_embeddings(14)  # of the model around the one that was adapted
    with pytest.raises(AdapterStateError, match="was resized to 14 rows after an adapter for 12"):
        model(IDS)
    with pytest.raises(AdapterStateError, match="was resized to 14 rows after an adapter for 12"):
        save_adapter(model.model, tmp_path)
    assert list(tmp_path.iterdir()) == []
