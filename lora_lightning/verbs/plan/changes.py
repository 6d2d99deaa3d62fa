"""Changes that make a run need less."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import LoraError
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.verbs.plan.batch import BatchShape
from lora_lightning.verbs.plan.estimate import Estimate, Run

Peak = Callable[[Estimate], int]


@dataclass(frozen=True)
class Change:
    """What a run would need with other options.

    Attributes:
        text: The options, as the command takes them.
        peak: Bytes on a device.

    """

    text: str
    peak: int


def changes_of(run: Run, shape: BatchShape, now: Estimate, peak_of: Peak, sharded: bool) -> list[Change]:  # fmt: skip
    """Each by itself, then those of a task added up, until nothing is left to change."""
    options: dict[str, dict[str, Any]] = dict(_options(run.module, now, sharded))
    shapes = dict(_smaller(shape))
    found = []
    for text, changes in options.items():
        found += _changed(run, [text], changes, shape, peak_of)
    for text, other in shapes.items():
        done = run.estimate(now.subject, other)
        if not done.unknown:
            found.append(Change(text, peak_of(done)))
    together = {k: v for changes in options.values() for k, v in changes.items()}
    if len(options) > 1:
        found += _changed(run, [*options], together, shape, peak_of)
    if options and shapes:
        text, smallest = [*shapes.items()][-1]
        found += _changed(run, [*options, text], together, smallest, peak_of)
    return found


def _changed(
    run: Run, texts: list[str], changes: dict[str, Any], shape: BatchShape, peak_of: Peak
) -> list[Change]:
    try:
        done = run.estimate(run.subject(**changes), shape)
    except LoraError:  # a network that does not support it
        return []
    return [] if done.unknown else [Change(", ".join(texts), peak_of(done))]


def _options(module: Any, now: Estimate, sharded: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(module, PretrainedTask) or module.network is not None:
        return
    how = module.options
    network: Any = now.subject.module.network
    if not how.gradient_checkpointing and network.supports_gradient_checkpointing:
        yield "gradient_checkpointing", {"gradient_checkpointing": True}
    there = importlib.util.find_spec("bitsandbytes") is not None
    if there and not how.quantize and not sharded and adapter_names(now.subject.module):
        yield "quantize nf4", {"quantize": "nf4"}


def _smaller(shape: BatchShape) -> Iterator[tuple[str, BatchShape]]:
    rows = {shape.rows // 2, 1} - {0, shape.rows}
    for fewer in sorted(rows, reverse=True):
        yield f"batch_size {fewer}", dataclasses.replace(shape, rows=fewer)
