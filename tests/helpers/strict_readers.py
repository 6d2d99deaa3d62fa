"""What consumers of plain LoRA make of a folder, by their own rules and formulas.

Written from what these programs check and compute; their code was read, none of it is here.

* vLLM (vllm/lora/peft_helper.py, lora_model.py, utils.py)
* llama.cpp (convert_lora_to_gguf.py; src/llama-adapter.h for the scale)
* diffusers (loaders/peft.py, utils/peft_utils.py)
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Updates = dict[str, Tensor]  # by the module's path: what is added to its (out, in) weight


def read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def of_vllm(folder: Path, model: nn.Module, max_lora_rank: int = 16) -> Updates:
    """vLLM: one scale for all; linear layers and embeddings of the model, nothing else."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise ValueError(f"missing {missing}")
    if config.get("modules_to_save") or config.get("use_dora"):
        raise ValueError("modules_to_save and DoRA are not supported")
    if config["r"] > max_lora_rank:
        raise ValueError(f"rank {config['r']} is larger than {max_lora_rank}")
    if config.get("bias", "none") != "none":
        raise ValueError("biases are not supported")
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    scale = config["lora_alpha"] / root
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
    }
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read(folder / "adapter_model.safetensors").items():
        parts = key.removeprefix("base_model.model.").split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            path, name = ".".join(parts[:-2]), parts[-2]
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            path, name = ".".join(parts[:-1]), parts[-1]
        else:
            raise ValueError(f"{key} is no LoRA weight")
        if path.rpartition(".")[2] not in linear:
            raise ValueError(f"unexpected module {path}")
        pairs.setdefault(path, {})[name[-1]] = tensor
    return {path: scale * pair["B"] @ pair["A"] for path, pair in pairs.items()}


def of_llama_cpp(folder: Path, base_of_tensor: dict[str, Any]) -> Updates:
    """llama.cpp: the converter knows `lora_alpha` alone; at run time the scale is alpha / rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"]
    alpha = float(config["lora_alpha"])
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read(folder / "adapter_model.safetensors").items():
        found = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$", key)
        if found is None:
            raise SystemExit(f"unexpected name {key}")
        name = key[: found.start()].replace("base_model.model.", "") + ".weight"
        assert name in base_of_tensor, name
        pairs.setdefault(name, {})[found[1]] = tensor
    updates = {}
    for name, pair in pairs.items():
        a, b = pair["A"], pair["B"]
        assert a.ndim == b.ndim == 2
        rank = b.shape[-1]
        assert a.shape[-2] == rank
        updates[name.removesuffix(".weight")] = (alpha / rank) * b @ a
    return updates


def of_diffusers(file: Path, component: str) -> Updates:
    """diffusers: rank from lora_B, everybody's alpha the most frequent rank."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read(file).items():
        if not key.startswith(f"{component}."):
            continue
        found = re.fullmatch(rf"{component}\.(.+)\.lora_([AB])\.weight", key)
        assert found is not None, key
        pairs.setdefault(found[1], {})[found[2]] = tensor
    ranks = {path: pair["B"].shape[1] for path, pair in pairs.items()}
    alpha = Counter(ranks.values()).most_common(1)[0][0]
    return {
        path: (alpha / ranks[path])
        * (pair["B"].flatten(1) @ pair["A"].flatten(1)).view(-1, *pair["A"].shape[1:])
        for path, pair in pairs.items()
    }


@torch.no_grad()
def with_updates(base: nn.Module, updates: Updates) -> nn.Module:
    """A copy of `base` with the updates added to its weights."""
    model = copy.deepcopy(base)
    for path, update in updates.items():
        module = model.get_submodule(path)
        stored = update.t() if isinstance(module, (Conv1D, nn.Embedding)) else update
        if module.weight.data_ptr() in {
            p.data_ptr()
            for n, p in model.named_parameters(remove_duplicate=False)
            if n != f"{path}.weight"
        }:
            module.weight = nn.Parameter(
                module.weight.clone()
            )  # tied: the adapter is on one of both
        module.weight += stored
    return model
