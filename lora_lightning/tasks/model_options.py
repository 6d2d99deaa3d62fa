"""Options of a task's network and of `generate`, checked before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Trainer

from lora_lightning.errors import ConfigError, nearest_hint
from lora_lightning.training.strategies.fsdp2 import is_fsdp, is_model_parallel

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Quantization = Literal["nf4", "fp4", "int8"]

# What Lightning's precisions turn a module's weights into.
_WEIGHTS = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}


@dataclass(frozen=True)
class ModelOptions:
    """Options that `PretrainedTask` documents, checked when they are given."""

    dtype: str | None = None
    attn_implementation: str | None = None
    quantize: str | None = None
    gradient_checkpointing: bool = False
    compile: bool | dict[str, Any] = False
    pretrained: bool = True
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):  # as transformers takes it, too
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        check_choice("dtype", self.dtype, Dtype)
        check_choice("quantize", self.quantize, Quantization)
        if self.quantize and not self.pretrained:
            raise ConfigError(
                f"quantize={self.quantize!r} rounds pretrained weights, and pretrained=false asks "
                "for random ones. Take one of the two out. (model.quantize, model.pretrained)"
            )
        if self.quantize and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"quantize={self.quantize!r} needs bitsandbytes, which is not installed. Install "
                'it with: pip install "lora_lightning[quant]" (model.quantize)'
            )

    def hub(self) -> dict[str, Any]:
        """Options for loading any file of the model, its tokenizer's as well."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {**revision, "trust_remote_code": self.trust_remote_code}

    def check_run(self, trainer: Trainer, adapters: bool) -> None:
        """Refuse a Trainer that these options cannot be had with.

        `adapters`: whether adapters train, and the network is frozen.
        """
        converted = _WEIGHTS.get(trainer.precision)
        if converted and self.dtype not in (None, converted):
            raise ConfigError(
                f"dtype={self.dtype!r} would have no effect: trainer.precision="
                f"{trainer.precision!r} turns all weights into {converted}. Leave one of the two "
                "out. (model.dtype, trainer.precision)"
            )
        if self.quantize and (is_model_parallel(trainer.strategy) or is_fsdp(trainer.strategy)):
            raise ConfigError(
                f"quantize={self.quantize!r} packs weights into integers, which FSDP cannot share "
                "out. Each process holds all of them with strategy='ddp'. (model.quantize, "
                "trainer.strategy)"
            )
        if self.compile is not False and adapters and is_model_parallel(trainer.strategy):
            raise ConfigError(
                "compile cannot be had of layers that are shared out and carry adapters: these are "
                "gathered one by one, and no graph would be left of a layer. Take one of the two "
                "out. (model.compile, trainer.strategy)"
            )
        if trainer.state.fn != "fit":
            return
        if self.quantize and not adapters:
            raise ConfigError(
                f"quantize={self.quantize!r} leaves weights that cannot be trained, and there are "
                "no adapters that could be in their place. Fine-tune with LoRA (a LoraCallback, "
                "lora.enabled), or take quantize out. (model.quantize)"
            )
        if not self.pretrained and adapters:
            raise ConfigError(
                "pretrained=false gives random weights, and adapters would leave them so: only the "
                "adapters train. Train the whole network (lora.enabled: false), or take "
                "pretrained=false out. (model.pretrained, lora.enabled)"
            )


def weights_of(precision: object) -> torch.dtype | None:
    """What a Trainer with this precision casts a module to, buffers and all; None for no cast."""
    name = _WEIGHTS.get(precision) if isinstance(precision, str) else None
    return None if name is None else getattr(torch, name)


def check_choice(option: str, value: str | None, choices: object) -> None:
    """Refuse a value that is none of the choices, a Literal; None stands for no choice."""
    known = get_args(choices)
    if value is not None and value not in known:
        hint = nearest_hint(value, known)
        raise ConfigError(
            f"{option}={value!r} is not known.{hint} Known are {', '.join(known)}. (model.{option})"
        )


def check_generation_options(names: Collection[str], refused: Collection[str], key: str) -> None:
    """Refuse options of the config key `key` that `generate` does not know, or that are `refused`.

    These it knows, but they would change what it returns.
    """
    if not names:  # importing transformers takes seconds
        return
    from transformers import GenerationConfig

    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in names:
        if name in refused:
            raise ConfigError(
                f"{name!r} cannot be had: a text is returned for each prompt, as long as "
                f"max_new_tokens lets it be. Leave it out. ({key})"
            )
        if name not in known:
            hint = nearest_hint(name, known)
            raise ConfigError(f"transformers' generate has no option {name!r}.{hint} ({key})")
