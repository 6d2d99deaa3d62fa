"""Write a model as safetensors, a shard after the other: no more than one is in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lora_lightning.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Part:
    """Tensors that are made together: their sizes in bytes by name, and how."""

    sizes: dict[str, int]
    make: Callable[[], dict[str, Tensor]]


def size_in_bytes(size: str) -> int:
    """The bytes that "5GB" says.

    Raises:
        ConfigError: If it says none.

    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    amount = 0 if found is None else int(float(found[1]) * _UNITS[found[2].upper()])
    if amount < 1:
        raise ConfigError(
            f"max_shard_size={size!r} is no size of a file; write 5GB, or 500MB. (max_shard_size)"
        )
    return amount


def write_shards(folder: Path, parts: Sequence[Part], limit: int) -> int:
    """Write all parts; a shard is no larger than `limit` bytes, but where one part is.

    Returns:
        The number of shards.

    """
    from transformers.utils.logging import tqdm  # which can be told to be silent

    shards: list[list[Part]] = []
    filled = 0
    for part in parts:
        size = sum(part.sizes.values())
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    homes: dict[str, str] = {}
    for number, shard in enumerate(tqdm(shards, desc="Writing shards"), 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for part in shard:
            made = part.make()
            if {n: t.nbytes for n, t in made.items()} != part.sizes or made.keys() & homes.keys():
                raise RuntimeError(f"{[*made]} was to be {part.sizes}")  # a fault of ours
            tensors |= made
            homes |= dict.fromkeys(made, name)
        with disk_named():
            save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, _METADATA)
    if len(shards) > 1:
        total = sum(sum(part.sizes.values()) for part in parts)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return len(shards)


_METADATA = {"format": "pt"}


@contextmanager
def disk_named() -> Iterator[None]:
    """Say it as a fault of the disk where safetensors cannot write."""
    try:
        yield
    except SafetensorError as error:
        raise ConfigError(
            f"The merged model cannot be written: {error}. Nothing was left there. (out)"
        ) from error
