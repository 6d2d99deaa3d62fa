"""Single rows of an embedding that train: against peft, and on what peft does not say."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
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
    adapters_per_row,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    unmerge_adapter,
)
from lora_lightning.checkpoint.peft.description import describe
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


OF_HEADS = {
    "same": {"embed_tokens": TOKENS, "lm_head": TOKENS},
    "others": {"lm_head": [2, 9], "embed_tokens": TOKENS},
    "head alone": {"lm_head": TOKENS},
}


@pytest.mark.parametrize("wanted", OF_HEADS.values(), ids=OF_HEADS)
@pytest.mark.parametrize("targets", [["q_proj"], []], ids=["with targets", "alone"])
def test_rows_of_an_untied_head_are_the_same_as_peft_s(
    wanted: dict[str, list[int]], targets: list[str], tmp_path: Path
) -> None:
    base = tied_llama(False)
    ours = copy.deepcopy(base)
    options = {"target_modules": targets, "trainable_token_indices": wanted}
    inject_adapter(ours, LoraConfig(r=2, **options))
    assert bit_equal(loss_of(ours), loss_of(base))
    randomize([p for p in ours.parameters() if p.requires_grad], 0.3)
    expected = loss_of(ours)
    expected.backward()
    save_adapter(ours, tmp_path)
    peft_type = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    if not targets and wanted is OF_HEADS["others"]:  # PEFT's own type has one list for all
        assert peft_type == "LORA_LIGHTNING_LORA"
    else:
        assert peft_type == ("LORA" if targets else "TRAINABLE_TOKENS")
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, is_trainable=True
        ).eval()
        loss = loss_of(theirs)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        rows = {
            name: {p.shape: p.grad for key, p in model.named_parameters() if mark in key}
            for name, model, mark in (("ours", ours, "tokens_delta"), ("theirs", theirs, "_delta"))
        }
        assert len(rows["ours"]) > 0
        for shape, gradient in rows["ours"].items():
            torch.testing.assert_close(gradient, rows["theirs"][shape], rtol=1e-9, atol=1e-9)
    back = copy.deepcopy(base)
    load_adapter(back, tmp_path)
    assert bit_equal(loss_of(back), expected)
    merged = merge_and_unload(ours)
    torch.testing.assert_close(loss_of(merged), expected, rtol=1e-10, atol=1e-10)
    untouched = [i for i in range(16) if i not in wanted["lm_head"]]
    assert bit_equal(merged.lm_head.weight[untouched], base.lm_head.weight[untouched])


def test_a_head_named_alone_trains_alone_though_it_is_tied(tmp_path: Path) -> None:
    base = tied_llama()
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": TOKENS}}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **options))
    randomize([p for p in theirs.parameters() if p.requires_grad], 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(loss_of(ours), loss_of(theirs), rtol=1e-10, atol=1e-10)
    with pytest.raises(LoraError, match="'lm_head' is shared with another module"):
        merge_adapter(ours)


@pytest.mark.parametrize("names", [["lm_head", "embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_tied_pair_named_in_any_order_has_its_rows_once(names: list[str]) -> None:
    model = tied_llama()
    config = LoraConfig(target_modules=[], trainable_token_indices=dict.fromkeys(names, TOKENS))
    inject_adapter(model, config)
    assert list(adapter_state_dict(model)) == ["model.embed_tokens.trainable_tokens_delta"]


def test_a_head_with_a_bias_keeps_it_and_says_that_peft_does_not(tmp_path: Path) -> None:
    head = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=nn.Linear(4, 6))).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    config = LoraConfig(r=2, target_modules=["body"], trainable_token_indices={"head": [4, 1]})
    model = copy.deepcopy(head)
    inject_adapter(model, config)
    torch.testing.assert_close(model(x), head(x))  # a product of fewer rows rounds otherwise
    rows = model.head.adapters["default"].trainable_tokens_delta
    randomize([rows])
    weight = head.head.weight.detach().clone()
    weight[[4, 1]] = rows.detach().double()
    expected = head.body(x) @ weight.T + head.head.bias
    torch.testing.assert_close(model(x), expected)
    [obstacle] = describe(model, "default").obstacles
    assert obstacle == "PEFT has no such adapter, or computes it otherwise, on head (Linear)"
    save_adapter(model, tmp_path)
    peft_type = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert peft_type == "LORA_LIGHTNING_LORA"
    theirs = peft.LoraConfig(r=2, target_modules=["body"], trainable_token_indices={"head": [4, 1]})
    peft.get_peft_model(copy.deepcopy(head), theirs).save_pretrained(tmp_path / "theirs")
    with pytest.raises(LoraError, match=r"'head' .* is not what lora_lightning computes there"):
        load_adapter(copy.deepcopy(head), tmp_path / "theirs")
    back = copy.deepcopy(head)
    load_adapter(back, tmp_path)
    assert bit_equal(back(x), model(x))
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)


def test_rows_of_a_head_under_autocast_and_for_each_row_of_a_batch() -> None:
    model = tied_llama(False).float()
    base = copy.deepcopy(model)
    inject_adapter(
        model, LoraConfig(target_modules=[], trainable_token_indices={"lm_head": TOKENS})
    )
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    ids = tied_llama_ids()
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = model(ids).logits, base(ids).logits
    assert found.dtype == plain.dtype
    others = [i for i in range(16) if i not in TOKENS]
    assert bit_equal(found[..., others], plain[..., others])
    torch.testing.assert_close(found, model(ids).logits, rtol=0.05, atol=0.05, check_dtype=False)
    with adapters_per_row(model, ["default", None]):
        mixed = model(ids).logits
    torch.testing.assert_close(mixed[0], model(ids).logits[0])
    torch.testing.assert_close(mixed[1], base(ids).logits[1])


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
        ({"trainable_token_indices": {"norm": [1]}}, "is a LlamaRMSNorm, no nn.Embedding and no"),
        ({"trainable_token_indices": {"lm_head": [16]}}, "token 16, but 'lm_head' has 16 rows"),
        (
            {"trainable_token_indices": {"lm_head": [1]}, "target_modules": ["lm_head"]},
            "'lm_head' is adapted as a whole",
        ),
        (
            {"trainable_token_indices": {"lm_head": [1]}, "modules_to_save": ["lm_head"]},
            "'lm_head' trains in full",
        ),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["lm_head"]},  # tied to the table
            "'lm_head' trains in full",
        ),
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
