"""How far each adapted weight of a run has moved, with its base or without."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_lightning.adapters.config import pattern_value
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.engine.update_spectrum import (
    UpdateSpectrum,
    copy_change,
    factor_spectrum,
    update_spectra,
)
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import Run

Build = Callable[[Run, Any], Any]
_FACTORS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True)
class WeightUpdate:
    """The update of one weight by one adapter.

    Attributes:
        path: Of the module, with the weight's name where it has several.
        target: The path without the number of its layer: the column of a table of layers.
        layer: That number; None where the path has none.
        spectrum: Size and singular values.

    """

    path: str
    target: str
    layer: int | None
    spectrum: UpdateSpectrum


@dataclass(frozen=True)
class Updates:
    """The updates of a run.

    Attributes:
        weights: Of every adapted weight.
        copies: Modules that train in full: path, norm of the change, and of what they were.
        without_base: Why the base was not there to measure by; "" where it was.
        left_out: Paths whose update cannot be said without the base.

    """

    weights: list[WeightUpdate] = field(default_factory=list)
    copies: list[tuple[str, float, float]] = field(default_factory=list)
    without_base: str = ""
    left_out: list[str] = field(default_factory=list)

    @property
    def unmoved(self) -> list[str]:
        """Paths of adapters that never moved."""
        return [update.path for update in self.weights if not update.spectrum.moved]

    @property
    def low_rank(self) -> list[WeightUpdate]:
        """Those that moved, and whose rank was chosen."""
        return [u for u in self.weights if u.spectrum.low_rank and u.spectrum.moved]


def read_updates(run: Run, module: Any = None, weights: bool = True) -> Updates:
    """The updates of a run's checkpoint.

    Args:
        run: The run.
        module: As of `trained_module`.
        weights: False: without the base.

    Raises:
        LoraError: If the checkpoint cannot be read, or a given module does not fit.

    """
    if not weights:
        return _of_checkpoint(run, "the base was left out (weights)")
    try:
        made = trained_module(run, module)
    except Exception as error:  # making a module runs its owner's code, which may raise anything
        if module is not None:
            raise
        return _of_checkpoint(run, f"{type(error).__name__}: {error}")
    return updates_of_module(made)


def updates_of_module(module: Any) -> Updates:
    """The updates of all adapters on a module."""
    found = Updates()
    layers = dict(named_adapted_layers(module))
    names = {name for layer in layers.values() for name in layer.adapters}
    for path, layer in layers.items():
        for name in layer.adapters:
            label = f"{path} ({name})" if len(names) > 1 else path
            change = copy_change(layer, name)
            if change is not None:
                found.copies.append((label, *change))
            for weight, spectrum in update_spectra(layer, name).items():
                own = label if weight == "weight" else f"{label}.{weight}"
                found.weights.append(_update(own, spectrum))
    return found


def _of_checkpoint(run: Run, reason: str) -> Updates:
    """What the tensors of the checkpoint alone say: LoRA's products, not their weights."""
    checkpoint = read_adapter_checkpoint(run.checkpoint)
    state: dict[str, Tensor] = checkpoint["state_dict"]
    found = Updates(without_base=reason)
    for name, entry in checkpoint[KEY].get("adapters", {}).items():
        by_path: dict[str, dict[str, Tensor]] = {}
        for key in entry["tensors"]:
            path, _, rest = key.partition(f".adapters.{name}.")
            if rest:  # else a tensor of the base's own that trains
                by_path.setdefault(path, {})[rest] = state[key]
        for path, own in by_path.items():
            spectrum = _without_base(path, own, entry)
            if spectrum is None:
                found.left_out.append(path)
            else:
                found.weights.append(_update(path, spectrum))
    return found


def _without_base(
    path: str, own: dict[str, Tensor], entry: dict[str, Any]
) -> UpdateSpectrum | None:
    config = entry["config"]
    first = next((name for name in _FACTORS if name in own), None)
    if entry.get("peft_type") != "LORA" or first is None or _FACTORS[first] not in own:
        return None
    a, b = own[first].flatten(1), own[_FACTORS[first]].flatten(1)
    r = pattern_value(config.get("rank_pattern") or {}, path, config["r"])
    alpha = pattern_value(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    # Experts hold several A and B in one; a grouped convolution has narrower B.
    if a.shape[0] != b.shape[1] or a.shape[0] > r or "lora_A_start" in own:
        return None
    rank = a.shape[0]
    return factor_spectrum(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _update(path: str, spectrum: UpdateSpectrum) -> WeightUpdate:
    number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
    if number is None:
        return WeightUpdate(path, path, None, spectrum)
    rest = path[: number.start(1)] + "*" + re.sub(r"\b\d+\b", "*", path[number.end(1) :])
    return WeightUpdate(path, rest, int(number[1]), spectrum)


def short_names(targets: list[str]) -> dict[str, str]:
    """Each target's shortest ending, in whole parts, that no other has."""
    unique = [*dict.fromkeys(targets)]
    short = {}
    for target in unique:
        parts = target.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [other for other in unique if other != target]
        short[target] = next(
            (
                ending
                for ending in endings
                if not ending.startswith("*")
                and not any(f".{o}".endswith(f".{ending}") for o in others)
            ),
            target,
        )
    return short
