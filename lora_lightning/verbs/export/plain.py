"""An adapter as plain LoRA of one rank and a scale of 1, or the reason why it is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.plain_lora import plain_factors
from lora_lightning.adapters.trainable_tokens import (
    TiedTrainableTokensAdapter,
    TrainableTokensAdapter,
)
from lora_lightning.checkpoint.peft.base_model import grown_tables
from lora_lightning.checkpoint.peft.description import names_in_the_way
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.injection import adapters_named
from lora_lightning.engine.targets.embeddings import input_embeddings, output_heads
from lora_lightning.errors import AdapterStateError, ConfigError, first_few
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.traversal import named_adapted_layers

ROWS = (TrainableTokensAdapter, TiedTrainableTokensAdapter)
Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Plain:
    """Attributes: the one rank of all modules; (A, B) by the module's path; which are tables."""

    r: int
    pairs: Pairs
    tables: frozenset[str]


def plain_lora(model: nn.Module, adapter_name: str, form: str) -> Plain:
    """The adapter as W' = W + B A on every module, all of one rank.

    Scales are part of B. Ranks below the largest are padded with zeros, which add nothing. A is
    (r, in), B (out, r); of kernels A is (r, in, *kernel), B (out, r, 1, ...).

    Args:
        model: The model that the folder is for.
        adapter_name: Which adapter.
        form: The format, for messages, which decides which modules are taken as well.

    Raises:
        ConfigError: If a part of the adapter is more than that; every reason is named.

    """
    layers = dict(named_adapted_layers(model))
    adapters = adapters_named(model, adapter_name)
    reasons = [
        f"{name} trains in full (lora.bias)" for name, *_ in trained_biases(model, adapter_name)
    ]
    pairs: Pairs = {}
    for path, adapter in adapters.items():
        if adapter_name in layers[path].trained_copies():
            reasons.append(f"{path} trains in full (lora.modules_to_save)")
            continue
        if isinstance(adapter, ROWS):
            reasons.append(f"rows of {path} train in full (lora.trainable_token_indices)")
            continue
        if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
            reasons.append(
                f"{path}: an attention's out_proj, which PEFT adapts twice or not at all"
            )
            continue
        on_weight = adapter.by_weight()
        only = on_weight.get("weight")
        if only is None or len(on_weight) > 1:
            reasons.append(f"{path}: it adapts {first_few(on_weight)}, not a single weight")
            continue
        try:
            pairs[path] = _pair(layers[path], only, form)
        except AdapterStateError as error:
            reasons.append(f"{path}: {error}")
    reasons += names_in_the_way(model, [*pairs], [*pairs])
    if grown := grown_tables(model):
        reasons.append(
            f"the vocabulary has grown, and the added rows of {first_few(grown)} are in no file of "
            "the base"
        )
    if form == "portable":
        reasons += _tied_heads(model, pairs)
    if reasons:
        raise ConfigError(_refusal(adapter_name, form, reasons))
    r = max(len(a) for a, _ in pairs.values())
    tables = frozenset(path for path in pairs if layers[path].kind == "embedding")
    return Plain(r, {path: _padded(*pair, r) for path, pair in pairs.items()}, tables)


def _pair(layer: AdaptedLayer, adapter: Adapter, form: str) -> tuple[Tensor, Tensor]:
    if layer.kind == "conv" and form == "portable":
        raise AdapterStateError("it is a convolution, which no server of language models adapts")
    if layer.kind == "conv" and not layer.peft_supports(adapter):
        raise AdapterStateError("PEFT computes an adapter on such a convolution otherwise")
    if layer.kind == "embedding" and form == "diffusers":
        raise AdapterStateError("it is an embedding, for which diffusers' files have no names")
    a, b = plain_factors(adapter)
    wide = adapter.spec.dtype == torch.float64
    a, b = (a, b) if wide else (a.float(), b.float())
    kernel = adapter.spec.shape[2:] if layer.kind == "conv" else ()
    if kernel:
        a, b = a.view(len(a), -1, *kernel), b.view(*b.shape, *(1 for _ in kernel))
    return a, b


def _padded(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    missing = r - len(a)
    a = F.pad(a, (*(0 for _ in range(2 * (a.ndim - 1))), 0, missing))
    b = F.pad(b, (*(0 for _ in range(2 * (b.ndim - 2))), 0, missing))
    return a.contiguous(), b.contiguous()


def _tied_heads(model: nn.Module, pairs: Mapping[str, object]) -> list[str]:
    """Heads that llama.cpp has no weight for, since it is that of the embeddings."""
    tables = [
        model.get_submodule(path)._parameters.get("weight") for path in input_embeddings(model)
    ]
    return [
        f"{path} shares its weight with the input embeddings, and llama.cpp has none for it"
        for path in output_heads(model)
        if path in pairs
        and any(model.get_submodule(path)._parameters.get("weight") is table for table in tables)
    ]


def _refusal(adapter_name: str, form: str, reasons: list[str]) -> str:
    shown = "".join(f"\n  {reason}" for reason in reasons[:4])
    more = f"\n  ... ({len(reasons)} in all)" if len(reasons) > 4 else ""
    return (
        f"Adapter {adapter_name!r} cannot be had as {form}, which holds W + B A alone:"
        f"{shown}{more}\n"
        "Take --format peft; or hand on the base with the adapter merged into it\n"
        "(lora-lightning merge RUN OUT); or train without that (lora.exclude_modules\n"
        "leaves modules out). (format)"
    )
