"""Tiny models of every kind that `merge` knows, and runs that trained adapters on them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny_architectures import shrink
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer
from tests.helpers.trained_runs import LANGUAGE_MODEL, chat_rows, fit


def tiny_causal_lm(folder: Path, config_class: str, **options: Any) -> Path:
    """A random causal LM by its config's class, and its tokenizer."""
    import transformers

    tokenizer = tiny_tokenizer("chatml")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = shrink(getattr(transformers, config_class)())
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": None, "initializer_range": 0.1}
    for name, value in {**sizes, **ids, "max_position_embeddings": 128, **options}.items():
        setattr(config, name, value)
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def chat_run(
    folder: Path,
    lora: dict[str, Any],
    model: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> Path:
    """A run on the model in `folder/base`; `model` and `trainer`: options beside the usual."""
    config = copy.deepcopy(LANGUAGE_MODEL)
    config["lora"] = {"r": 4, "lora_alpha": 8, **lora}
    config["model"]["init_args"] |= model or {}
    config["trainer"] |= trainer or {}
    lines = [json.dumps(row) for row in chat_rows()]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return fit(folder, config, "--compare_with_base", "false")


def classification_run(folder: Path) -> Path:
    """A run of a BERT with a new head, which trains in full."""
    save_tiny_bert(folder / "base")
    rows = [("the film was good", "pos"), ("a very bad film", "neg"), ("the book was fine", "pos")]
    rows += [("the film was awful", "neg")]
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows * 4]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    config = copy.deepcopy(LANGUAGE_MODEL)
    config["lora"] = {"r": 4, "modules_to_save": ["classifier"]}
    config["model"] = {
        "class_path": "lora_lightning.SequenceClassification",
        "init_args": {"model": "base", "learning_rate": 1e-2},
    }
    config["data"] = {
        "class_path": "lora_lightning.TextClassificationDataModule",
        "init_args": {
            "train": "rows.jsonl",
            "val": "rows.jsonl",
            "max_length": 16,
            "batch_size": 4,
        },
    }
    return fit(folder, config, "--compare_with_base", "false")


def seq2seq_run(folder: Path, lora: dict[str, Any] | None = None) -> Path:
    """A run of a T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(
        vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id, **sizes, **ids
    )
    T5ForConditionalGeneration(config).save_pretrained(folder / "base")
    rows = [{"prompt": f"After {i}", "completion": f"comes {i + 1}"} for i in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    run = copy.deepcopy(LANGUAGE_MODEL)
    run["lora"] = {"r": 4, **(lora or {})}
    run["model"]["class_path"] = "lora_lightning.Seq2SeqLM"
    run["data"]["init_args"]["train"] = "rows.jsonl"
    return fit(folder, run, "--compare_with_base", "false")


def llama_run(folder: Path, lora: dict[str, Any], **config: Any) -> Path:
    """A run of a tiny Llama; `config`: of LlamaConfig."""
    tiny_llama(folder / "base", "chatml", **config)
    return chat_run(folder, lora)


# Every token but padding and the like.
IDS = torch.randperm(400, generator=torch.Generator().manual_seed(3)).view(16, 25)


def asked(network: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The logits of a network of transformers in eval mode, in float32."""
    inputs = {"input_ids": ids % network.config.vocab_size}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5] % network.config.vocab_size
    with torch.no_grad():
        return network.eval()(**inputs).logits.float()


def unmerged_logits(run: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model with its adapters active, and with none."""
    from lora_lightning import disable_adapter
    from lora_lightning.runs.build import trained_module
    from lora_lightning.runs.run import find_run

    network = trained_module(find_run(run)).network
    wanted = asked(network)
    with disable_adapter(network):
        return wanted, asked(network)


def plain_logits(folder: Path, auto_class: str = "AutoModelForCausalLM") -> torch.Tensor:
    """Of the model in a folder, loaded by transformers alone, in float32."""
    import transformers

    network, info = getattr(transformers, auto_class).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return asked(network)
