"""`merge` of every kind of layer and base: plain transformers gives the unmerged logits to 1e-5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_lightning
from lora_lightning.errors import AdapterStateError, ConfigError
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import find_run
from tests.helpers.merged_runs import (
    IDS,
    asked,
    chat_run,
    classification_run,
    llama_run,
    plain_logits,
    seq2seq_run,
    tiny_causal_lm,
    unmerged_logits,
)
from tests.helpers.tiny_lm import tiny_llama

merge = lora_lightning.merge
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]

EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TIED = {"tie_word_embeddings": True}
Maker = Callable[[Path], Path]


def llama(lora: dict[str, Any], **config: Any) -> Maker:
    return lambda folder: llama_run(folder, lora, **config)


def other(config_class: str, lora: dict[str, Any]) -> Maker:
    def make(folder: Path) -> Path:
        tiny_causal_lm(folder / "base", config_class)
        return chat_run(folder, lora)

    return make


def quantized(kind: str, lora: dict[str, Any] | None = None) -> Maker:
    def make(folder: Path) -> Path:
        tiny_llama(folder / "base", "chatml", hidden_size=64)
        return chat_run(folder, lora or {}, model={"quantize": kind})

    return make


KINDS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "Linear": (llama({}), {}),
    "Conv1D": (other("GPT2Config", {}), {}),
    "Embedding": (llama({"target_modules": ["embed_tokens", "lm_head", "down_proj"]}), {}),
    "tied, the head": (llama({"target_modules": ["q_proj", "lm_head"]}, **TIED), {}),
    "tied, the embedding": (llama({"target_modules": ["embed_tokens"]}, **TIED), {}),
    "tied, both": (llama({"target_modules": ["embed_tokens", "lm_head"]}, **TIED), {}),
    "tied, a new head": (llama({"modules_to_save": ["lm_head"]}, **TIED), {}),
    "tied, rows": (llama({"trainable_token_indices": [5, 6, 7]}, **TIED), {}),
    "rows": (llama({"trainable_token_indices": [5, 6, 7]}), {}),
    "Mixtral's experts": (other("MixtralConfig", {**EXPERTS, "target_modules": ["q_proj"]}), {}),
    "Mixtral's attention": (other("MixtralConfig", {"target_modules": ["q_proj", "v_proj"]}), {}),
    "Qwen2-MoE's experts": (other("Qwen2MoeConfig", EXPERTS), {}),
    "DoRA": (llama({"use_dora": True}), {}),
    "rsLoRA, PiSSA": (llama({"use_rslora": True, "init_lora_weights": "pissa"}), {}),
    "biases": (llama({"bias": "all"}, attention_bias=True), {}),
    "modules in full": (llama({"modules_to_save": ["lm_head", "embed_tokens"]}), {}),
    "NF4": (quantized("nf4"), {"dequantize": True}),
    "FP4, DoRA": (quantized("fp4", {"use_dora": True}), {"dequantize": True}),
    "int8": (quantized("int8"), {"dequantize": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = KINDS[kind]
    run = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = merge(run, tmp_path / "merged", max_shard_size="50KB", **options)
    assert "shard by shard" in result.how, result.how
    assert result.saved is not None
    assert result.saved.largest < 1e-5
    if kind == "int8":  # which rounds what it reads, too, as no plain model does
        return
    wanted, base = unmerged_logits(run)
    assert (plain_logits(tmp_path / "merged") - wanted).abs().max() < 1e-5
    assert (base - wanted).abs().max() > 1e-3


def test_a_tied_head_written_without_being_untied_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = llama_run(tmp_path, {"target_modules": ["q_proj", "lm_head"]}, **TIED)
    monkeypatch.chdir(tmp_path)
    result = merge(run, "merged", check=0)
    assert "'lm_head' has a weight of its own now" in str(result)
    config = json.loads(Path("merged/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    wanted, _ = unmerged_logits(run)
    state = load_file("merged/model.safetensors")
    assert torch.equal(
        state["model.embed_tokens.weight"],
        load_file("base/model.safetensors")["model.embed_tokens.weight"],
    )
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    broken.lm_head.weight = broken.model.embed_tokens.weight  # as merging into the one would be
    assert (asked(broken) - wanted).abs().max() > 1e-3


def test_a_model_whose_tables_are_tied_in_any_case_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = seq2seq_run(tmp_path, {"target_modules": ["q", "lm_head"]})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterStateError, match="share one weight in this t5 model"):
        merge(run, "merged")
    assert not Path("merged").exists()


def test_experts_are_written_as_their_files_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_causal_lm(tmp_path / "base", "MixtralConfig")
    run = chat_run(tmp_path, EXPERTS)
    monkeypatch.chdir(tmp_path)
    merge(run, "merged", check=0)
    base, merged = (load_file(f"{place}/model.safetensors") for place in ("base", "merged"))
    assert base.keys() == merged.keys()
    experts = [key for key in base if ".experts." in key]
    assert len(experts) > 8  # one by one, where the network has them fused
    assert [key for key in experts if torch.equal(base[key], merged[key])] == []


def test_a_head_that_trained_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = classification_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = merge(run, "merged")
    assert result.saved is not None
    assert result.saved.largest < 1e-5
    wanted, _ = unmerged_logits(run)
    auto = "AutoModelForSequenceClassification"
    assert (plain_logits(tmp_path / "merged", auto) - wanted).abs().max() < 1e-5
    config = json.loads(Path("merged/config.json").read_text())
    assert {*config["id2label"].values()} == {"pos", "neg"}


def test_seq2seq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = seq2seq_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    merge(run, "merged", max_shard_size="50KB")
    wanted, base = unmerged_logits(run)
    found = plain_logits(tmp_path / "merged", "AutoModelForSeq2SeqLM")
    assert (found - wanted).abs().max() < 1e-5
    assert (base - wanted).abs().max() > 1e-3


def test_a_quantized_base_is_refused_without_dequantize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quantized("nf4")(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"was rounded to nf4.*--dequantize.*\(dequantize\)"):
        merge(run, "merged")
    merge(run, "merged", dequantize=True, check=0)
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    # Rounded again, most of the adapter is gone.
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wanted, base = unmerged_logits(run)
    again = AutoModelForCausalLM.from_pretrained(
        "merged",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head"],
        ),
    )
    assert (asked(again) - wanted).abs().mean() > 0.1 * (base - wanted).abs().mean()


def test_a_quantized_base_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(tmp_path / "base", "chatml", hidden_size=64)
    run = chat_run(tmp_path, {"bias": "all"}, model={"quantize": "nf4"})
    monkeypatch.chdir(tmp_path)
    state = load_file("base/model.safetensors")
    torch.save(state, "base/pytorch_model.bin")
    Path("base/model.safetensors").unlink()
    result = merge(run, "merged", dequantize=True)
    assert "in memory as a whole" in result.how
    wanted, _ = unmerged_logits(run)
    assert (plain_logits(tmp_path / "merged") - wanted).abs().max() < 1e-5


def test_files_that_are_quantized_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(tmp_path / "base", "chatml", hidden_size=64)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    small.save_pretrained(tmp_path / "base")
    run = chat_run(tmp_path, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"was rounded to few bits.*\(dequantize\)"):
        merge(run, "merged")
    result = merge(run, "merged", dequantize=True)
    assert "in memory as a whole, because the files of its base are quantized" in result.how
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    assert result.saved is not None
    assert result.saved.largest < 1e-5


def test_a_class_of_ones_own_that_is_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = llama_run(tmp_path, {"target_modules": ["q_proj", "lm_head"]}, **TIED)
    monkeypatch.chdir(tmp_path)
    result = merge(run, "merged", module=type("Mine", (lora_lightning.CausalLM,), {}))
    assert "in memory as a whole, because the module was given" in result.how
    wanted, _ = unmerged_logits(run)
    assert (plain_logits(tmp_path / "merged") - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_files_in_16_bits_stay_so(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    tiny_llama(tmp_path / "base", "chatml")
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "base")
    run = chat_run(tmp_path, {}, trainer={"precision": precision})
    monkeypatch.chdir(tmp_path)
    result = merge(run, "merged")
    found = load_file("merged/model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert result.dtype == "bfloat16"
    exact = trained_module(find_run(run)).float()
    lora_lightning.merge_and_unload(exact)
    wanted = exact.network.state_dict()
    assert all(torch.equal(found[key], wanted[key].bfloat16()) for key in found)


PLAIN = """
import sys
sys.modules["lora_lightning"] = None
import torch, transformers
network = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(network.eval()(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
assert not any(name.startswith("lora_lightning.") for name in sys.modules)
"""


def test_in_a_process_that_knows_nothing_of_this_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = llama_run(tmp_path, {"use_dora": True})
    monkeypatch.chdir(tmp_path)
    merge(run, "merged", max_shard_size="50KB", check=0)
    torch.save(IDS, "ids.pt")
    command = [sys.executable, "-c", PLAIN, "merged", "ids.pt", "logits.pt"]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    wanted, _ = unmerged_logits(run)
    assert (torch.load("logits.pt") - wanted).abs().max() < 1e-5


# -- memory --------------------------------------------------------------------------------------

MEASURED = """
import sys, threading, time
from pathlib import Path

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

import torch, transformers, lora_lightning
from lora_lightning import merge
import lora_lightning.tasks.causal_lm, lora_lightning.callback, transformers.models.llama
merge("warm/runs/lm", "warm-merged", check=0, force=True)
before, peak, stop = anonymous(), [0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
merge("runs/lm", "merged", check=0, max_shard_size=sys.argv[1], force=True)
stop.set()
thread.join()
print("PEAK", peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_that_of_a_shard_not_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """170 MB of weights in shards of 8 MB, and in one."""
    (tmp_path / "warm").mkdir()
    llama_run(tmp_path / "warm", {})
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16}
    tiny_llama(tmp_path / "base", "chatml", **sizes)
    run = chat_run(tmp_path, {}, trainer={"max_steps": 1})
    monkeypatch.chdir(tmp_path)
    model = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))

    def peak(size: str) -> int:
        command = [sys.executable, "-c", MEASURED, size]
        environment = {
            **os.environ,
            "MALLOC_TRIM_THRESHOLD_": "0",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(done.stdout.split("PEAK")[1])

    by_shards, whole = peak("8MB"), peak("5GB")
    print(f"model {model:,}, peak by shards {by_shards:,}, in one {whole:,}")
    assert model > 120e6
    assert by_shards < 0.4 * model
    assert whole > 0.8 * model  # the measurement can tell
    assert run.exists()
