"""What each of several devices holds, and how much memory there is."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.layers.quantized.bitsandbytes import is_linear4bit, is_linear8bit
from lora_lightning.tasks.sharding import repeated_layers
from lora_lightning.training.summary import readable_bytes
from lora_lightning.verbs.plan.subject import Subject

# At work at once: the layer that computes, and the one that is gathered meanwhile.
_GATHERED = 2
_ROW = 1000  # bytes that are worth a row of their own


@dataclass(frozen=True)
class Placement:
    """Bytes on each device when most live.

    Attributes:
        name: `1 device`, `DDP x 8` or `FSDP2 x 8`.
        parts: By what they are for.

    """

    name: str
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def on_one(resident: Counter[str], moments: dict[str, Counter[str]]) -> Placement:
    """All on one device, at the worst moment of a step."""
    found: list[Counter[str]] = [Counter(), *moments.values()]
    worst = sorted(found, key=lambda parts: parts.total())[-1].copy()
    if worst["loss head"] < _ROW:  # the loss itself
        worst["activations"] += worst.pop("loss head", 0)
    return Placement("1 device", {**resident, **{k: v for k, v in worst.items() if v}})


def under_ddp(one: Placement, devices: int) -> Placement:
    """A whole copy on each, and buckets in which gradients are averaged."""
    parts = {**one.parts, "gradient buckets": one.parts["gradients"]}
    return Placement(f"DDP x {devices}", parts)


def under_fsdp2(one: Placement, subject: Subject, devices: int) -> Placement:
    """Everything that is a parameter, or belongs to one, shared out by rows; layers gathered."""
    shared: dict[str, float] = {"base": 0, "adapters": 0, "gradients": 0}
    adapters = {id(tensor) for tensor in subject.of_adapters()}
    whole = 0
    for p in subject.module.parameters():
        rows = p.shape[0] if p.ndim else 1
        size = math.ceil(rows / devices) * (p.numel() // max(rows, 1)) * p.element_size()
        shared["adapters" if id(p) in adapters else "base"] += size
        shared["gradients"] += size if p.requires_grad else 0
        whole += p.numel() * p.element_size() if p.requires_grad else 0
    for buffer in {id(b): b for b in subject.module.buffers()}.values():  # each has all of them
        shared["adapters" if id(buffer) in adapters else "base"] += buffer.nbytes
    # Moments are as the parameters they belong to.
    shared["optimizer"] = one.parts["optimizer"] * shared["gradients"] / max(whole, 1)
    layers = [bytes_of(layer.parameters()) for layer in repeated_layers(subject.module)]
    rest = bytes_of(subject.module.parameters()) - sum(layers)
    gathered = rest + _GATHERED * max(layers, default=0)
    parts = {**one.parts, **{k: round(v) for k, v in shared.items()}, "gathered layers": gathered}
    return Placement(f"FSDP2 x {devices}", parts)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of tensors together, each once; they need not have memory, which tells shared ones."""
    found = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def placements(
    resident: Counter[str], moments: dict[str, Counter[str]], subject: Subject, devices: int
) -> dict[str, Placement]:
    """Where it can be placed, by strategy; FSDP cannot share packed weights out."""
    one = on_one(resident, moments)
    found = {"one": one, "ddp": under_ddp(one, devices)}
    packed = any(is_linear4bit(m) or is_linear8bit(m) for m in subject.module.modules())
    return found if packed else {**found, "fsdp2": under_fsdp2(one, subject, devices)}


def memory_at_hand(asked: str | int | None) -> tuple[int, str]:
    """Bytes of the device that is planned for, and what it is called."""
    if asked is not None:
        count = parse_bytes(asked)
        return count, asked if isinstance(asked, str) else readable_bytes(count)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return device.total_memory, f"{readable_bytes(device.total_memory)} of {device.name}"
    count = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return count, f"{readable_bytes(count)} of main memory"


def parse_bytes(text: str | int) -> int:
    """'24GB' -> 24,000,000,000; '24GiB' -> 25,769,803,776.

    Raises:
        ConfigError: If it is no such number.

    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text), re.IGNORECASE)
    if found is None or float(found.group(1)) <= 0:
        raise ConfigError(
            f"memory={text!r} is no size: write a number and a unit, such as 24GB (10^9 bytes "
            "each) or 24GiB (2^30). (memory)"
        )
    power: int = " kmgt".index(found.group(2).lower() or " ")
    unit = 1024.0 if found.group(3) else 1000.0
    return round(float(found.group(1)) * unit**power)
