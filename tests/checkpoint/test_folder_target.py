"""For which model a PEFT folder is, and by which class others can load it. The truth is peft."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning import (
    LohaConfig,
    LoraCallback,
    LoraConfig,
    adapter_names,
    hotswap_adapter,
    inject_adapter,
    load_adapter,
    save_adapter,
)
from lora_lightning.adapters.config import pattern_value
from lora_lightning.checkpoint.peft.relocation import moved_config
from lora_lightning.errors import AdapterMismatchError
from lora_lightning.utilities import notice
from tests.helpers.lightning_modules import Net, make_trainer
from tests.helpers.tensors import bit_equal, randomize

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
DISTIL = {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
IDS = torch.tensor([[1, 5, 6, 7, 2]])


def saved_base(name: str, folder: Path) -> Any:
    """A tiny model of that class, as its users have it: loaded from a folder."""
    cls = getattr(transformers, name)
    sizes = T5 if "T5" in name else DISTIL if "Distil" in name else SIZES
    torch.manual_seed(0)
    cls(cls.config_class(**sizes)).save_pretrained(folder)
    return cls.from_pretrained(folder).eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def output_of(model: Any) -> Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **decoder)[0]


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    inject_adapter(model, LoraConfig(r=2, **options))
    torch.manual_seed(1)
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    return model.eval()


def by_peft(auto: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        return getattr(peft, auto).from_pretrained(folder).eval()


HEAD = ["classifier"]
KINDS: dict[str, tuple[str, str | None, str, dict[str, Any]]] = {
    "causal": ("LlamaForCausalLM", "CAUSAL_LM", "ForCausalLM", {}),
    "with head": ("LlamaForCausalLM", "CAUSAL_LM", "ForCausalLM", {"modules_to_save": ["lm_head"]}),
    "seq2seq": ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", "ForSeq2SeqLM", {}),
    "class": ("BertForSequenceClassification", "SEQ_CLS", "ForSequenceClassification", {"modules_to_save": HEAD}),
    "frozen head": ("BertForSequenceClassification", "SEQ_CLS", "ForSequenceClassification", {}),
    "score": ("LlamaForSequenceClassification", "SEQ_CLS", "ForSequenceClassification", {}),
    "also by ending": ("DistilBertForSequenceClassification", "SEQ_CLS", "ForSequenceClassification",
                       {"modules_to_save": HEAD, "target_modules": ["q_lin"]}),
    "tokens": ("BertForTokenClassification", "TOKEN_CLS", "ForTokenClassification", {"modules_to_save": HEAD}),
    "answers": ("BertForQuestionAnswering", "QUESTION_ANS", "ForQuestionAnswering", {"target_modules": ["query"]}),
    "bare": ("BertModel", "FEATURE_EXTRACTION", "ForFeatureExtraction", {}),
    "masked": ("BertForMaskedLM", None, "", {}),
    "inside the head": ("RobertaForSequenceClassification", None, "",
                        {"target_modules": ["query", "classifier.dense"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes_load_our_folders(kind: str, tmp_path: Path) -> None:
    name, task, auto, options = KINDS[kind]
    model = adapted(saved_base(name, tmp_path / "base"), **options)
    save_adapter(model, tmp_path / "ours")
    config = config_of(tmp_path / "ours")
    assert config["task_type"] == task
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    expected = output_of(model)
    theirs = by_peft(f"AutoPeftModel{auto}", tmp_path / "ours")
    torch.testing.assert_close(output_of(theirs), expected, rtol=1e-5, atol=1e-6)
    other = getattr(transformers, name).from_pretrained(tmp_path / "base").eval()
    load_adapter(other, tmp_path / "ours")
    assert bit_equal(output_of(other), expected)


def test_what_peft_writes_of_the_model(tmp_path: Path) -> None:
    for name in ("BertForMaskedLM", "BertModel"):
        base = saved_base(name, tmp_path / name)
        save_adapter(adapted(base, target_modules=["query"]), tmp_path / "ours")
        theirs = peft.get_peft_model(
            getattr(transformers, name).from_pretrained(tmp_path / name),
            peft.LoraConfig(target_modules=["query"], task_type=config_of(tmp_path / "ours")["task_type"]),
        )  # fmt: skip
        theirs.save_pretrained(tmp_path / "theirs")
        ours, expected = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
        for key in ("auto_mapping", "task_type", "base_model_name_or_path", "inference_mode"):
            assert ours[key] == expected[key], key


class Mine(transformers.BertForSequenceClassification):
    """A class that transformers' own auto classes do not load."""


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    save_adapter(adapted(Mine(Mine.config_class(**SIZES))), tmp_path)
    config = config_of(tmp_path)
    assert config["task_type"] is None
    assert config["auto_mapping"] == {"base_model_class": "Mine", "parent_library": __name__}


def test_a_head_that_was_random_comes_with_the_file(tmp_path: Path) -> None:
    """As with PEFT, which takes it for a trained copy whatever was trained."""
    torch.manual_seed(1)
    name = "BertForSequenceClassification"
    config = transformers.BertConfig(**SIZES)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    load = getattr(transformers, name).from_pretrained
    model = adapted(load(tmp_path / "base"))
    save_adapter(model, tmp_path / "ours")
    other = load(tmp_path / "base").eval()
    assert not torch.equal(other.classifier.weight, model.classifier.weight)
    load_adapter(other, tmp_path / "ours")
    assert bit_equal(output_of(other), output_of(model))
    same = load(tmp_path / "base").eval()
    same.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    load_adapter(same, tmp_path / "ours")
    save_adapter(same, tmp_path / "again")  # nothing but the adapter was trained
    assert config_of(tmp_path / "again")["modules_to_save"] is None
    assert bit_equal(output_of(same), output_of(model))


# -- inside a LightningModule ----------------------------------------------------------------------


class Holder(LightningModule):
    """Somebody's module around a pretrained model."""

    def __init__(self, folder: Path, attribute: str = "backbone", teacher: bool = False) -> None:
        super().__init__()
        self.attribute = attribute
        setattr(self, attribute, transformers.AutoModelForCausalLM.from_pretrained(folder))
        if teacher:
            self.teacher = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.extra = nn.Linear(4, 4)

    @property
    def net(self) -> Any:
        return getattr(self, self.attribute)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids).logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()


INSIDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole paths": {"target_modules": ["backbone.model.layers.1.mlp.up_proj"]},
    "patterns": {"rank_pattern": {"backbone.model.layers.0.self_attn.q_proj": 3,
                                  r"^backbone\.model\.layers\.1\..*": 4},
                 "alpha_pattern": {r"backbone.*v_proj": 5}},
    "head": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": {"backbone.model.embed_tokens": [3, 7]}},
    "biases": {"bias": "lora_only"},
    "a teacher beside it": {"target_modules": r"backbone\..*q_proj"},
}  # fmt: skip


@pytest.mark.parametrize("kind", INSIDE)
def test_the_folder_is_for_the_pretrained_model_inside(kind: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    saved_base("LlamaForCausalLM", base)
    options = {"target_modules": ["q_proj", "v_proj"], **INSIDE[kind]}
    teacher = kind.startswith("a teacher")
    module = adapted(Holder(base, teacher=teacher), **options)
    save_adapter(module, folder)
    assert config_of(folder)["base_model_name_or_path"] == str(base)
    assert not any("backbone" in key for key in load_file(folder / "adapter_model.safetensors"))
    expected = module(IDS)
    theirs = by_peft("AutoPeftModelForCausalLM", folder)
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-5, atol=1e-6)

    other = Holder(base, teacher=teacher).eval()
    load_adapter(other, folder)
    assert bit_equal(other(IDS), expected)
    save_adapter(other, tmp_path / "again")  # what was loaded is saved as it was
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (d / file for d in (folder, tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes() or kind in ("patterns", "rows"), file
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "lora_lightning.module": "backbone"}
    third = Holder(base, teacher=teacher).eval()
    load_adapter(third.backbone, tmp_path / "again")
    assert bit_equal(third(IDS), expected)

    slot = Holder(base, teacher=teacher).eval()
    inject_adapter(slot, LoraConfig(r=2, **options))
    hotswap_adapter(slot, folder)
    assert bit_equal(slot(IDS), expected)

    run = Holder(base, teacher=teacher)
    trainer = make_trainer(tmp_path, LoraCallback(init_from=str(folder)), max_epochs=0)
    trainer.fit(run, torch.utils.data.DataLoader(IDS))
    assert bit_equal(run.eval()(IDS), expected)


class Aliased(Holder):
    """Keeps a part of its model under a name of its own, and that first."""

    def __init__(self, folder: Path) -> None:
        LightningModule.__init__(self)
        network = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.attribute, self.encoder, self.network = "network", network.model, network


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}, {"bias": "all"}],
    ids=str,
)
def test_a_part_of_it_that_has_another_name(options: dict[str, Any], tmp_path: Path) -> None:
    saved_base("LlamaForCausalLM", tmp_path / "base")
    module = adapted(Aliased(tmp_path / "base"), target_modules=["q_proj"], **options)
    save_adapter(module, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["task_type"] == "CAUSAL_LM"
    theirs = by_peft("AutoPeftModelForCausalLM", tmp_path / "adapter")
    torch.testing.assert_close(theirs(IDS).logits, module(IDS), rtol=1e-5, atol=1e-6)
    other = Aliased(tmp_path / "base").eval()
    load_adapter(other, tmp_path / "adapter")
    assert bit_equal(other(IDS), module(IDS))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("saved", [None, HEAD])
def test_biases_beside_a_head_that_peft_saves_along(
    bias: str, saved: list[str] | None, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model = saved_base("BertForSequenceClassification", base)
    adapted(model, target_modules=["query"], bias=bias, modules_to_save=saved)
    save_adapter(model, tmp_path / "ours")
    theirs = by_peft("AutoPeftModelForSequenceClassification", tmp_path / "ours")
    torch.testing.assert_close(output_of(theirs), output_of(model), rtol=1e-5, atol=1e-6)
    other = transformers.BertForSequenceClassification.from_pretrained(base).eval()
    load_adapter(other, tmp_path / "ours")
    assert bit_equal(output_of(other), output_of(model))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in other.named_parameters() if p.requires_grad} == trains


def test_an_attribute_called_as_its_head(tmp_path: Path) -> None:
    """PEFT takes every path that ends with a saved name for a trained copy."""
    saved_base("LlamaForCausalLM", tmp_path / "base")
    module = adapted(
        Holder(tmp_path / "base", "lm_head"),
        target_modules=["q_proj"],
        modules_to_save=["lm_head.lm_head"],
    )
    save_adapter(module, tmp_path / "adapter")
    other = Holder(tmp_path / "base", "lm_head").eval()
    load_adapter(other, tmp_path / "adapter")
    assert bit_equal(other(IDS), module(IDS))


def test_two_alike_need_to_be_told_apart(tmp_path: Path) -> None:
    saved_base("LlamaForCausalLM", tmp_path / "base")
    module = adapted(Holder(tmp_path / "base", teacher=True), target_modules=r"backbone.*q_proj")
    save_adapter(module.backbone, tmp_path / "adapter")  # for anyone's Llama
    with pytest.raises(AdapterMismatchError, match=r"2 ways.*'backbone.model.* or as 'teacher.mod"):
        load_adapter(Holder(tmp_path / "base", teacher=True), tmp_path / "adapter")


def test_the_name_of_the_wrapper_is_in_the_way_of_the_model_inside(tmp_path: Path) -> None:
    saved_base("LlamaForCausalLM", tmp_path / "base")
    module = adapted(
        Holder(tmp_path / "base"), target_modules=["q_proj"], modules_to_save=["extra"]
    )
    save_adapter(module, tmp_path / "adapter")
    with pytest.raises(AdapterMismatchError, match="does not have"):
        load_adapter(module.net, tmp_path / "adapter", "other")
    assert adapter_names(module.net) == ["default"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if "extra" not in k},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterMismatchError, match=r"'backbone.', which is in the way"):
        load_adapter(module.net, tmp_path / "adapter", "other")


def test_what_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice, "_said", set())
    caplog.set_level(logging.WARNING, "lora_lightning")

    def said(model: nn.Module) -> str:
        caplog.clear()
        save_adapter(model, tmp_path / "adapter")
        return caplog.text

    saved_base("LlamaForCausalLM", tmp_path / "base")
    assert said(adapted(Holder(tmp_path / "base"), target_modules=["q_proj"])) == ""
    assert said(adapted(nn.Sequential(nn.Linear(4, 4)))) == ""
    net = adapted(Net())
    assert "is for a Net" in (text := said(net))
    assert "holds no pretrained model" in text
    assert said(net) == ""  # once
    outside = adapted(Holder(tmp_path / "base"), target_modules=["q_proj", "extra"])
    assert "not inside one of the pretrained models in it (backbone)" in said(outside)
    several = Holder(tmp_path / "base", teacher=True)
    assert "(backbone, teacher)" in said(adapted(several, target_modules=["q_proj"]))
    conv = nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2), nn.Conv1d(4, 4, 3))
    text = said(adapted(conv, target_modules=["0", "1"]))
    assert "LORA_LIGHTNING_LORA, which load_adapter reads and PEFT refuses" in text
    assert "0 (Conv1d)" in text
    assert "1 (Conv1d)" not in text
    with pytest.raises(KeyError, match="LORA_LIGHTNING_LORA"):
        peft.PeftConfig.from_pretrained(tmp_path / "adapter")


def test_patterns_of_moved_modules() -> None:
    config = LohaConfig(r=8, rank_pattern={"^net.a": 2, "b": 3}, alpha_pattern={"net.x.c": 4})
    moved = moved_config(config, {f"net.{p}": p for p in ("a", "b", "x.c", "y.a", "z.x.c")})
    ranks = {"a": 2, "b": 3, "x.c": 8, "y.a": 8, "z.x.c": 8}
    assert {p: pattern_value(moved.rank_pattern, p, 8) for p in ranks} == ranks
    alphas = {"a": 8, "b": 8, "x.c": 4, "y.a": 8, "z.x.c": 8}
    assert {p: pattern_value(moved.alpha_pattern, p, 8) for p in alphas} == alphas
    assert moved_config(config, {"a": "a"}) is config
