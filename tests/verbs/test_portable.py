"""*portable*: plain LoRA of one rank and scale 1, that others compute the run's logits from.

The truth is the adapted model here; the readers are peft and two parsers written from the rules of
vLLM and llama.cpp.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_lightning
from lora_lightning import LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_lightning.adapters.plain_lora import plain_factors
from lora_lightning.engine.eva import EvaConfig, eva_start
from lora_lightning.engine.injection import adapters_named
from lora_lightning.errors import ConfigError
from lora_lightning.verbs.export.portable import write_portable
from tests.helpers.strict_readers import of_llama_cpp, of_vllm, read, with_updates

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
IDS = torch.arange(32).view(2, 16) % 16


def llama(tied: bool = False, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=width, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return named(LlamaForCausalLM(config))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_embd=32, n_layer=2, n_head=2, n_positions=16, initializer_range=0.2
    )
    return named(GPT2LMHeadModel(config))


def named(model: Any) -> Any:
    model.config.name_or_path = "a/base"
    return model.eval()


def adapted(base: Any, config: Any) -> Any:
    model = copy.deepcopy(base)
    start = None
    if getattr(config, "init_lora_weights", None) == "eva":
        batches = [{"input_ids": torch.randint(0, 16, (4, 16))} for _ in range(3)]
        config, start = eva_start(model, config, batches, lambda batch: model(**batch))
    inject_adapter(model, config, start=start)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


LLAMA = ["q_proj", "v_proj", "down_proj"]
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    ),
    "rslora and patterns": (
        "LoraConfig",
        {"r": 2, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"layers.0.*": 3}},
    ),
    "pissa": ("LoraConfig", {"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"r": 3, "lora_alpha": 6, "init_lora_weights": "olora"}),
    "eva": (
        "LoraConfig",
        {"r": 3, "lora_alpha": 6, "init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    ),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9}),
    "loha": ("LohaConfig", {"r": 2, "alpha": 8}),
    "lokr": ("LokrConfig", {"r": 2, "alpha": 8}),
    "lokr of two": ("LokrConfig", {"r": 2, "alpha": 8, "decompose_both": True}),
    "vera": ("VeraConfig", {"r": 8}),
}  # fmt: skip


def config_of(name: str, **options: Any) -> Any:
    kind, own = STARTS[name]
    return getattr(lora_lightning, kind)(**{**own, **options})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def by_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert not [w for w in said if "missing" in str(w.message)], said
    return model


def check_readers(base: Any, model: Any, folder: Path) -> None:
    """All of them compute what `model` does, and that is not what the base does."""
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
    torch.testing.assert_close(logits(by_peft(base, folder)), expected, **CLOSE)
    for updates in (of_vllm(folder, base, 64), of_llama_cpp(folder, base.state_dict())):
        torch.testing.assert_close(logits(with_updates(base, updates)), expected, **CLOSE)
    again = copy.deepcopy(base)
    load_adapter(again, folder)
    torch.testing.assert_close(logits(again), expected, **CLOSE)


@pytest.mark.parametrize("name", STARTS)
def test_linears(name: str, tmp_path: Path) -> None:
    base = llama()
    model = adapted(base, config_of(name, target_modules=LLAMA))
    write_portable(model, tmp_path, "default")
    check_readers(base, model, tmp_path)


@pytest.mark.parametrize("name", ["plain", "rslora", "pissa", "adalora", "loha", "vera"])
def test_conv1d(name: str, tmp_path: Path) -> None:
    base = gpt2()
    model = adapted(base, config_of(name, target_modules=["c_attn", "c_fc"]))
    write_portable(model, tmp_path, "default")
    check_readers(base, model, tmp_path)


@pytest.mark.parametrize("name", ["plain", "rslora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings(name: str, tied: bool, tmp_path: Path) -> None:
    base = llama(tied)
    model = adapted(base, config_of(name, target_modules=["q_proj", "embed_tokens"]))
    write_portable(model, tmp_path, "default")
    check_readers(base, model, tmp_path)


def test_ranks_that_adalora_took_away(tmp_path: Path) -> None:
    base = llama()
    pattern = {"layers.0.self_attn.q_proj": [True, False, True, False]}
    model = adapted(base, config_of("adalora", target_modules=LLAMA, rank_pattern=pattern))
    for adapter in adapters_named(model, "default").values():
        with torch.no_grad():
            adapter.lora_E[0] = 0  # taken away, but still there
    write_portable(model, tmp_path, "default")
    check_readers(base, model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3


def test_loftq(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    base = llama(width=128)
    save_file(
        {f"{n}": t.contiguous() for n, t in base.state_dict().items()}, tmp_path / "w.safetensors"
    )
    for layer in base.model.layers:
        rounded = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4")
        rounded.load_state_dict(layer.self_attn.q_proj.state_dict())
        layer.self_attn.q_proj = rounded.to("cpu")
    options = {
        "init_lora_weights": "loftq",
        "loftq_config": {"weights": str(tmp_path / "w.safetensors")},
    }
    model = copy.deepcopy(base)
    inject_adapter(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], **options))
    (tmp_path / "out").mkdir()
    write_portable(model, tmp_path / "out", "default")
    for layer in base.model.layers:  # bitsandbytes' own way on CPUs rounds once more, to bf16
        held = layer.self_attn.q_proj.weight
        dense = nn.Linear(128, 128, bias=False)
        dense.weight = nn.Parameter(bnb.functional.dequantize_4bit(held.data, held.quant_state))
        layer.self_attn.q_proj = dense
    check_readers(base, model, tmp_path / "out")


@pytest.mark.parametrize("name", ["patterns", "rslora and patterns"])
def test_the_peft_folder_itself_would_be_read_wrong(name: str, tmp_path: Path) -> None:
    """What *portable* is for, and that the parsers can fail."""
    base = llama()
    model = adapted(base, config_of(name, target_modules=LLAMA))
    save_adapter(model, tmp_path)
    for updates in (of_vllm(tmp_path, base, 64), of_llama_cpp(tmp_path, base.state_dict())):
        assert (logits(with_updates(base, updates)) - logits(model)).abs().max() > 1e-2


def test_a_scale_that_is_left_out_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama()
    model = adapted(base, config_of("plain", target_modules=LLAMA))

    def unscaled(adapter: Any) -> tuple[Tensor, Tensor]:
        a, b = plain_factors(adapter)
        return a, b / adapter.scaling

    monkeypatch.setattr("lora_lightning.verbs.export.plain.plain_factors", unscaled)
    write_portable(model, tmp_path, "default")
    with pytest.raises(AssertionError):
        check_readers(base, model, tmp_path)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("LoraConfig", {"use_dora": True}, "DoRA rescales the rows"),
    "a bias": ("LoraConfig", {"lora_bias": True}, "a bias of its own"),
    "a head": ("LoraConfig", {"modules_to_save": ["lm_head"]}, "lm_head trains in full"),
    "rows": (
        "LoraConfig",
        {"trainable_token_indices": [3]},
        "rows of .*embed_tokens train in full",
    ),
    "full rank": ("LohaConfig", {"r": 6}, "has rank 36, which is as large as"),
    "full kron": ("LokrConfig", {"r": 8}, "is of full rank"),
    "factors": ("Ia3Config", {"feedforward_modules": []}, "of the type IA3 is no product"),
    "turns": ("OftConfig", {"oft_block_size": 4}, "of the type OFT is no product"),
    "places": ("ShiraConfig", {"r": 2}, "of the type SHIRA is no product"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold(name: str, tmp_path: Path) -> None:
    kind, options, said = REFUSED[name]
    base = llama()
    inject_adapter(base, getattr(lora_lightning, kind)(target_modules=["q_proj"], **options))
    with pytest.raises(ConfigError, match=rf"(?s)portable.*{said}.*merge.*\(format\)"):
        write_portable(base, tmp_path, "default")
    assert not any(tmp_path.iterdir())


def test_biases_attentions_kernels_and_tied_heads(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.proj = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
            self.mha = nn.MultiheadAttention(8, 2)

    for options, said in (
        ({"target_modules": ["conv"]}, "it is a convolution"),
        ({"target_modules": ["mha"]}, "in_proj_weight|out_proj"),
        ({"target_modules": ["proj"], "bias": "lora_only"}, "proj.bias trains in full"),
    ):
        net = Net()
        inject_adapter(net, LoraConfig(r=2, **options))
        with pytest.raises(ConfigError, match=said):
            write_portable(net, tmp_path, "default")
    model = adapted(llama(tied=True), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ConfigError, match="lm_head shares its weight with the input embeddings"):
        write_portable(model, tmp_path, "default")


def test_the_same_bytes(tmp_path: Path) -> None:
    base = llama()
    model = adapted(base, config_of("patterns", target_modules=LLAMA))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_portable(model, tmp_path / name, "default")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    tensors = read(tmp_path / "one/adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {7}
