"""PEFT folders that come with the embeddings of a vocabulary to which tokens were added."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import (
    AdapterMismatchError,
    LoraConfig,
    disable_adapter,
    hotswap_adapter,
    inject_adapter,
    load_adapter,
    save_adapter,
    unload,
)
from lora_lightning.checkpoint.peft import reading
from tests.helpers.tensors import randomize

OLD, NEW = 12, 16
IDS = torch.tensor([[1, 13, 15, 2]])


def pretrained(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=OLD, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def grown(seed: int, tied: bool = False, size: int = NEW) -> LlamaForCausalLM:
    """The pretrained model with random rows for the added tokens."""
    model = pretrained(tied)
    torch.manual_seed(seed)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def saved_by_peft(folder: Path, model: nn.Module, **options: Any) -> None:
    """A folder of PEFT's for `model`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=2, init_lora_weights=False, **options)
        ).eval()
        adapted.save_pretrained(folder, save_embedding_layers=True)


def loaded_by_peft(folder: Path, model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


OPTIONS: dict[str, dict[str, Any]] = {
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [13]}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("what", OPTIONS)
def test_rows_of_added_tokens_come_from_the_file(what: str, tied: bool, tmp_path: Path) -> None:
    options = OPTIONS[what]
    saved_by_peft(tmp_path, grown(1, tied), **options)
    model = grown(2, tied)
    theirs = loaded_by_peft(tmp_path, model)
    assert not torch.allclose(theirs(IDS).logits, model(IDS).logits)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)
    with disable_adapter(model), theirs.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)
    unload(model)
    known = [grown(seed, tied).state_dict() for seed in (1, 2)]
    for name, tensor in model.state_dict().items():
        assert any(torch.equal(tensor, state[name]) for state in known), name
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    taken = [n for n in tables if torch.equal(model.state_dict()[n], known[0][n])]
    expected = {"embeddings": tables[:1], "head": tables[1:]}.get(what, tables)
    assert taken == (tables if tied else expected)


def all_rows(table: Tensor) -> None:
    table.normal_()


def one_old_row(table: Tensor) -> None:
    table[3].normal_()


def all_but_padding(table: Tensor) -> None:
    table.normal_()
    table[0] = 0


def old_rows_but_the_first(table: Tensor) -> None:
    table[1:10].normal_()


OTHERS = {f.__name__: f for f in (all_rows, one_old_row, all_but_padding, old_rows_but_the_first)}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_base_is_refused(change: Callable[[Tensor], None], tmp_path: Path) -> None:
    base = grown(1)
    with torch.no_grad():
        if change is all_but_padding:
            base.model.embed_tokens.weight[0] = 0
        saved_by_peft(tmp_path, base, **OPTIONS["embeddings"])
        change(base.model.embed_tokens.weight)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(AdapterMismatchError, match="this model has other values"):
        load_adapter(base, tmp_path)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)


def test_rows_that_are_no_numbers_are_not_taken(tmp_path: Path) -> None:
    base = grown(1)
    with torch.no_grad():
        base.model.embed_tokens.weight[13, 2] = float("nan")
    saved_by_peft(tmp_path, base, **OPTIONS["embeddings"])
    model = grown(2)
    with pytest.raises(AdapterMismatchError, match="this model has other values"):
        load_adapter(model, tmp_path)
    assert model.model.embed_tokens.weight.isfinite().all()


@pytest.mark.parametrize("size", [OLD, NEW + 2], ids=["not resized", "resized otherwise"])
def test_a_table_of_another_size_is_refused(size: int, tmp_path: Path) -> None:
    saved_by_peft(tmp_path, grown(1), **OPTIONS["neither"])
    with pytest.raises(AdapterMismatchError, match=r"resize its embeddings"):
        load_adapter(grown(1, size=size) if size != OLD else pretrained(), tmp_path)


def test_another_weight_than_a_table_has_no_rows_to_take(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    base.config = LlamaConfig()
    saved_by_peft_of_plain(tmp_path, base)
    with torch.no_grad():
        base[1].weight[3:].normal_()
    with pytest.raises(AdapterMismatchError, match="this model has other values"):
        load_adapter(base, tmp_path)


def saved_by_peft_of_plain(folder: Path, model: nn.Module) -> None:
    from safetensors.torch import load_file, save_file

    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    weight = model[1].weight.detach().clone()
    save_file({**load_file(file), "base_model.model.1.weight": weight}, file)


def test_two_adapters_with_rows_of_their_own_do_not_share_a_base(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    saved_by_peft(first, grown(1), **OPTIONS["embeddings"])
    saved_by_peft(second, grown(3), **OPTIONS["embeddings"])
    model = grown(2)
    expected = loaded_by_peft(first, model)(IDS).logits
    load_adapter(model, first, "first")
    load_adapter(model, first, "again")
    for load in (
        lambda: load_adapter(model, second, "second"),
        lambda: hotswap_adapter(model, second, "first"),
    ):
        with pytest.raises(AdapterMismatchError, match=r"\['first', 'again'\]|\['first'\]"):
            load()
    torch.testing.assert_close(model(IDS).logits, expected)
    trained = grown(2)
    inject_adapter(trained, LoraConfig(r=2, target_modules=["q_proj"]), "trained")
    before = trained(IDS).logits
    with pytest.raises(AdapterMismatchError, match=r"\['trained'\] on this model"):
        load_adapter(trained, first, "first")
    assert torch.equal(trained(IDS).logits, before)


def test_an_error_after_the_rows_are_in_takes_them_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_by_peft(tmp_path, grown(1), **OPTIONS["embeddings"])
    model = grown(2)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reading, "materialize", fail)
    with pytest.raises(MemoryError):
        load_adapter(model, tmp_path)
    for name, tensor in grown(2).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# -- folders of ours ---------------------------------------------------------------------------


OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows": {"trainable_token_indices": [13, 2]},
    "head": {"modules_to_save": ["lm_head"]},
    "adapted head": {"target_modules": ["q_proj", "lm_head"]},
}


def as_users_have_it(folder: Path, tied: bool, seed: int) -> LlamaForCausalLM:
    """The model from its folder, with rows for the added tokens that start at random."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("what", OURS)
def test_our_folders_come_with_them(what: str, tied: bool, tmp_path: Path) -> None:
    pretrained(tied).save_pretrained(tmp_path / "base")
    model = as_users_have_it(tmp_path / "base", tied, 1)
    inject_adapter(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **OURS[what]}))
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    save_adapter(model, tmp_path / "adapter")
    expected = model(IDS).logits
    for seed in (1, 2):  # the same rows as there, and others
        other = as_users_have_it(tmp_path / "base", tied, seed)
        load_adapter(other, tmp_path / "adapter")
        torch.testing.assert_close(other(IDS).logits, expected)
        theirs = loaded_by_peft(
            tmp_path / "adapter", as_users_have_it(tmp_path / "base", tied, seed)
        )
        torch.testing.assert_close(theirs(IDS).logits, expected)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    inject_adapter(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(plain, tmp_path / "plain")
    with safe_open(tmp_path / "plain" / "adapter_model.safetensors", "pt") as file:
        assert not any("embed_tokens" in key or "lm_head" in key for key in file.keys())  # noqa: SIM118
