"""Fold adapters into the base weights, and back without a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lora_lightning.adapters.base import Adapter, AdapterModule
from lora_lightning.adapters.modules_to_save import HeldTensors, base_tensors_of
from lora_lightning.adapters.trainable_tokens import TiedTrainableTokensAdapter
from lora_lightning.engine.merge_check import checks_before_merge
from lora_lightning.engine.switching import active_adapters, check_enabled
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.base import AdaptedLayer, WeightView
from lora_lightning.layers.instance_forward import why_not_run
from lora_lightning.layers.offloading import offloading_hook
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.utilities._torch import is_flattened


def merge_adapter(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """Add the deltas of active adapters to the base weights, so that forward costs nothing extra.

    W' = W + sum of deltas, summed in at least fp32 and rounded once. The weights are kept aside:
    `unmerge_adapter` restores them bit for bit. Trained copies need no merging and stay as they
    are.

    Args:
        model: A model with adapters.
        names: Which of the active adapters to merge; default: all of them.

    Raises:
        AdapterStateError: If a name is not active, if a weight to be written is shared with
            another module (tied), is on the meta device, is computed from other tensors or has a
            trained copy in its place, if a result is not finite, or if a layer with a forward of
            its own answers otherwise then. Nothing is merged in these cases.

    """
    check_enabled(model)
    active = active_adapters(model)
    names = active if names is None else [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in active:
            raise AdapterStateError(
                f"Adapter {name!r} is not active (active: {active or 'none'}); activate it with "
                f"set_adapter(model, {name!r}) before merging."
            )
    for _, layer in named_adapted_layers(model):
        for name in names:
            if name in layer.adapters and any(p.is_meta for p in layer.adapters[name].parameters()):
                layer.check_filled(name)
    _check_weights(model, names)
    _check_order(model, names)
    before = [(layer, list(layer.merged_adapters)) for _, layer in named_adapted_layers(model)]
    checks = checks_before_merge(list(named_adapted_layers(model)), names)
    try:
        for layer, _ in before:
            layer.merge(names)
        for check in checks:
            check.compare()
    except BaseException:
        for layer, merged in before:
            if layer.merged_adapters != merged:
                layer.unmerge()
                layer.merge(merged)
        raise


def unmerge_adapter(model: nn.Module) -> None:
    """Restore the weights of before `merge_adapter`, bit for bit."""
    check_enabled(model)
    for _, layer in named_adapted_layers(model):
        layer.unmerge()


def check_mergeable(model: nn.Module) -> None:
    """Refuse (AdapterStateError) where active adapters and trained copies cannot be the base."""
    _check_weights(model, active_adapters(model), copies_too=True)


def _check_weights(model: nn.Module, names: Sequence[str], copies_too: bool = False) -> None:
    owners = Counter(
        id(parameter)
        for module in model.modules()
        if not isinstance(module, HeldTensors)
        for parameter in base_tensors_of(module)._parameters.values()
        if parameter is not None
    )
    merging = {
        path: (layer, [layer.adapters[name] for name in names if name in layer.adapters])
        for path, layer in named_adapted_layers(model)
    }
    for path, (layer, adapters) in list(merging.items()):
        if all(isinstance(adapter, TiedTrainableTokensAdapter) for adapter in adapters):
            if adapters:
                owners[id(layer.weight)] -= 1  # it asks for the very rows that its table gets
            del merging[path]
    for path, (layer, adapters) in merging.items():
        if adapters and (reason := why_not_run(layer)) is not None:
            raise AdapterStateError(
                f"Nothing can be merged into {path!r} ({layer.base_type.__name__}): {reason}. Run "
                "a batch, or put back the forward that was there before."
            )
        written = written_tensors(path, layer, adapters)
        if copies_too and any(name in layer.trained_copies() for name in names):
            written += layer.original_tensors.named_parameters()
            for node in layer.original_tensors.modules():  # tied inside, it is written once
                owners.subtract(id(p) for p in node._parameters.values() if p is not None)
            owners.update(id(p) for p in layer.original_tensors.parameters())
        for name, parameter in written:
            if offloading_hook(layer) is not None:
                raise AdapterStateError(
                    f"{path!r} is offloaded (accelerate): what is merged into it would be lost "
                    "after the next forward. Take the hooks off first: accelerate.hooks."
                    "remove_hook_from_module(model, recurse=True)."
                )
            _check_writable(path, name, parameter, owners[id(parameter)])


def written_tensors(
    path: str, layer: AdaptedLayer, adapters: list[AdapterModule]
) -> list[tuple[str, nn.Parameter]]:
    """The tensors of a layer that a merge of these adapters changes, by name."""
    written: list[tuple[str, nn.Parameter]] = []
    for weight_name in layer.weight_shapes():
        on_weight = [a for adapter in adapters if (a := adapter.by_weight().get(weight_name))]
        if not on_weight:
            continue
        bias_name = layer.bias_name(weight_name)
        names = [weight_name]
        whole = bias_name in layer._parameters or is_parametrized(layer, bias_name)
        if whole and any(_changes_bias(a, layer, weight_name) for a in on_weight):
            names.append(bias_name)
        for name in names:
            parameter = layer._parameters.get(name)
            if parameter is None:
                raise AdapterStateError(
                    f"The {name} of {path!r} is computed from other tensors (a parametrization); "
                    "nothing can be merged into it. Keep the adapter unmerged; or save it, and "
                    "load it onto a model whose parametrization was taken off while it required "
                    "gradients (torch.nn.utils.parametrize.remove_parametrizations)."
                )
            written.append((name, parameter))
        if getattr(layer, "max_norm", None) is not None:
            raise AdapterStateError(
                f"{path!r} limits its rows to max_norm; a merged row would be limited together "
                "with its update, which gives other values. Take it out of the targets, or keep "
                "the adapter unmerged."
            )
        copies = [n for n in layer.applied_names() if n in layer.trained_copies()]
        if copies:
            raise AdapterStateError(
                f"Adapter {copies[0]!r} has a trained copy in the place of {path!r} "
                "(modules_to_save): what is merged into its weight would not act. Merge with "
                f"{copies[0]!r} switched off, or leave the others unmerged."
            )
    return written


def _check_writable(path: str, name: str, parameter: nn.Parameter, owners: int) -> None:
    if parameter.is_meta:
        raise AdapterStateError(f"{path!r} is on the meta device; load the base first.")
    if parameter.is_floating_point() and parameter.itemsize < 2:
        raise AdapterStateError(
            f"The {name} of {path!r} is held as {parameter.dtype} at present, which has too few "
            "bits for a merged weight. Cast the model to 16 bits or more first."
        )
    if is_flattened(parameter):
        raise AdapterStateError(
            f"FSDP has split the {name} of {path!r} over the processes; nothing can be "
            "merged into a part. save_adapter(model, folder), then load_adapter(other, "
            "folder) on a model that was not trained under FSDP, and merge there."
        )
    if owners > 1:
        raise AdapterStateError(
            f"The {name} of {path!r} is shared with another module (tied embeddings, say); "
            "merging would change that one too. Untie them first: give each module a parameter "
            "of its own."
        )


def _check_order(model: nn.Module, names: Sequence[str]) -> None:
    # Additive adapters can be merged in any order; others act on what came before them.
    for path, layer in named_adapted_layers(model):
        order = {
            n: on_weight
            for n in layer.adapters
            if n in layer.active_adapters and (on_weight := layer.adapters[n].by_weight())
        }
        merging = [n for n in order if n in names or n in layer.merged_adapters]
        additive = all(a.additive for on_weight in order.values() for a in on_weight.values())
        if [*order][: len(merging)] != merging and not additive:
            raise AdapterStateError(
                f"Adapters act on {path!r} in the order {[*order]}, and not all of them add up: "
                f"{merging} cannot be merged before those in front. Merge all of them, or the "
                "first ones."
            )


def _changes_bias(adapter: Adapter, layer: AdaptedLayer, weight_name: str) -> bool:
    view = WeightView(layer, weight_name)
    bias = view.bias
    return bias is not None and adapter.transform_bias(bias, view) is not bias
