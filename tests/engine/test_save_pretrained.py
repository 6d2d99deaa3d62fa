"""`save_pretrained` of a model with adapters: what `from_pretrained` reads back computes the same."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_lightning import (
    LohaConfig,
    LoraConfig,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    unload,
)
from lora_lightning.errors import AdapterStateError
from tests.helpers.tensors import bit_equal, randomize

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[1, 5, 6, 7, 2]])


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3, initializer_range=0.4)
    return transformers.BertForSequenceClassification(config).eval()


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def trained(model: Any, config: Any, name: str = "default") -> Any:
    inject_adapter(model, config, name)
    set_adapter(model, name)
    randomize([p for p in model.parameters() if p.requires_grad], 0.2)
    return model.eval()


def read(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return type(model).from_pretrained(folder).eval()


CONFIGS: dict[str, Any] = {
    "adapters": LoraConfig(r=2, target_modules=["query", "value"]),
    "a head": LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
    "biases": LoraConfig(r=2, target_modules=["query"], bias="all"),
    "DoRA": LoraConfig(r=2, target_modules=["query"], use_dora=True),
    "LoHa": LohaConfig(r=2, target_modules=["query"]),
    "table": LoraConfig(r=2, target_modules=["word_embeddings", "query"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_back_computes_the_same(name: str, tmp_path: Path) -> None:
    base = bert()
    model = trained(copy.deepcopy(base), CONFIGS[name])
    expected = model(IDS).logits
    assert (expected - base(IDS).logits).abs().max() > 1e-3
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(
        read(model, tmp_path / "a")(IDS).logits, expected, rtol=1e-4, atol=1e-5
    )
    after = model.state_dict()  # as it was, bit for bit
    assert all(bit_equal(after[key], tensor) for key, tensor in before.items())
    assert bit_equal(model(IDS).logits, expected)
    with disable_adapter(model):
        model.save_pretrained(tmp_path / "base")
    assert bit_equal(read(model, tmp_path / "base")(IDS).logits, base(IDS).logits)
    merge_adapter(model)
    model.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(
        read(model, tmp_path / "b")(IDS).logits, expected, rtol=1e-4, atol=1e-5
    )
    assert model.bert.encoder.layer[0].attention.self.query.merged_adapters == ["default"]
    unload(model)
    assert "save_pretrained" not in model.__dict__
    model.save_pretrained(tmp_path / "base")
    assert bit_equal(read(model, tmp_path / "base")(IDS).logits, base(IDS).logits)


class Classifier(nn.Module):
    """Somebody's module, which saves its own model, as LightningModules do at the end of a fit."""

    def __init__(self) -> None:
        super().__init__()
        self.model = bert()

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def test_a_model_inside(tmp_path: Path) -> None:
    module = trained(Classifier(), CONFIGS["a head"])
    module.model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        read(module.model, tmp_path)(IDS).logits, module(IDS), rtol=1e-4, atol=1e-5
    )
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    inject_adapter(module, LoraConfig(r=1, target_modules=["key"]), "b")
    delete_adapter(module, "default")
    assert "save_pretrained" in module.model.__dict__
    again = copy.deepcopy(module)
    randomize([p for n, p in again.named_parameters() if ".adapters.b." in n], 0.3)
    set_adapter(again, "b")
    again.model.save_pretrained(tmp_path)  # the copy's own weights
    torch.testing.assert_close(
        read(again.model, tmp_path)(IDS).logits, again(IDS), rtol=1e-4, atol=1e-5
    )


def test_a_state_that_is_given_is_what_is_written(tmp_path: Path) -> None:
    model = trained(bert(), CONFIGS["adapters"])
    model.save_pretrained(tmp_path, state_dict=bert().state_dict())
    assert bit_equal(read(model, tmp_path)(IDS).logits, bert()(IDS).logits)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"]], ids=str)
def test_a_head_that_is_tied_is_refused(saved: list[str], tmp_path: Path) -> None:
    """Read back, the table would stand in its place."""
    model = trained(llama(True), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    expected = model(IDS).logits
    with pytest.raises(AdapterStateError, match=r"cannot write this Llama.*shared with another"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert bit_equal(model(IDS).logits, expected)
    save_adapter(model, tmp_path)  # the way out that it names
    free = trained(llama(False), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    free.save_pretrained(tmp_path / "free")
    torch.testing.assert_close(
        read(free, tmp_path / "free")(IDS).logits, free(IDS).logits, rtol=1e-4, atol=1e-5
    )
