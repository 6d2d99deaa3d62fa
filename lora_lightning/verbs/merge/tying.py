"""Give a head a weight of its own, where it shares one with the embedding and one of them changes.

A merge into a shared weight would change both. Written apart, with `tie_word_embeddings: false`,
each has its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.adapters.modules_to_save import base_tensors_of
from lora_lightning.adapters.trainable_tokens import (
    TiedTrainableTokensAdapter,
    TrainableTokensAdapter,
)
from lora_lightning.engine.targets.embeddings import input_embeddings, output_heads
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.traversal import walk

_ROWS = (TrainableTokensAdapter, TiedTrainableTokensAdapter)


def untie_head(network: Any, *, copy: bool) -> tuple[str, str] | None:
    """Untie where adapters that act change embedding or head alone.

    Args:
        network: A model of transformers with adapters.
        copy: Whether the head's weight gets memory of its own; else it is only another object.

    Returns:
        The head's path and the embedding's; None where nothing had to be untied.

    Raises:
        AdapterStateError: If transformers could not load the model untied.

    """
    owners: dict[int, list[str]] = {}
    for path, module in walk(network):
        weight = base_tensors_of(module)._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    for paths in owners.values():
        modules = [network.get_submodule(path) for path in paths]
        if len(paths) == 1 or not any(map(_changes, modules)):
            continue
        heads = [path for path in paths if path in output_heads(network)]
        tables = [path for path in paths if path in input_embeddings(network)]
        if len(paths) > 2 or not heads or not tables or not _can_be_untied(network, modules):
            raise AdapterStateError(
                f"{' and '.join(map(repr, paths))} share one weight in this "
                f"{network.config.model_type} model, and the adapter changes not all of them the "
                "same way: a merged weight would change all, and transformers loads them tied in "
                "any case. Keep the adapter unmerged, or train without these targets. "
                "(lora.exclude_modules)"
            )
        holder: nn.Module = base_tensors_of(network.get_submodule(heads[0]))
        shared = holder._parameters["weight"]
        assert shared is not None
        own = shared.detach()
        holder._parameters["weight"] = nn.Parameter(own.clone() if copy else own, False)
        for config in (network.config, network.config.get_text_config()):
            config.tie_word_embeddings = False
        return heads[0], tables[0]
    return None


def _acting(module: nn.Module) -> list[Any]:
    if not isinstance(module, AdaptedLayer):
        return []
    return [module.adapters[name] for name in module.applied_names()]


def _changes(module: nn.Module) -> bool:
    """Tell whether adapters change the module's weight otherwise than what is tied to it."""
    return any(not isinstance(adapter, _ROWS) for adapter in _acting(module))


def _can_be_untied(network: Any, modules: list[nn.Module]) -> bool:
    tied = getattr(network, "all_tied_weights_keys", {})
    rows = any(isinstance(adapter, _ROWS) for module in modules for adapter in _acting(module))
    one = len(tied) <= 1 and not getattr(network.config, "is_encoder_decoder", False)
    return one and not rows and bool(getattr(network.config, "tie_word_embeddings", False))
