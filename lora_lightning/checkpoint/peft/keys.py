"""Key names of an adapter's tensors in PEFT's files.

    base_model.model.<path of the module>.<tensor>[.weight]

without the adapter's name. The suffix is an accident of how PEFT holds a tensor (in a module or
not); every adapter class says it in `file_names`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.trainable_tokens import (
    TiedTrainableTokensAdapter,
    TrainableTokensAdapter,
)
from lora_lightning.checkpoint.fingerprint import base_tensors
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.injection import adapters_named
from lora_lightning.engine.switching import layers_with
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.embedding import AdaptedEmbedding
from lora_lightning.layers.traversal import walk

PREFIX = "base_model.model."
OUT_PROJ_B = ".base_layer.out_proj.lora_B.weight"  # of an attention that is adapted as a whole
# PEFT's TRAINABLE_TOKENS has them without the first part
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"


def tensors_to_save(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The adapter as PEFT's files hold it; AdapterStateError for a table resized meanwhile."""
    found: dict[str, Tensor] = {}
    for _, layer in layers_with(model, adapter_name):
        if isinstance(layer, AdaptedEmbedding):
            for adapter in layer.adapters[adapter_name].by_weight().values():
                layer.check_rows(adapter)
    for prefix, part in parts_in_file(model, adapter_name):
        found.update({_key(prefix, k): tensor for k, tensor in part.file_state().items()})
    return {**found, **_shared_with_base(model, adapter_name)}


def tensors_to_load(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's own tensors under the keys of the values in PEFT's files that they take."""
    found: dict[str, Tensor] = {}
    for prefix, part in parts_in_file(model, adapter_name):
        for name, tensor in part.state_dict().items():
            if name not in part.not_in_files:
                found[_key(prefix, part.file_names.get(name, name))] = tensor
    return {**found, **_shared_with_base(model, adapter_name)}


def rows_alone(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Trained rows as PEFT's TRAINABLE_TOKENS has them: also those of tied heads, once more."""
    found = {}
    for path, adapter in adapters_named(model, adapter_name).items():
        rows = adapter._rows[0] if isinstance(adapter, TiedTrainableTokensAdapter) else adapter
        if isinstance(rows, TrainableTokensAdapter):
            name = TOKEN_ROWS.partition(".")[2]
            found[f"{PREFIX}{path}.{name}"] = rows.trainable_tokens_delta.detach()
    return found


def also_saved_by_peft(
    model: nn.Module, saved: Sequence[str], heads: Sequence[str] = ()
) -> list[str]:
    """Modules that PEFT takes for trained copies as well: all that merely end with a saved path.

    DistilBERT's `pre_classifier` is one, beside its `classifier`. Likewise those that end with one
    of `heads`, which it adds for a task. PEFT cannot load a file without tensors for them.
    """
    return [
        path
        for path, _ in walk(model)
        if path.endswith((*saved, *heads))
        and not any(path == outer or path.startswith(outer + ".") for outer in saved)
    ]


def tensors_of_base(model: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    """The base's own tensors of these modules, as PEFT's files hold those of trained copies."""
    inside = tuple(f"{path}." for path in paths)
    found = base_tensors(model) if inside else ()
    return {PREFIX + name: tensor for name, tensor in found if name.startswith(inside)}


def tables_of_base(model: nn.Module, adapter_name: str, paths: Sequence[str]) -> dict[str, Tensor]:
    """The base's own tensors of embeddings and heads, where PEFT's wrappers of them put these.

    Those that train in full have others in their place, which are in the file.
    """
    layers = dict(layers_with(model, adapter_name))
    found = {}
    for path in paths:
        adapter = layers[path].adapters[adapter_name] if path in layers else None
        if isinstance(adapter, (TrainableTokensAdapter, TiedTrainableTokensAdapter)):
            inner = "token_adapter.base_layer."
        else:
            inner = "base_layer." if adapter is not None else ""
        if path not in layers or adapter_name not in layers[path].trained_copies():
            for key, tensor in tensors_of_base(model, [path]).items():
                prefix = f"{PREFIX}{path}."
                found[prefix + inner + key.removeprefix(prefix)] = tensor
    return found


def parts_in_file(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Adapter]]:
    """(what stands before the tensors' names in the file, adapter) for every weight adapted."""
    layers = dict(layers_with(model, adapter_name))
    for path, layer in layers.items():
        on_weight = layer.adapters[adapter_name].by_weight()
        prefix = PREFIX + _place(path, layers, adapter_name)
        for weight_name, place in layer.file_places([*on_weight]).items():
            yield prefix + place, on_weight[weight_name]


def _key(prefix: str, name: str) -> str:
    # What all modules share stands at the top, under a name of its own (VeRA's matrices).
    return name if name.startswith("base_model.") else prefix + name


def _place(path: str, layers: dict[str, AdaptedLayer], adapter_name: str) -> str:
    """The module's path as PEFT's wrappers spell it, with the dot at its end."""
    outer, _, last = path.rpartition(".")
    # PEFT keeps an attention's out_proj inside the wrapper of the attention itself.
    if last == "out_proj" and outer in layers and adapter_name in layers[outer].adapters:
        return f"{outer}.base_layer.{last}."
    return path + "." if path else ""


def _shared_with_base(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Trained copies and biases, which keep the names they have in the base."""
    found: dict[str, Tensor] = {}
    targets = set()
    for path, layer in layers_with(model, adapter_name):
        prefix = path + "." if path else ""
        copy = layer.trained_copies().get(adapter_name)
        if copy is None:
            targets.add(prefix)
            continue
        state = copy.module.state_dict()
        found.update({f"{PREFIX}{prefix}{name}": tensor for name, tensor in state.items()})
    for name, module, record in trained_biases(model, adapter_name):
        prefix = name.removesuffix("bias")
        inner = "base_layer." if prefix in targets else ""
        found[f"{PREFIX}{prefix}{inner}bias"] = record.trained(module).detach()
    return found
