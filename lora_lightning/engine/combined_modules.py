"""What a combination of adapters has where they train the same module in full (`modules_to_save`).

A whole module is no update that could be added up. Of several there is the weighted mean of their
tensors, sum_i w_i t_i / sum_i w_i (the "model soup" of Wortsman et al. 2022, arXiv:2203.05482), or
one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy
from lora_lightning.errors import AdapterStateError, ConfigError, nearest_hint
from lora_lightning.layers.traversal import named_adapted_layers

MEAN, FIRST = "mean", "first"
TrainedModules = dict[str, dict[str, ModulesToSaveCopy]]  # by path, and by the adapter's name


def trained_modules(model: nn.Module, names: Sequence[str], choice: str | None) -> TrainedModules:
    """The modules that the adapters `names` train in full, of each what `choice` takes.

    Args:
        model: A model with adapters.
        names: The adapters to combine.
        choice: "mean": all; "first": that of the first adapter that has one; a name: that one's.

    Raises:
        ConfigError: If `choice` is none of these.
        AdapterStateError: If several train a module and `choice` says nothing of it.

    """
    known = [MEAN, FIRST, *dict.fromkeys(names)]
    if choice is not None and choice not in known:
        raise ConfigError(
            f"modules_to_save={choice!r} is none of {known}.{nearest_hint(str(choice), known)} "
            "(modules_to_save)"
        )
    found: TrainedModules = {}
    for path, layer in named_adapted_layers(model):
        copies = layer.trained_copies()
        own = {name: copies[name] for name in dict.fromkeys(names) if name in copies}
        if len(own) > 1 and choice != MEAN:
            taken = next(iter(own)) if choice == FIRST else choice
            if taken not in own:
                raise AdapterStateError(
                    f"{[*own]} each train {path!r} in full, and whole modules do not add up. Say "
                    "which the new adapter gets: modules_to_save='mean' (by these weights), "
                    f"'first', or one of {[*own]}. (modules_to_save)"
                )
            own = {taken: own[taken]}
        if own:
            found[path] = own
    return found


def check_mean(modules: TrainedModules, weights: dict[str, float]) -> None:
    """Raise ConfigError where weights, by the adapters' names, have no mean."""
    for path, own in modules.items():
        if len(own) > 1 and math.isclose(sum(weights[name] for name in own), 0, abs_tol=1e-12):
            raise ConfigError(
                f"The weights of {[*own]} add up to 0, so that {path!r} has no weighted mean. Take "
                "modules_to_save='first' or an adapter's name. (modules_to_save)"
            )


@torch.no_grad()
def fill_with_mean(
    new: ModulesToSaveCopy, own: dict[str, ModulesToSaveCopy], weights: dict[str, float]
) -> None:
    """Write the weighted mean of `own` into `new`; whole numbers are those of the first."""
    states = {name: copy.module.state_dict() for name, copy in own.items()}
    total = sum(weights[name] for name in own) if len(own) > 1 else 1.0
    for key, tensor in new.module.state_dict().items():
        values: list[Tensor] = [state[key] for state in states.values()]
        if len(own) == 1 or not tensor.is_floating_point():
            tensor.copy_(values[0])
            continue
        shares = [weights[name] / total for name in own]
        wide = [value.double() * share for value, share in zip(values, shares, strict=True)]
        tensor.copy_(torch.stack(wide).sum(0))
