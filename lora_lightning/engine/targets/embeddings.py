"""Input embeddings and output heads of transformers models, found by duck type.

So transformers is not imported.
"""

from __future__ import annotations

from torch import nn

from lora_lightning.layers.traversal import walk
from lora_lightning.utilities.wrappers import unwrapped


def output_heads(model: nn.Module) -> list[str]:
    """Paths of the output heads of every transformers model inside `model`.

    The output embeddings where the model names them, else its `score` or `classifier`.
    """
    return _embeddings(model, "get_output_embeddings")


def input_embeddings(model: nn.Module) -> list[str]:
    """Paths of the input embeddings of the transformers models inside `model`."""
    return _embeddings(model, "get_input_embeddings")


def _embeddings(model: nn.Module, getter: str) -> list[str]:
    found = []
    paths = {id(module): path for path, module in walk(model)}  # of which each has one, the first
    for module in [module for _, module in walk(model)]:
        if not (hasattr(module, "base_model_prefix") and hasattr(module, getter)):
            continue
        try:
            part = getattr(module, getter)()
        except NotImplementedError:  # a model that has none, of images say
            continue
        if part is None and getter == "get_output_embeddings":
            part = getattr(module, "score", None) or getattr(module, "classifier", None)
        if part is not None and id(part := unwrapped(part)) in paths:
            found.append(paths[id(part)])
    return list(dict.fromkeys(found))
