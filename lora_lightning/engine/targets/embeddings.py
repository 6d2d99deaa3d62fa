"""Input embeddings and output heads of transformers models, found by duck type."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.layers.traversal import walk
from lora_lightning.utilities.wrappers import unwrapped


def output_heads(model: nn.Module) -> list[str]:
    """Paths of the output heads of every transformers model inside `model`.

    The output embeddings where the model names them, else its `score` or `classifier`; told by
    duck type, so that transformers is not imported.
    """
    heads = []
    for path, module in walk(model):
        if not (hasattr(module, "base_model_prefix") and hasattr(module, "get_output_embeddings")):
            continue
        model_part: Any = module
        head = model_part.get_output_embeddings()
        if head is None:
            head = getattr(module, "score", None) or getattr(module, "classifier", None)
        head = unwrapped(head)
        heads += [f"{path}.{sub}" if path else sub for sub, m in walk(module) if m is head]
    return heads


def input_embeddings(model: nn.Module) -> list[str]:
    """Paths of the input embeddings of the transformers models inside `model`, by duck type."""
    found = []
    for path, module in walk(model):
        if hasattr(module, "base_model_prefix") and hasattr(module, "get_input_embeddings"):
            model_part: Any = module
            table = unwrapped(model_part.get_input_embeddings())
            prefix = path + "." if path else ""
            found += [prefix + sub for sub, m in walk(module) if m is table]
    return list(dict.fromkeys(found))
