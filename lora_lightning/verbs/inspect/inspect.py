"""The verb `inspect`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.engine.targets.hints import shown_name
from lora_lightning.errors import first_few, printable
from lora_lightning.verbs.inspect.contents import AdapterContents, Contents, read_contents
from lora_lightning.verbs.inspect.difference import Difference, difference
from lora_lightning.verbs.inspect.updates import Update

_WIDTH = 80
_BOOKKEEPING = (
    "peft_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "peft_version",
)  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Its text, `str(inspection)`, fits in 80 columns.

    Attributes:
        first: What is in the first file or folder.
        second: In the other one; None where only one was given.
        difference: What differs between the two.

    """

    first: Contents
    second: Contents | None = None
    difference: Difference | None = None

    def __str__(self) -> str:
        lines = [*_of(self.first)]
        if self.second is not None and self.difference is not None:
            lines += ["", *_of(self.second), "", *_differences(self.difference)]
        return printable("\n".join(line.rstrip() for line in lines))

    __repr__ = __str__  # in a notebook


def inspect(
    path: str | os.PathLike[str], other: str | os.PathLike[str] | None = None
) -> Inspection:
    """Say what is in a checkpoint or a folder of adapters, without their base; or what differs.

    Nothing in it is run: safetensors, and `torch.load` with `weights_only=True`.

    Args:
        path: A run directory, a checkpoint, a PEFT folder, or a safetensors file.
        other: Another one, to be compared with it.

    Raises:
        CheckpointError: If nothing is there, or it is damaged or of no known kind.

    """
    first = read_contents(Path(path))
    if other is None:
        return Inspection(first)
    second = read_contents(Path(other))
    return Inspection(first, second, difference(first, second))


def _of(contents: Contents) -> Iterator[str]:
    yield f"{_short(str(contents.path))}"
    yield f"  {contents.kind}, {contents.size:,} bytes"
    yield from _row("base", _base(contents))
    yield from _row("task", contents.task)
    yield from _row("run", _progress(contents))
    metrics = [f"{name} {value:.4g}" for name, value in contents.metrics.items()]
    yield from _row("metrics", ", ".join(metrics))
    yield from _row("versions", ", ".join(f"{k} {v}" for k, v in contents.versions.items()))
    for name, adapter in contents.adapters.items():
        yield from _adapter(name, adapter)
    if contents.others:
        yield from _row("others", f"{_size(contents.others)}: {first_few(contents.others, 3)}")
    for line in contents.missing:
        yield from _row("missing", line)
    if contents.not_finite:
        yield from _row("NaN, inf", first_few(contents.not_finite, 4))


def _base(contents: Contents) -> str | None:
    if contents.fingerprint:
        said = f"fingerprint {contents.base_digest} of {len(contents.fingerprint)} tensors"
        return f"{contents.base}, {said}" if contents.base else said
    return contents.base


def _progress(contents: Contents) -> str | None:
    if contents.step is None:
        return None
    return f"step {contents.step}, epoch {contents.epoch}"


def _adapter(name: str, adapter: AdapterContents) -> Iterator[str]:
    yield ""
    yield f"adapter {name!r}: {adapter.kind}, {_size(adapter.tensors)}"
    options = [f"{k}={v}" for k, v in adapter.options.items() if _says_something(k, v)]
    yield from _row("options", ", ".join(options))
    groups: dict[str, list[Update]] = defaultdict(list)
    for update in adapter.updates:
        groups[shown_name(update.module)].append(update)
    yield f"  {'module':<22}{'n':>5}{'r':>9}{'norm of update':>22}{'effective rank':>20}"
    for module, updates in groups.items():
        yield _group(module, updates)
        for note in dict.fromkeys(update.note for update in updates if update.note):
            yield from _row("", f"{module}: {note}")
    still = [update.module for update in adapter.updates if update.norm == 0]
    if still:
        yield from _row("unmoved", f"{len(still)} add nothing: {first_few(still, 3)}")


def _group(module: str, updates: list[Update]) -> str:
    ranks = [update.rank for update in updates if update.rank is not None]
    norms = [update.norm for update in updates if update.norm is not None]
    effective = [u.effective_rank for u in updates if u.effective_rank is not None]
    return (
        f"  {_short(module, 21):<22}{len(updates):>5}{_range(ranks):>9}{_range(norms):>22}"
        f"{_range(effective):>20}"
    )


def _range(values: Iterable[float]) -> str:
    """The least and the largest, `1.2 to 3.4`."""
    shown = dict.fromkeys(f"{value:.3g}" for value in (min(values), max(values))) if values else {}
    return " to ".join(shown)


def _says_something(key: str, value: Any) -> bool:
    return key not in _BOOKKEEPING and value not in (None, False, {}, [], "none", 0)


def _size(tensors: dict[str, Tensor]) -> str:
    bytes_there = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    parts = sum(tensor.numel() for tensor in tensors.values())
    return (
        f"{len(tensors)} tensors of {parts:,} numbers, {bytes_there:,} bytes ({', '.join(dtypes)})"
    )


def _differences(found: Difference) -> Iterator[str]:
    if found.same:
        yield "nothing differs"
        return
    yield "what differs"
    for (name, option), (one, other) in found.options.items():
        yield from _row("option", f"{name}, {option}: {one} and {other}")
    for name, pair in found.metrics.items():
        one, other = ("not said" if v is None else f"{v:.4g}" for v in pair)
        yield from _row("metric", f"{name}: {one} and {other}")
    if found.base:
        yield from _row("base", f"{len(found.base)}: {first_few(found.base, 2)}")
    if found.tensors:
        name = max(found.tensors, key=lambda key: found.tensors[key])
        yield from _row(
            "tensors",
            f"{len(found.tensors)} have other values; the largest difference is "
            f"{found.largest:.3g}, in {name}",
        )
    for name, (one_shape, other_shape) in [*found.shapes.items()][:3]:
        yield from _row("shape", f"{name}: {one_shape} and {other_shape}")
    for which, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            yield from _row("tensors", f"{len(names)} only in the {which}: {first_few(names, 2)}")
    if found.updates:
        name = max(found.updates, key=lambda key: found.updates[key])
        yield from _row(
            "updates",
            f"{len(found.updates)} weights get another update; the largest difference has the norm "
            f"{found.updates[name]:.3g}, at {name}",
        )


def _row(label: str, text: str | None) -> Iterator[str]:
    """A label and a text, whose further lines stand below its first."""
    if not text:
        return
    room = _WIDTH - 12
    line = ""
    for word in text.replace("\n", " ").split(" "):
        while len(word) > room:
            if line:
                yield f"  {label:<10}{line}"
                line, label = "", ""
            yield f"  {label:<10}{word[:room]}"
            word, label = word[room:], ""
        if line and len(line) + 1 + len(word) > room:
            yield f"  {label:<10}{line}"
            line, label = "", ""
        line = f"{line} {word}" if line else word
    yield f"  {label:<10}{line}"


def _short(text: str, room: int = _WIDTH) -> str:
    """Without the middle, where it is too long."""
    text = text.replace("\n", " ")
    if len(text) <= room:
        return text
    kept = (room - 3) // 2
    return f"{text[:kept]}...{text[-kept:]}"
