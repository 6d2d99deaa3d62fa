"""Files whose keys are not as PEFT writes them: read in the one way that fits, or refused.

The truth is peft: the same adapter saved by it, or its model's output.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning import LoraConfig, hotswap_adapter, inject_adapter, load_adapter, save_adapter
from lora_lightning.errors import AdapterMismatchError
from tests.helpers.adapted_models import small_llama
from tests.helpers.tensors import bit_equal, randomize

TENSORS = "adapter_model.safetensors"
IDS = torch.tensor([[3, 1, 4, 1, 5]])
P = "base_model.model."


def theirs(config: peft.PeftConfig) -> peft.PeftModel:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(small_llama(), config)
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    return model.eval()


def saved(model: peft.PeftModel, folder: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return load_file(folder / TENSORS)


def rewritten(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, folder / TENSORS)
    return folder


def inside_layers(key: str, word: str) -> str:
    return key.replace(".self_attn.", f".{word}.self_attn.")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "torch.compile of the inside": lambda key: key.replace(P, f"{P}_orig_mod."),
    "torch.compile of layers": lambda key: inside_layers(key, "_orig_mod"),
    "DDP": lambda key: f"module.{key}",
    "DDP around torch.compile": lambda key: f"module._orig_mod.{key}",
    "DDP inside PEFT's": lambda key: key.replace(P, f"{P}module."),
    "Fabric": lambda key: f"_forward_module.{key}",
    "FSDP": lambda key: inside_layers(f"_fsdp_wrapped_module.{key}", "_fsdp_wrapped_module"),
    "checkpointing": lambda key: inside_layers(key, "_checkpoint_wrapped_module"),
    "no prefix": lambda key: key.removeprefix(P),
    "prefix twice": lambda key: P + key,
    "no prefix, DDP": lambda key: "module." + key.removeprefix(P),
    "adapter's name": lambda key: key.replace("lora_A.", "lora_A.my-one.").replace(
        "lora_B.", "lora_B.my-one."
    ),
    "all at once": lambda key: "module." + inside_layers(
        key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        "_orig_mod",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_what_wrapped_the_model_is_left_out(spelling: Callable[[str], str], tmp_path: Path) -> None:
    model = theirs(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_alpha=3))
    tensors = saved(model, tmp_path)
    renamed = {spelling(key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    rewritten(tmp_path, renamed)
    ours = small_llama()
    load_adapter(ours, tmp_path)
    expected = model(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-10, atol=1e-10)
    slot = small_llama()
    inject_adapter(slot, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    hotswap_adapter(slot, tmp_path)
    torch.testing.assert_close(slot(IDS).logits, expected, rtol=1e-10, atol=1e-10)


STATES: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], bias="none"),
    "DoRA": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True),
    "head": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "rows": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[2, 5]),
    "LoHa": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "LoKr": peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "(IA)^3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": peft.VeraConfig(r=2, target_modules=["q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("around", ["", "module."])
def test_a_state_dict_that_a_trainer_saved_itself(kind: str, around: str, tmp_path: Path) -> None:
    """With the adapter's name in every key, as peft's modules have it."""
    model = theirs(STATES[kind])
    saved(model, tmp_path)
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if kind == "VeRA":
        state |= {f"base_model.vera_{x}.default": getattr(model.base_model, f"vera_{x}")["default"] for x in "AB"}  # fmt: skip
    assert all(".default" in name for name in state)
    rewritten(tmp_path, {around + name: tensor for name, tensor in state.items()})
    ours = small_llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, rtol=1e-6, atol=1e-6)


class Odd(nn.Module):
    """Modules called as foreign parts of keys are."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            inner = nn.Module()
            inner.fc = nn.Linear(4, 4)
            self.add_module(name, inner)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = torch.tanh(module.fc(x))
        return x


@pytest.mark.parametrize(
    "names", [["module"], ["lora_block"], ["base_model"], ["module", "lora_B"]]
)
def test_modules_that_are_called_so(names: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Odd(*names), torch.randn(3, 4)
    model = copy.deepcopy(base)
    inject_adapter(
        model, LoraConfig(r=2, modules_to_save=[f"{names[-1]}.fc"] if names[1:] else None)
    )
    randomize([p for p in model.parameters() if p.requires_grad])
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert bit_equal(base(x), model(x))


def folder_of(keys: list[str], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    tensors = {}
    for key in keys:
        tensors[f"{key}.lora_A.weight"] = torch.ones(2, 4)
        tensors[f"{key}.lora_B.weight"] = torch.ones(4, 2)
    return rewritten(folder, tensors)


def test_two_readings_are_none(tmp_path: Path) -> None:
    model = Odd("first", "module")
    model.module.first = copy.deepcopy(model.first)
    folder = folder_of(["module.first.fc"], tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"2 ways.*'module.first.fc'.*'first.fc'"):
        load_adapter(model, folder)
    load_adapter(model, folder_of([f"{P}module.first.fc"], tmp_path))  # as PEFT writes it: one


@pytest.mark.parametrize("around", ["net.", "engine.module.", "model.backbone."])
def test_a_prefix_in_the_way_is_named(around: str, tmp_path: Path) -> None:
    folder = folder_of([f"{P}{around}first.fc", f"{P}{around}second.fc"], tmp_path)
    with pytest.raises(AdapterMismatchError, match=f"begin with '{around}', which is in the way"):
        load_adapter(Odd("first", "second"), folder)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("first.fc.lora_A.a.b.weight", "has the module 'first.fc'"),
        ("first.fc.lora_C.what.weight", "has the module 'first.fc'"),
        ("first.f.lora_A.weight", "Nearest module: 'first.fc'"),
        ("frist.fc.lora_A.weight", "Nearest module: 'first.fc'"),
    ],
)
def test_the_nearest_module_is_another_one(key: str, words: str, tmp_path: Path) -> None:
    folder = folder_of([f"{P}second.fc"], tmp_path)
    tensors = load_file(folder / TENSORS)
    rewritten(folder, {**tensors, P + key: torch.ones(2, 4)})
    with pytest.raises(AdapterMismatchError, match=words) as error:
        load_adapter(Odd("first", "second"), folder)
    assert "Nearest module" not in str(error.value) or "Nearest" in words


# -- adapter_config.json -----------------------------------------------------------------------

LEFT_OVER: dict[str, dict[str, Any]] = {
    "CorDA, converted": {"corda_config": {"corda_method": "ipm", "verbose": True}},
    "LoRA-GA, converted": {"lora_ga_config": {"direction": "ArB2r", "stable_gamma": 16}},
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "Megatron": {"megatron_config": {"hidden_size": 8}, "megatron_core": "megatron.core"},
    "ms-swift": {"lora_dtype": "bf16", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6, "use_merged_linear": False,
                 "enable_lora": None, "use_qa_lora": False, "swift_type": "LORA"},
    "unsloth": {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True,
                                 "parent_library": "transformers.models.llama.modeling_llama"}},
    "old PEFT": {"merge_weights": False, "enable_lora": None, "runtime_config": {"x": False}},
    "nothing asked for": {"a": None, "b": False, "c": [], "d": {}, "e": "None", "f": {"g": None}},
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_options_that_cannot_change_what_is_computed(kind: str, tmp_path: Path) -> None:
    model = theirs(peft.LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=3))
    saved(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **LEFT_OVER[kind]}))
    ours = small_llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "option",
    [
        {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},  # not converted
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"arrow_config": {"top_k": 2}},
        {"enable_lora": [True, False, True]},
        {"tomorrow": {"strength": 0.5}},
    ],
)
def test_options_that_may_change_it(option: dict[str, Any], tmp_path: Path) -> None:
    saved(theirs(peft.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **option}))
    with pytest.raises(AdapterMismatchError, match=next(iter(option))):
        load_adapter(small_llama(), tmp_path)
