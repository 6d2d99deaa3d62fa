"""PEFT folders: both ways with peft 0.21.2, the same bytes every time, and readable by others.

`test_parity.py` has the table of adapter types and module kinds; here stands what goes beside it.
Refusals are in `test_untrusted_files.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_lightning import (
    LohaConfig,
    LoraConfig,
    LoraError,
    active_adapters,
    adapter_names,
    adapter_state_dict,
    disable_adapter,
    inject_adapter,
    load_adapter,
    load_adapter_state_dict,
    save_adapter,
    set_adapter,
)
from lora_lightning.errors import AdapterMismatchError, AdapterStateError, CheckpointError
from tests.helpers.adapted_models import tied_llama, tied_llama_ids
from tests.helpers.lightning_modules import Net
from tests.helpers.tensors import bit_equal, randomize
from tests.helpers.torch_models import OneLayerNet, Transformer, token_ids

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def ours(base: nn.Module, name: str = "default", **options: Any) -> nn.Module:
    model = copy.deepcopy(base)
    inject_adapter(model, LoraConfig(**{"r": 2, **options}), name)
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    return model


def theirs(base: nn.Module, **options: Any) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, of what it mutates
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 2, **options}))
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    return model.eval() if not base.training else model


def save_theirs(model: peft.PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "setting save_embedding_layers to True", tied weights
        model.save_pretrained(folder)
    return folder


def load_theirs(base: nn.Module, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():  # missing keys are warned of, too: these are errors
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def keys_of(folder: Path) -> set[str]:
    with safe_open(folder / TENSORS, "pt") as file:
        return set(file.keys())


def both_ways(base: nn.Module, inputs: Tensor, tmp_path: Path, **options: Any) -> None:
    """Saved there, loaded here, saved again here, loaded there: the same function every time."""
    source = theirs(base, **options)
    expected = logits(source(inputs))
    assert (expected - logits(base(inputs))).abs().max() > 1e-3
    model = copy.deepcopy(base)
    assert load_adapter(model, save_theirs(source, tmp_path / "theirs")) == ["default"]
    torch.testing.assert_close(logits(model(inputs)), expected, **CLOSE)
    with disable_adapter(model):
        assert bit_equal(logits(model(inputs)), logits(base(inputs)))
    save_adapter(model, tmp_path / "ours")
    back = load_theirs(base, tmp_path / "ours")
    torch.testing.assert_close(logits(back(inputs)), expected, **CLOSE)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    save_adapter(again, tmp_path / "again")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


# -- options -----------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "bias of targets": {"target_modules": ["q", "v"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q"], "bias": "all"},
    "rank pattern": {"target_modules": ["q", "v"], "rank_pattern": {"layers.1.attn.q": 1, "v": 3}},
    "alpha pattern": {"target_modules": ["q", "v"], "alpha_pattern": {r"layers\.0\..*q": 1, "v": 5}},
    "first entry wins": {"target_modules": ["q"], "rank_pattern": {"1.attn.q": 1, "q": 3}},
    "whole path": {"target_modules": ["layers.0.attn.q", "head"]},
    "regular expression": {"target_modules": r".*\.(0|1)\.attn\.[qk]"},
    "excluded": {"target_modules": ["q", "v"], "exclude_modules": ["layers.1.attn.q"]},
    "layers": {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "dora and rslora": {"target_modules": ["q", "embed"], "use_dora": True, "use_rslora": True},
    "a head": {"target_modules": ["q"], "modules_to_save": ["head"]},
    "a head and a table": {"target_modules": ["q"], "modules_to_save": ["head", "embed"]},
    "all of it": {
        "target_modules": ["q", "embed", "mlp.0"], "modules_to_save": ["head"], "bias": "lora_only",
        "use_rslora": True, "lora_alpha": 5, "rank_pattern": {"embed": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_both_ways(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    both_ways(Transformer().double(), token_ids(), tmp_path, **OPTIONS[name])


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_keep_their_order(option: str, tmp_path: Path) -> None:
    """Of which the first that fits counts. (PEFT's own files are sorted, and lose it.)"""
    base = Transformer().double()
    model = copy.deepcopy(base)
    pattern = {"q": 5, "attn.*": 2, "0.attn.v": 7}
    inject_adapter(model, LoraConfig(r=3, target_modules=["q", "v"], **{option: pattern}))
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    save_adapter(model, tmp_path)
    assert list(config_of(tmp_path)[option].items()) == list(pattern.items())
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path)
    assert bit_equal(other(token_ids()), model(token_ids()))
    theirs = load_theirs(base, tmp_path)
    torch.testing.assert_close(theirs(token_ids()), model(token_ids()), **CLOSE)


def test_pefts_modules_to_save_by_ending(tmp_path: Path) -> None:
    """Peft also copies what merely ends with the name: `overhead` and `subhead`."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
            self.overhead = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.subhead = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x) + self.overhead(x).tanh() + self.subhead(x).sin()

    torch.manual_seed(0)
    base, x = Heads().double(), torch.randn(3, 4, dtype=torch.float64)
    both_ways(base, x, tmp_path, target_modules=["body"], modules_to_save=["head"])
    assert config_of(tmp_path / "ours")["modules_to_save"] == ["head", "overhead", "subhead"]
    # Ours takes what has that name. Peft needs the others' tensors in the file all the same.
    model = ours(base, target_modules=["body"], modules_to_save=["head"])
    assert not any("overhead" in key or "subhead" in key for key in adapter_state_dict(model))
    save_adapter(model, tmp_path / "exact")
    assert config_of(tmp_path / "exact")["modules_to_save"] == ["head"]
    torch.testing.assert_close(load_theirs(base, tmp_path / "exact")(x), model(x), **CLOSE)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "exact")
    assert adapter_state_dict(again).keys() == adapter_state_dict(model).keys()
    assert bit_equal(again(x), model(x))
    save_adapter(again, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "exact")


@pytest.mark.parametrize("wanted", [None, "all-linear", "(a+)+$", ["nothing", "of"], 7], ids=repr)
def test_tensors_say_what_is_adapted(wanted: Any, tmp_path: Path) -> None:
    """`target_modules` is a rule for a model that the file cannot know; it may be anything."""
    torch.manual_seed(0)
    base = Transformer().double()
    model = ours(base, target_modules=["q"], rank_pattern={"layers.0.attn.q": 1})
    save_adapter(model, tmp_path)
    content = {**config_of(tmp_path), "target_modules": wanted, "layers_to_transform": "odd"}
    (tmp_path / CONFIG).write_text(json.dumps(content))
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert bit_equal(again(token_ids()), model(token_ids()))


def test_a_config_with_nothing_but_its_type(tmp_path: Path) -> None:
    base = Transformer()
    model = ours(base, r=8, target_modules=["q"])
    save_adapter(model, tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert adapter_state_dict(again).keys() == adapter_state_dict(model).keys()


class Nested(nn.Module):
    """`proj` inside and outside of `block`: as a name, the outer path selects both."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.block = nn.Linear(4, 4), nn.Module()
        self.block.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block.proj(self.proj(x).tanh())


@pytest.mark.parametrize("wanted", ["proj", r"block\.proj", r".*proj"])
def test_a_path_that_ends_another_one(wanted: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Nested().double(), torch.randn(3, 4, dtype=torch.float64)
    both_ways(base, x, tmp_path, target_modules=wanted)
    named = {"proj": "proj", r"block\.proj": ["block.proj"], r".*proj": ["proj"]}
    assert config_of(tmp_path / "ours")["target_modules"] == named[wanted]


def test_modules_called_base_layer(tmp_path: Path) -> None:
    """Which is how peft calls the inside of its wrappers."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("base_layer", nn.Sequential())
    base.base_layer.add_module("base_layer", nn.Linear(4, 4).double())
    x = torch.randn(3, 4, dtype=torch.float64)
    model = ours(base, target_modules=["base_layer.base_layer"], bias="lora_only")
    save_adapter(model, tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert bit_equal(again(x), model(x))


# -- names -------------------------------------------------------------------------------------


def test_names_of_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Transformer().double()
    model = ours(base, "style", target_modules=["q"])
    save_adapter(model, tmp_path / "ours", "style")
    for name in (None, "style", "exp-lora_A 2", "lora_A"):
        again = copy.deepcopy(base)
        assert load_adapter(again, tmp_path / "ours", name) == [name or "default"]
        assert bit_equal(again(token_ids()), model(token_ids()))
    peft_model = theirs(base, target_modules=["q"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["v"]))
    peft_model.set_adapter("other")
    randomize([p for p in peft_model.parameters() if p.requires_grad], 0.3)
    save_theirs(peft_model, tmp_path / "theirs")  # "default" at its top, "other" inside
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs" / "other", "other")
    assert active_adapters(again) == ["default"]
    set_adapter(again, "other")
    torch.testing.assert_close(again(token_ids()), peft_model(token_ids()), **CLOSE)
    (tmp_path / "theirs" / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="Give one of the adapter folders in it: other"):
        load_adapter(again, tmp_path / "theirs", "third")
    with pytest.raises(AdapterStateError, match="already has an adapter 'other'"):
        load_adapter(again, tmp_path / "theirs" / "other", "other")
    with pytest.raises(AdapterStateError, match=r"No adapter 'stile'.*Did you mean 'style'"):
        save_adapter(model, tmp_path / "none", "stile")
    assert not (tmp_path / "none").exists()


def test_a_file_of_the_folder_stands_for_it(tmp_path: Path) -> None:
    model = ours(Transformer(), target_modules=["q"])
    save_adapter(model, tmp_path)
    for name in (CONFIG, TENSORS):
        again = Transformer()
        load_adapter(again, tmp_path / name)
        assert adapter_names(again) == ["default"]


def test_several_adapters_of_different_types_in_one_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Transformer().double()
    model = ours(base, "one", target_modules=["q", "embed"], use_dora=True)
    inject_adapter(model, LohaConfig(r=2, target_modules=["q"]), "two")
    inject_adapter(model, LoraConfig(r=1, target_modules=["k"], modules_to_save=["head"]), "three")
    names = ["three", "two", "one"]
    set_adapter(model, names)
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    save_adapter(model, tmp_path, ["two", "one", "three", "one"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, "one", "three", "two"]
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path) == ["two", "one", "three"]
    assert active_adapters(again) == ["two"]
    beside = copy.deepcopy(base)  # the order is part of a mix with DoRA: the same one here
    for name in ("two", "one", "three"):
        load_adapter(beside, tmp_path / name, name)
    for adapted in (again, beside):
        set_adapter(adapted, names)
    assert bit_equal(again(token_ids()), beside(token_ids()))
    for name in names:
        for key, tensor in adapter_state_dict(model, name).items():
            assert bit_equal(tensor, adapter_state_dict(again, name)[key])
    with pytest.raises(AdapterStateError, match="which keep their names"):
        load_adapter(copy.deepcopy(base), tmp_path, "mine")
    with pytest.raises(KeyError, match="MIX"):
        load_theirs(base, tmp_path)  # one of them alone it can
    assert load_theirs(base, tmp_path / "one") is not None


@pytest.mark.parametrize("names", [[], ["/tmp/evil"], ["a/b"], ["a\\b"]], ids=str)
def test_a_mix_stays_in_its_folder(names: list[str], tmp_path: Path) -> None:
    model = Transformer()
    for name in names:
        inject_adapter(model, LoraConfig(r=1, target_modules=["q"]), name)
    with pytest.raises(AdapterStateError, match="cannot be saved in a folder of folders"):
        save_adapter(model, tmp_path / "mix", names)
    assert not (tmp_path / "mix").exists()


# -- tied weights and tables -------------------------------------------------------------------


TABLES: dict[str, dict[str, Any]] = {
    "table": {"target_modules": ["embed_tokens", "q_proj"]},
    "table and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "copied table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "copied head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both copied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]},
}


@pytest.mark.parametrize("ensure", [False, True], ids=["", "ensure_weight_tying"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_and_heads(name: str, tied: bool, ensure: bool, tmp_path: Path) -> None:
    """Peft saves the base's own tables along with them, and with tied weights some things twice."""
    both_ways(
        tied_llama(tied), tied_llama_ids(), tmp_path, ensure_weight_tying=ensure, **TABLES[name]
    )


def test_a_table_that_was_saved_along_must_be_this_ones(tmp_path: Path) -> None:
    source = theirs(tied_llama(), target_modules=["embed_tokens"])
    save_theirs(source, tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys_of(tmp_path)
    other = tied_llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1e-3
    with pytest.raises(AdapterMismatchError, match=r"comes with 'model.embed_tokens.weight' \[16"):
        load_adapter(other, tmp_path)
    other.resize_token_embeddings(18)
    with pytest.raises(AdapterMismatchError, match=r"resize its embeddings|does not fit"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_alone(tied: bool, tmp_path: Path) -> None:
    """LoRA without targets is TRAINABLE_TOKENS in peft."""
    base = tied_llama(tied)
    source = peft.get_peft_model(
        copy.deepcopy(base), peft.TrainableTokensConfig(token_indices=[5, 2])
    )
    randomize([p for p in source.parameters() if p.requires_grad], 0.3)
    save_theirs(source, tmp_path / "theirs")
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs")
    expected = source(tied_llama_ids()).logits
    assert (expected - base(tied_llama_ids()).logits).abs().max() > 1e-3
    torch.testing.assert_close(model(tied_llama_ids()).logits, expected, **CLOSE)
    save_adapter(model, tmp_path / "ours")
    assert config_of(tmp_path / "ours")["peft_type"] == "TRAINABLE_TOKENS"
    back = load_theirs(base, tmp_path / "ours")
    torch.testing.assert_close(back(tied_llama_ids()).logits, expected, **CLOSE)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    assert bit_equal(again(tied_llama_ids()).logits, model(tied_llama_ids()).logits)


def test_rows_alone_of_several_tables(tmp_path: Path) -> None:
    """The same rows of every table are peft's too; different ones are ours alone."""
    torch.manual_seed(0)
    base = OneLayerNet("embedding").double()
    inputs = torch.randint(0, 11, (4, 5))
    paths = ["layers.0.proj", "layers.1.proj"]
    for wanted, kind in (
        ({"proj": [3, 1]}, "TRAINABLE_TOKENS"),
        ({paths[0]: [3, 1], paths[1]: [2]}, "LORA_LIGHTNING_LORA"),
    ):
        model = ours(base, target_modules=[], trainable_token_indices=wanted)
        save_adapter(model, tmp_path / kind)
        assert config_of(tmp_path / kind)["peft_type"] == kind
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path / kind)
        assert bit_equal(again(inputs), model(inputs))
    theirs_again = load_theirs(base, tmp_path / "TRAINABLE_TOKENS")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "TRAINABLE_TOKENS")
    torch.testing.assert_close(theirs_again(inputs), again(inputs), **CLOSE)


# -- where the adapter sits --------------------------------------------------------------------


def test_inside_of_a_lightning_module(tmp_path: Path) -> None:
    module = Net().double().eval()
    x = torch.randn(3, 8, dtype=torch.float64)
    base = copy.deepcopy(module.body)
    inject_adapter(module.body, LoraConfig(r=2))
    randomize([p for p in module.body.parameters() if p.requires_grad], 0.3)
    save_adapter(module.body, tmp_path / "body")
    assert all(key.startswith("base_model.model.2.") for key in keys_of(tmp_path / "body"))
    z = module.norm(module.embed(x))
    torch.testing.assert_close(
        load_theirs(base, tmp_path / "body").eval()(z), module.body(z), **CLOSE
    )
    other = Net().double().eval()
    load_adapter(other.body, tmp_path / "body")
    assert bit_equal(other(x), module(x))
    with pytest.raises(AdapterMismatchError, match=r"only with 'body.' before them"):
        load_adapter(Net(), tmp_path / "body")
    save_adapter(module, tmp_path / "module")  # by the names of the whole
    other = Net().double().eval()
    load_adapter(other, tmp_path / "module")
    assert bit_equal(other(x), module(x))


def test_a_bare_layer_is_no_model(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    for wanted in ("all-linear", ["weight"], ".*"):
        with pytest.raises(LoraError, match="target_modules"):
            inject_adapter(layer, LoraConfig(r=2, target_modules=wanted))
    save_adapter(ours(nn.Sequential(layer)), tmp_path)
    with pytest.raises(AdapterMismatchError, match="does not have"):
        load_adapter(layer, tmp_path)
    assert type(layer) is nn.Linear


class Aliased(nn.Module):
    """`encoder` is also reached by its own name, as in many LightningModules."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer()
        self.zero = self.model.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.zero(self.model.embed(x)).sum()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # the second name
def test_a_block_with_two_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Aliased().double()
    options = {"target_modules": ["q"], "modules_to_save": ["norm"], "bias": "lora_only"}
    both_ways(base, token_ids(), tmp_path, **options)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / TENSORS)
    second = {key.replace("model.model.layers.0.", "model.zero."): t for key, t in tensors.items()}
    assert second.keys() != tensors.keys()
    for content in (second, {**tensors, **{key: t.clone() for key, t in second.items()}}):
        save_file(content, tmp_path / "ours" / TENSORS)
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path / "ours")
        assert bit_equal(again(token_ids()), model(token_ids()))
    content["base_model.model.zero.attn.q.lora_A.weight"] += 1
    save_file(content, tmp_path / "ours" / TENSORS)
    with pytest.raises(AdapterMismatchError, match=r"twice.*with different values"):
        load_adapter(copy.deepcopy(base), tmp_path / "ours")


def test_a_layer_in_two_places_is_ours_alone(tmp_path: Path) -> None:
    """Peft adapts the first place only, so that its file means something else there."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    torch.manual_seed(0)
    base, x = Twice(), torch.randn(3, 4)
    model = ours(base, target_modules=["a"])
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "LORA_LIGHTNING_LORA"
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert bit_equal(again(x), model(x))
    with pytest.raises(KeyError, match="LORA_LIGHTNING"):
        load_theirs(base, tmp_path)


def test_a_copy_keeps_what_no_file_holds(tmp_path: Path) -> None:
    """A buffer that is not saved (Gemma's embed_scale) is the module's own in its copy too."""
    torch.manual_seed(0)
    base = OneLayerNet("embedding-scaled")
    inputs = torch.randint(0, 11, (4, 5))
    model = ours(base, target_modules=["head"], modules_to_save=["layers.0.proj"])
    save_adapter(model, tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert bit_equal(again(inputs), model(inputs))
    empty = copy.deepcopy(base)
    config = LoraConfig(r=2, target_modules=["head"], modules_to_save=["layers.0.proj"])
    inject_adapter(empty, config, low_cpu_mem_usage=True)
    load_adapter_state_dict(empty, adapter_state_dict(model))
    assert bit_equal(empty(inputs), model(inputs))


# -- the same bytes ----------------------------------------------------------------------------

_SAVE = """
import torch
from torch import nn
from lora_lightning import LoraConfig, inject_adapter, save_adapter

def save(folder):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcdefgh"})
    options = dict(modules_to_save={"g", "h"}, bias="all", alpha_pattern={"a": 2, "b": 3})
    one = LoraConfig(r=2, target_modules={"a", "b", "c", "d"}, **options)
    inject_adapter(model, one, "one", seed=1)
    inject_adapter(model, LoraConfig(r=2, target_modules={"a", "f", "e"}), "two", seed=2)
    save_adapter(model, folder, ["one", "two"])
"""


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
def test_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    here: dict[str, Any] = {}
    exec(_SAVE, here)
    here["save"](tmp_path / "here")
    seed = "4711" if os.environ.get("PYTHONHASHSEED") != "4711" else "1"
    subprocess.run(
        [sys.executable, "-c", f"{_SAVE}\nsave({str(tmp_path / 'there')!r})"],
        env={**os.environ, "PYTHONHASHSEED": seed},
        check=True,
    )
    assert len(digests(tmp_path / "here")) == 5
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    base = Transformer()
    model = ours(base, **OPTIONS["all of it"])
    save_adapter(model, tmp_path / "first")
    for step in ("second", "third"):
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path / "first")
        save_adapter(again, tmp_path / step)
        assert digests(tmp_path / step) == digests(tmp_path / "first")
    save_adapter(model, tmp_path / "first")  # over what is there
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peft asks the hub for the base's config at every save; here nothing is asked for."""

    def blocked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    base = tied_llama()
    base.config.name_or_path = "meta-llama/Llama-3.2-1B"
    model = ours(base, target_modules=["embed_tokens", "lm_head"])
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B"
    load_adapter(copy.deepcopy(base), tmp_path)
    with pytest.raises(CheckpointError, match="Nothing is fetched from a hub"):
        load_adapter(base, "somebody/some-adapter")


# -- other readers -----------------------------------------------------------------------------


def test_transformers_reads_our_folder(tmp_path: Path) -> None:
    base = tied_llama().float()
    base.save_pretrained(tmp_path / "base")
    named = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = ours(named, target_modules=["q_proj", "down_proj"], use_rslora=True, lora_alpha=3)
    save_adapter(model, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["base_model_name_or_path"] == str(tmp_path / "base")
    expected = model(tied_llama_ids()).logits
    named.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(named(tied_llama_ids()).logits, expected, rtol=1e-5, atol=1e-5)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(auto(tied_llama_ids()).logits, expected, rtol=1e-5, atol=1e-5)


def strict_delta(folder: Path, module: str) -> Tensor:
    """What vLLM and llama.cpp's converter make of a folder: as strict as the stricter of both.

    vLLM: r, lora_alpha and target_modules must be there, DoRA and modules_to_save must not; every
    module of the file has the last part of its name in target_modules; only lora_A, lora_B and the
    two of embeddings exist; one scale for all. llama.cpp: needs the name of the base, exits on any
    other key.
    """
    config = config_of(folder)
    for key in ("r", "lora_alpha", "target_modules"):
        assert config[key], key
    assert isinstance(config["target_modules"], list)
    assert config["base_model_name_or_path"]
    assert config["peft_type"] == "LORA"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert config["bias"] == "none"
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    with safe_open(folder / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(folder / TENSORS)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(
            r"base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])", key
        )
        assert found is not None, key
        assert found[1].rpartition(".")[2] in config["target_modules"], key
        assert tensor.dtype in (torch.float32, torch.float64)
        pairs.setdefault(found[1], {})[found[2]] = tensor
    assert all(len(pair) == 2 for pair in pairs.values())
    assert all(min(t.shape) == config["r"] for t in tensors.values())
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
    pair = pairs[module]
    if "lora_A.weight" in pair:
        return scale * pair["lora_B.weight"] @ pair["lora_A.weight"]
    return scale * (pair["lora_embedding_B"] @ pair["lora_embedding_A"]).t()


@pytest.mark.parametrize("start", [True, "pissa", "olora", "orthogonal"], ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_strict_readers_get_the_right_update(start: Any, rslora: bool, tmp_path: Path) -> None:
    base = tied_llama(tied=False)
    base.config.name_or_path = "a/base"
    targets = ["q_proj", "down_proj"] + (["embed_tokens"] if start is True else [])
    model = ours(
        base, target_modules=targets, init_lora_weights=start, use_rslora=rslora, lora_alpha=5
    )
    save_adapter(model, tmp_path)
    merged = load_theirs(base, tmp_path).merge_and_unload()
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        expected = merged.get_submodule(path).weight - base.get_submodule(path).weight
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(strict_delta(tmp_path, path), expected.detach(), **CLOSE)
    if start is True:
        expected = (merged.model.embed_tokens.weight - base.model.embed_tokens.weight).detach()
        torch.testing.assert_close(strict_delta(tmp_path, "model.embed_tokens"), expected, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}],
    ids=str,
)
def test_the_strict_reader_can_fail(options: dict[str, Any], tmp_path: Path) -> None:
    base = tied_llama(tied=False)
    base.config.name_or_path = "a/base"
    base.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(8).double())
    save_adapter(ours(base, target_modules=["q_proj"], **options), tmp_path)
    with pytest.raises(AssertionError):
        strict_delta(tmp_path, "model.layers.0.self_attn.q_proj")
