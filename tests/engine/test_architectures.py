"""The engine on transformers' architectures in tiny form: one examination for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import lora_lightning.engine.merging as merging
import lora_lightning.layers.registry as registry
from lora_lightning.adapters.base import DeltaAdapter
from lora_lightning.adapters.lora.linear import LoraAdapter
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.linear import AdaptedLinear
from tests.helpers.architecture_examination import examine_architecture
from tests.helpers.tiny_architectures import example_inputs, tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ENCODERS = (
    "albert bert deberta deberta-v2 distilbert electra esm fnet longformer mobilebert mpnet roberta "
    "roformer squeezebert xlm xlnet"
)
DECODERS = (
    "biogpt bloom codegen deepseek_v3 falcon gemma gemma2 glm4_moe gpt2 gpt_neo gpt_neox gptj jamba "
    "llama mamba mixtral mpt opt phi phi3 qwen2 qwen2_moe qwen3_moe recurrent_gemma"
)
BOTH = "bart m2m_100 marian mbart pegasus t5 whisper"
IMAGES = "beit bit convnext dinov2 poolformer regnet resnet segformer vit"
OTHERS = "audio-spectrogram-transformer clip hubert wav2vec2 wavlm"
ARCHITECTURES = " ".join([ENCODERS, DECODERS, BOTH, IMAGES, OTHERS]).split()

# Whose weights are read past the module, so that an adapter there has nothing to act on.
UNCALLED = {
    "deberta-v2": {"rel_embeddings"},
    "jamba": {"dt_proj"},
    "longformer": {"key_global", "query_global", "value_global"},
    "mamba": {"dt_proj"},
    "wavlm": {"k_proj", "out_proj", "q_proj", "v_proj"},
}
# What PEFT computes otherwise from some layers: position tables and kernels that the module
# transforms, Linears that it takes for experts.
NOT_PEFTS = {
    *("bart", "biogpt", "bit", "marian", "mbart", "opt", "pegasus", "roformer", "whisper"),
    *("deepseek_v3", "glm4_moe"),
}
# Where PEFT refuses the rest: names that it does not adapt in a Mamba, an attribute of a Conv1d.
REFUSED_THERE = {"mamba": "incompatible with Mamba", "whisper": "no attribute 'stride'"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    found = examine_architecture(model, example_inputs(model), tmp_path)
    assert {path.rpartition(".")[2] for path in found.uncalled} == UNCALLED.get(name, set())
    assert (found.peft_type == "LORA") == (name not in NOT_PEFTS)
    assert REFUSED_THERE.get(name, "") in found.not_in_peft
    assert bool(found.not_in_peft) == (name in REFUSED_THERE)
    assert found.not_merged == ""


def test_there_are_enough() -> None:
    assert len(set(ARCHITECTURES)) >= 60


# -- broken twins -----------------------------------------------------------------------------------


def fresh_update(self: Any, x: Tensor, y: Tensor, base: Any) -> Tensor:
    return y + 1e-6 * y


def merges_half(self: Any, weight: Tensor, base: Any) -> Tensor:
    return weight + self.delta_weight().to(weight) / 2


def restores_roughly(self: Any, kept: Any, name: str) -> None:
    self.store_weight(kept * (1 + 1e-6), name)


def scaled(self: Any) -> dict[str, Tensor]:
    state = self.state_dict()
    return {f"{key}.weight": 1.01 * value for key, value in state.items()}


BROKEN: dict[str, tuple[type, str, Any, str]] = {
    "start": (LoraAdapter, "forward", fresh_update, "a fresh adapter changes"),
    "effect": (LoraAdapter, "forward", lambda self, x, y, base: y, "no effect|no gradient"),
    "merge": (DeltaAdapter, "transform_weight", merges_half, "merging changes"),
    "unmerge": (AdaptedLayer, "restore", restores_roughly, "unmerging leaves"),
    "folder": (LoraAdapter, "file_state", scaled, "our folder gives|peft computes"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_engine_is_found(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, broken, message = BROKEN[what]
    monkeypatch.setattr(AdaptedLinear, "is_plain", lambda self: False)  # no fused LoRA
    monkeypatch.setattr(AdaptedLinear, "is_merged_exactly", lambda self: True)
    monkeypatch.setattr("lora_lightning.layers.linear.lora_terms", lambda adapters: None)
    monkeypatch.setattr(owner, name, broken)
    model = tiny("gpt_neox")
    with pytest.raises(AssertionError, match=message):
        examine_architecture(model, example_inputs(model), tmp_path)


def test_unload_that_leaves_a_class_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.architecture_examination.unload", merging.unmerge_adapter)
    model = tiny("bert")
    with pytest.raises(AssertionError, match="unload"):
        examine_architecture(model, example_inputs(model), tmp_path)


def test_a_table_of_positions_taken_for_a_lookup_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [(fits, kind) for fits, kind in registry.LAYER_TYPES if "ByWeight" not in kind.__name__]
    monkeypatch.setattr(registry, "LAYER_TYPES", plain)
    model = tiny("bart")
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        examine_architecture(model, example_inputs(model), tmp_path)
