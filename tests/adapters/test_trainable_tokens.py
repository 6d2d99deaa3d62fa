"""Single rows of an embedding that train: against peft, and on what peft does not say."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lora_lightning import (
    LoraConfig,
    LoraError,
    adapter_state_dict,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    unmerge_adapter,
)
from lora_lightning.engine.injection import adapters_named
from tests.helpers.adapted_models import tied_llama, tied_llama_ids
from tests.helpers.tensors import bit_equal, randomize

TOKENS = [7, 3, 11]


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tied_llama_ids(), labels=tied_llama_ids()).loss


@pytest.mark.parametrize("wanted", [TOKENS, {"embed_tokens": TOKENS}], ids=["list", "dict"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_same_as_peft(tied: bool, wanted: object, tmp_path: Path) -> None:
    base = tied_llama(tied)
    options = {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": wanted}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    randomize([p for p in theirs.parameters() if p.requires_grad], 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(loss_of(ours), loss_of(theirs), rtol=1e-10, atol=1e-10)
    loss_of(ours).backward()
    loss_of(theirs).backward()
    expected = [p.grad for n, p in theirs.named_parameters() if "tokens_delta" in n]
    found = [p.grad for n, p in ours.named_parameters() if "tokens_delta" in n]
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)

    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(loss_of(back), loss_of(theirs), rtol=1e-10, atol=1e-10)
    result = loss_of(ours)
    with disable_adapter(ours):
        assert bit_equal(loss_of(ours), loss_of(base))
    merge_adapter(ours)
    torch.testing.assert_close(loss_of(ours), result, rtol=1e-10, atol=1e-10)
    unmerge_adapter(ours)
    assert bit_equal(ours.model.embed_tokens.weight, base.model.embed_tokens.weight)
    merged = merge_and_unload(ours)
    torch.testing.assert_close(loss_of(merged), result, rtol=1e-10, atol=1e-10)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied


def test_starts_as_a_no_op_and_trains_only_its_rows() -> None:
    base = tied_llama()
    model = copy.deepcopy(base)
    config = LoraConfig(target_modules=[], trainable_token_indices=TOKENS)
    inject_adapter(model, config)
    assert bit_equal(loss_of(model), loss_of(base))
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(3, 8)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss_of(model).backward()
    optimizer.step()
    trained = merge_and_unload(model).model.embed_tokens.weight
    changed = (trained != base.model.embed_tokens.weight).any(dim=1).nonzero().flatten()
    assert changed.tolist() == sorted(TOKENS)


def test_the_table_is_not_copied_in_forward() -> None:
    table = nn.Embedding(1000, 8)
    model = nn.Sequential(table)
    config = LoraConfig(target_modules=[], trainable_token_indices={"0": [1, 2]})
    inject_adapter(model, config)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    with Watch():
        model(torch.tensor([[1, 5, 2]]))
    assert max(sizes) < 100


class Tables(nn.Module):
    """Two tables of one weight, as T5's encoder and decoder have."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(6, 4), nn.Embedding(6, 4)
        self.two.weight = self.one.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.one(ids) + 2 * self.two(ids)


@pytest.mark.parametrize("wanted", [{"one": [3, 1]}, {"two": [3, 1], "one": [3, 1]}], ids=str)
def test_tables_that_share_a_weight_share_the_rows(wanted: dict) -> None:
    base = Tables()
    model = copy.deepcopy(base)
    inject_adapter(model, LoraConfig(target_modules=[], trainable_token_indices=wanted))
    every = torch.arange(6)
    assert bit_equal(model(every), base(every))
    (rows,) = (p for p in model.parameters() if p.requires_grad)
    randomize([rows])
    table = base.one.weight.detach().clone()
    table[[3, 1]] = rows.detach()
    torch.testing.assert_close(model(every), 3 * table)
    torch.testing.assert_close(merge_and_unload(model)(every), 3 * table)


def test_t5_has_one_table_under_three_names() -> None:
    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    call = {"input_ids": tied_llama_ids(), "labels": tied_llama_ids()}
    expected = model(**call).loss
    inject_adapter(model, LoraConfig(target_modules=[], trainable_token_indices=TOKENS))
    torch.testing.assert_close(model(**call).loss, expected)
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(3, 8)]


def test_other_tokens_for_the_same_weight_are_refused() -> None:
    tokens = {"one": [1], "two": [2]}
    with pytest.raises(LoraError, match="other tokens for 'two' than for 'one'"):
        inject_adapter(Tables(), LoraConfig(target_modules=[], trainable_token_indices=tokens))


def test_deepcopy_keeps_head_and_table_together() -> None:
    model = tied_llama()
    inject_adapter(model, LoraConfig(target_modules=[], trainable_token_indices=TOKENS))
    other = copy.deepcopy(model)
    randomize([p for p in other.parameters() if p.requires_grad])
    assert not torch.allclose(loss_of(other), loss_of(model))
    rows = adapters_named(other, "default")
    assert rows["lm_head"]._rows[0] is rows["model.embed_tokens"]
    assert list(adapter_state_dict(model)) == ["model.embed_tokens.trainable_tokens_delta"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable_token_indices": [99]}, "names token 99, but 'model.embed_tokens' has 16 rows"),
        ({"trainable_token_indices": [1, 1]}, "names a token twice"),
        ({"trainable_token_indices": ["1"]}, "token ids are integers"),
        ({"trainable_token_indices": {"embed_token": [1]}}, "did you mean 'embed_tokens'"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "no nn.Embedding"),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            "adapted as a whole",
        ),
        ({"trainable_token_indices": [1], "target_modules": ["lm_head"]}, "adapted as a whole"),
    ],
)
def test_refused(options: dict, words: str) -> None:
    model = tied_llama()
    keys = model.state_dict().keys()
    with pytest.raises(LoraError, match=words):
        inject_adapter(model, LoraConfig(**options))
    assert model.state_dict().keys() == keys
