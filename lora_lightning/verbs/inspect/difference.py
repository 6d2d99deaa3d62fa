"""What differs between two files of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lightning.checkpoint.fingerprint import fingerprint_difference
from lora_lightning.verbs.inspect.contents import AdapterContents, Contents
from lora_lightning.verbs.inspect.updates import norm_of


@dataclass(frozen=True)
class Difference:
    """What differs; all are empty for equal contents.

    Attributes:
        options: (adapter, option) -> the two values.
        tensors: Name -> largest absolute difference of its values.
        only_first, only_second: Names of tensors that the other one has not.
        shapes: Name -> the two shapes.
        updates: Module -> ||W1' - W2'||_F of what the two add to its weight, where both are known.
        base: A line for each tensor of the base that differs, or the two names.
        metrics: Name -> the two values.

    """

    options: dict[tuple[str, str], tuple[Any, Any]]
    tensors: dict[str, float]
    only_first: list[str]
    only_second: list[str]
    shapes: dict[str, tuple[list[int], list[int]]]
    updates: dict[str, float]
    base: list[str]
    metrics: dict[str, tuple[float | None, float | None]]

    @property
    def largest(self) -> float:
        """The largest absolute difference of any value that both have."""
        return max(self.tensors.values(), default=0.0)

    @property
    def same(self) -> bool:
        """True if nothing differs."""
        return not any(vars(self).values())


def difference(first: Contents, second: Contents) -> Difference:
    """Compare two contents; adapters by name, or the only ones of both."""
    pairs = _pairs(first, second)
    options: dict[tuple[str, str], tuple[Any, Any]] = {}
    ones, others = dict(first.others), dict(second.others)
    updates: dict[str, float] = {}
    for name, (one, other) in pairs.items():
        ones, others = ones | one.tensors, others | other.tensors
        shared = one.options.keys() & other.options.keys()
        both = {"peft_type": (one.kind, other.kind)}
        both |= {key: (one.options[key], other.options[key]) for key in sorted(shared)}
        options |= {(name, key): values for key, values in both.items() if values[0] != values[1]}
        updates |= _updates(one, other)
    for contents, tensors in ((first, ones), (second, others)):
        for name in contents.adapters.keys() - pairs.keys():
            tensors.update({f"{name}: {k}": t for k, t in contents.adapters[name].tensors.items()})
    ones, others = _aligned(ones, others)
    common = [name for name in ones if name in others]
    shapes = {
        name: (list(ones[name].shape), list(others[name].shape))
        for name in common
        if ones[name].shape != others[name].shape
    }
    found = {n: _largest(ones[n], others[n]) for n in common if n not in shapes}
    names: set[str] = first.metrics.keys() | second.metrics.keys()
    if not (first.metrics and second.metrics):  # a folder that says none does not say others
        names = set()
    metrics = {name: (first.metrics.get(name), second.metrics.get(name)) for name in sorted(names)}
    return Difference(
        options=options,
        tensors={name: value for name, value in found.items() if value != 0},
        only_first=[name for name in ones if name not in others],
        only_second=[name for name in others if name not in ones],
        shapes=shapes,
        updates=updates,
        base=_base(first, second),
        metrics={name: values for name, values in metrics.items() if values[0] != values[1]},
    )


def _pairs(first: Contents, second: Contents) -> dict[str, tuple[AdapterContents, AdapterContents]]:
    if len(first.adapters) == len(second.adapters) == 1:
        ((name, one),), (other,) = first.adapters.items(), second.adapters.values()
        return {name: (one, other)}
    names = [name for name in first.adapters if name in second.adapters]
    return {name: (first.adapters[name], second.adapters[name]) for name in names}


def _aligned(
    ones: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both by the shorter names: a checkpoint's begin with a path in the LightningModule."""
    ones = {_plain(name): tensor for name, tensor in ones.items()}
    others = {_plain(name): tensor for name, tensor in others.items()}
    short, long = ({*ones}, {*others}) if _is_shorter(ones, others) else ({*others}, {*ones})
    prefix = _prefix(short, long)
    return (
        {name.removeprefix(prefix): tensor for name, tensor in ones.items()},
        {name.removeprefix(prefix): tensor for name, tensor in others.items()},
    )


def _plain(name: str) -> str:
    """Without what PEFT's and our files spell differently."""
    return name.removesuffix(".weight") if ".lora_" in name else name.replace(".module.", ".")


def _is_shorter(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return min(map(len, ones), default=0) <= min(map(len, others), default=0)


def _prefix(short: set[str], long: set[str]) -> str:
    """What stands before all names that both have; "" if they are called the same."""
    for name in sorted(short):
        for other in sorted(long):
            if other.endswith(f".{name}"):
                return other.removesuffix(name)
            if other == name:
                return ""
    return ""


def _updates(one: AdapterContents, other: AdapterContents) -> dict[str, float]:
    firsts = {update.module: update.factors for update in one.updates}
    seconds = {update.module: update.factors for update in other.updates}
    is_short = min(map(len, firsts), default=0) <= min(map(len, seconds), default=0)
    short, long = ({*firsts}, {*seconds}) if is_short else ({*seconds}, {*firsts})
    prefix = _prefix(short, long)
    seconds = {path.removeprefix(prefix): factors for path, factors in seconds.items()}
    found = {}
    for path, factors in firsts.items():
        partner = seconds.get(path.removeprefix(prefix))
        if factors is None or partner is None:
            continue
        (a, b), (c, d) = factors, partner
        if a.shape[1:] == c.shape[1:] and len(b) == len(d):
            norm = norm_of((torch.cat([a, c]), torch.cat([b, -d], dim=1)))
            # Of equal ones, what rounding leaves.
            if norm > 1e-7 * max(norm_of(factors), norm_of(partner)):
                found[path] = norm
    return found


def _largest(one: Tensor, other: Tensor) -> float:
    if not one.numel():
        return 0.0
    return float((one.double() - other.double()).abs().max())


def _base(first: Contents, second: Contents) -> list[str]:
    if first.fingerprint and second.fingerprint:
        return fingerprint_difference(first.fingerprint, second.fingerprint)
    if first.base and second.base and first.base != second.base:
        return [f"{first.base} and {second.base}"]
    return []
