"""A PEFT folder for consumers that know one rank and one alpha: vLLM, SGLang, TensorRT-LLM,
llama.cpp.

Their rules, together: `r`, `lora_alpha` and `target_modules` are there; every update is lora_alpha
/ r times B A; no patterns, no DoRA, no trained biases or copies, no other tensors; the name of the
base. Sources: vllm/lora/peft_helper.py, lora_model.py, utils.py; llama.cpp
convert_lora_to_gguf.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lora_lightning.adapters.config import SELECTION
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.checkpoint.peft.config import CONFIG, TENSORS
from lora_lightning.checkpoint.peft.description import describe
from lora_lightning.checkpoint.peft.file_content import exact_names
from lora_lightning.checkpoint.peft.keys import PREFIX
from lora_lightning.checkpoint.peft.writing import as_json
from lora_lightning.layers.traversal import walk
from lora_lightning.verbs.export.plain import plain_lora

# Of what `describe` says: what holds of the base and its modules, whatever the adapter's type.
_OF_BASE = (
    "task_type", "auto_mapping", "inference_mode", "base_model_name_or_path", "revision",
    "fan_in_fan_out",
)  # fmt: skip


def write_portable(model: nn.Module, folder: Path, adapter_name: str) -> None:
    """Write an adapter on `model` as plain LoRA of one rank r with lora_alpha = r.

    Raises:
        ConfigError: If it is more than that.

    """
    plain = plain_lora(model, adapter_name, "portable")
    described = describe(model, adapter_name).options
    alike = LoraConfig(r=plain.r, lora_alpha=plain.r).file_options()
    names = exact_names([path for path, _ in walk(model)], set(plain.pairs))
    options: dict[str, Any] = {
        **alike,
        **dict.fromkeys(SELECTION),
        **{key: described[key] for key in _OF_BASE},
        "peft_type": "LORA",
        "target_modules": names,
        "modules_to_save": None,
    }
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in plain.pairs.items():
        table = path in plain.tables
        for name, tensor in (("A", a), ("B", b)):
            key = f"lora_embedding_{name}" if table else f"lora_{name}.weight"
            tensors[f"{PREFIX}{path}.{key}"] = tensor.cpu()
    content = to_safetensors(dict(sorted(tensors.items())), metadata={"format": "pt"})
    (folder / TENSORS).write_bytes(content)
    (folder / CONFIG).write_bytes(as_json(options))
