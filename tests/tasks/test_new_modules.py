"""Layers that a base has no weights for train in full, are saved, and are served as they trained.

The truth is peft on a base that was loaded anew, whose new layers are other random ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_lightning import (
    LohaConfig,
    LoraCallback,
    LoraError,
    SequenceClassification,
    TextClassificationDataModule,
    load_from_checkpoint,
    save_adapter,
)
from lora_lightning.layers.traversal import named_parameters
from tests.helpers.command import run_command
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.paths import ROOT
from tests.helpers.tensors import bit_equal
from tests.helpers.tiny_bert import save_tiny_bert

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 34, "pad_token_id": 0}  # fmt: skip
BASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "bert": ("BertForMaskedLM", SIZES, {"bert.pooler", "classifier"}),
    "roberta": ("RobertaForMaskedLM", SIZES, {"classifier"}),
    "distilbert": ("DistilBertForMaskedLM",
                   {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "pad_token_id": 0},
                   {"pre_classifier", "classifier"}),
    "deberta": ("DebertaV2ForMaskedLM", {**SIZES, "type_vocab_size": 0, "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm",
                "share_att_key": True, "position_biased_input": False}, {"pooler", "classifier"}),
}  # fmt: skip
IDS = torch.tensor([[2, 5, 6, 7, 3]])


def saved_base(kind: str, folder: Path) -> Path:
    """A masked language model, beside the tokenizer of a tiny BERT."""
    save_tiny_bert(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name, sizes, _ = BASES[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    cls(cls.config_class(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def reviews(folder: Path) -> Path:
    rows = ["text,label"]
    for thing in ("film", "book"):
        for very in ("very", "not", "a", "the"):
            rows += [f"the {thing} was {very} {word},{word}" for word in ("good", "bad", "red")]
    (folder / "my.csv").write_text("\n".join(rows))
    return folder / "my.csv"


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASES)
def test_the_stock_config_and_what_is_served(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saved_base(kind, tmp_path / "base")
    new = BASES[kind][2]
    reviews(tmp_path)
    options = ["--config", str(ROOT / "configs/classification.yaml"), "--model.model", "base",
               "--data.train", "my.csv", "--data.val", "0.25", "--data.max_length", "16"]  # fmt: skip
    small = [
        "--trainer.max_epochs",
        "2",
        "--trainer.accelerator",
        "cpu",
        "--compare_with_base",
        "false",
    ]
    output = run_command(tmp_path, monkeypatch, capfd, "fit", *options, *small)
    said = re.search(r"(\S.*): newly initialised, .* trained in full and saved", output)
    unasked = {name.removeprefix("network.") for name in said[1].split(", ")} if said else set()
    assert unasked == new - {"classifier"}  # which the config names
    best = next(tmp_path.rglob("best.ckpt"))
    scores = run_command(tmp_path, monkeypatch, capfd, "validate", *options[:8], *small[2:4],
                         "--ckpt_path", str(best), "--data.max_length", "16")  # fmt: skip
    states = torch.load(best, weights_only=True)["callbacks"]
    (accuracy,) = (s["best_model_score"] for k, s in states.items() if k.startswith("ModelCheck"))
    assert re.search(rf"val_accuracy\W+{re.escape(str(float(accuracy))[:8])}", scores)

    module = load_from_checkpoint(SequenceClassification, best).eval()
    assert full(module) == {f"default: network.{name}" for name in new}
    save_adapter(module, tmp_path / "adapter")
    torch.manual_seed(99)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=3
    ).eval()
    expected = module.network(input_ids=IDS).logits
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(7)
    again = load_from_checkpoint(SequenceClassification, best).eval()
    assert bit_equal(again.network(input_ids=IDS).logits, expected)


def fitted(
    model: Path, folder: Path, *callbacks: LoraCallback, **options: Any
) -> SequenceClassification:
    data = TextClassificationDataModule(str(reviews(folder)), val=0.25, max_length=16, batch_size=8)
    module = SequenceClassification(str(model))
    make_trainer(folder, *callbacks, **{"max_steps": 2, **options}).fit(module, data)
    return module


def full(module: nn.Module) -> set[str]:
    """Modules with a trained copy, by adapter."""
    names = [n for n, p in named_parameters(module) if ".adapters." in n and ".module." in n]
    return {f"{n.split('.adapters.')[1].split('.')[0]}: {n.split('.adapters.')[0]}" for n in names}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"bert.pooler", "classifier"}),
        ({"target_modules": ["query", "dense"]}, {"bert.pooler", "classifier"}),
        ({"modules_to_save": ["pooler"]}, {"bert.pooler", "classifier"}),
        ({"modules_to_save": ["pooler.dense"]}, {"bert.pooler.dense", "classifier"}),
        ({"modules_to_save": ["classifier", "layer.0.output"]},
         {"bert.pooler", "classifier", "bert.encoder.layer.0.output"}),
    ],
)  # fmt: skip
def test_beside_what_is_asked_for(
    options: dict[str, Any], expected: set[str], tmp_path: Path
) -> None:
    base = saved_base("bert", tmp_path / "base")
    module = fitted(base, tmp_path, LoraCallback(r=2, **options))
    assert full(module) == {f"default: network.{name}" for name in expected}
    other = fitted(base, tmp_path, LoraCallback(r=2, module="network", **options))
    assert full(other) == full(module)


def test_another_type_and_a_second_run_of_the_callback(tmp_path: Path) -> None:
    bert = saved_base("bert", tmp_path / "bert")
    callback = LoraCallback(LohaConfig(r=2))
    module = fitted(bert, tmp_path, callback)
    assert full(module) == {"default: network.bert.pooler", "default: network.classifier"}
    distilbert = saved_base("distilbert", tmp_path / "distilbert")
    other = fitted(distilbert, tmp_path, callback)  # names of the first model are forgotten
    assert full(other) == {"default: network.pre_classifier", "default: network.classifier"}


def test_the_first_of_several_adapters_has_them(tmp_path: Path) -> None:
    base = saved_base("bert", tmp_path / "base")
    first = LoraCallback(r=2, adapter_name="kept", trainable=False)
    second, third = (
        LoraCallback(r=2, adapter_name=name, target_modules=["query"]) for name in ("one", "two")
    )
    module = fitted(base, tmp_path, first, second, third)
    assert full(module) == {"one: network.bert.pooler", "one: network.classifier"}


def test_an_adapter_from_a_file_must_have_them(tmp_path: Path) -> None:
    base = saved_base("bert", tmp_path / "base")
    module = fitted(base, tmp_path, LoraCallback(r=2))
    save_adapter(module, tmp_path / "with")
    again = fitted(base, tmp_path, LoraCallback(init_from=str(tmp_path / "with")), max_epochs=0)
    assert bit_equal(
        again.eval().network(input_ids=IDS).logits, module.eval().network(input_ids=IDS).logits
    )
    masked = transformers.AutoModelForMaskedLM.from_pretrained(base)
    theirs = peft.get_peft_model(masked, peft.LoraConfig(r=2, target_modules=["query"]))
    theirs.save_pretrained(tmp_path / "without")
    with pytest.raises(LoraError, match=r"stay random.*'.*without' has none"):
        fitted(base, tmp_path, LoraCallback(init_from=str(tmp_path / "without")))


def test_a_broken_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the run is refused, rather than to end with layers that nobody else has."""
    monkeypatch.setattr("lora_lightning.training.attachment.train_new_modules", lambda *_: None)
    base = saved_base("bert", tmp_path / "base")
    with pytest.raises(LoraError, match=r"modules_to_save: \[bert.pooler.dense\]"):
        fitted(base, tmp_path, LoraCallback(r=2, modules_to_save=["classifier"]))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_of_a_quantised_base_they_stay_precise(quantize: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = saved_base("bert", tmp_path / "base")
    data = TextClassificationDataModule(str(reviews(tmp_path)), val=0.25, max_length=16)
    module = SequenceClassification(str(base), quantize=quantize)
    trainer = make_trainer(tmp_path, LoraCallback(r=2), max_steps=2)
    trainer.fit(module, data)
    assert full(module) == {"default: network.bert.pooler", "default: network.classifier"}
    assert module.network.bert.pooler.dense.weight.dtype == torch.float32
    assert module.network.bert.encoder.layer[0].output.dense.weight.dtype in (
        torch.uint8,
        torch.int8,
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(SequenceClassification, tmp_path / "last.ckpt").eval()
    assert bit_equal(
        loaded.network(input_ids=IDS).logits, module.eval().network(input_ids=IDS).logits
    )
