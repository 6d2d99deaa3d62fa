"""Parameter groups with and without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.adapters.base import Adapter


def decay_groups(module: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each group in two: what decays; biases, norms and vectors of adapters, which do not.

    These scale or shift; pulled towards 0 they would not get simpler, only quieter. The matrices of
    adapters decay, as in transformers and PEFT.
    """
    exempt: set[int] = set()
    for child in module.modules():
        norm = "norm" in type(child).__name__.lower()
        for name, parameter in child.named_parameters(recurse=False):
            vector = isinstance(child, Adapter) and parameter.ndim < 2
            if norm or name == "bias" or vector:
                exempt.add(id(parameter))
    split = []
    for group in groups:
        for decays in (True, False):
            params = [p for p in group["params"] if (id(p) not in exempt) == decays]
            rest = {} if decays else {"weight_decay": 0.0}
            if params:
                split.append({**group, "params": params, **rest})
    return split
