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

Peak = Callable[[Estimate], float]


@dataclass(frozen=True)
class Change:
    """What a run would need with other options.

    Attributes:
        text: The options, as the command takes them.
        peak: Bytes on a device.

    """

    text: str
    peak: float


def changes_of(
    run: Run, shape: BatchShape, now: Estimate, peak_of: Peak, fits: Callable[[float], bool]
) -> list[Change]:
    """The other choice of gradient checkpointing; and where a run does not fit, what needs less.

    Each by itself, then those of a task together, and then with the smallest batch.
    """
    other = _other_checkpointing(run.module, now)
    found = [c for text, changes in other for c in _changed(run, [text], changes, shape, peak_of)]
    if fits(peak_of(now)):
        return found
    fewer = [(text, changes) for text, changes in other if changes["gradient_checkpointing"]]
    options = [*fewer, *_quantized(run.module, now)]
    for text, changes in options[len(fewer) :]:
        found += _changed(run, [text], changes, shape, peak_of)
    smaller = [*_smaller(run, shape)]
    for text, less in smaller:
        done = run.estimate(now.subject, less)
        found += [] if done.unknown else [Change(text, peak_of(done))]
    texts = [text for text, _ in options]
    together = {k: v for _, changes in options for k, v in changes.items()}
    if len(options) > 1:
        found += _changed(run, texts, together, shape, peak_of)
    if options and smaller:
        text, least = smaller[-1]
        found += _changed(run, [*texts, text], together, least, peak_of)
    return found


def _changed(
    run: Run, texts: list[str], changes: dict[str, Any], shape: BatchShape, peak_of: Peak
) -> list[Change]:
    try:
        done = run.estimate(run.subject(**changes), shape)
    except LoraError:  # a network that does not support it
        return []
    return [] if done.unknown else [Change(", ".join(texts), peak_of(done))]


def _other_checkpointing(module: Any, now: Estimate) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(module, PretrainedTask) or module.network is not None:
        return []
    network: Any = now.subject.module.network
    if not network.supports_gradient_checkpointing:
        return []
    other = not module.options.gradient_checkpointing
    text = "gradient_checkpointing" if other else "gradient_checkpointing false"
    return [(text, {"gradient_checkpointing": other})]


def _quantized(module: Any, now: Estimate) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(module, PretrainedTask) or module.network is not None:
        return []
    there = importlib.util.find_spec("bitsandbytes") is not None
    if not there or module.options.quantize or not adapter_names(now.subject.module):
        return []
    return [("quantize nf4", {"quantize": "nf4"})]


def _smaller(run: Run, shape: BatchShape) -> Iterator[tuple[str, BatchShape]]:
    rows = {shape.rows // 2, 1} - {0, shape.rows}
    for fewer in sorted(rows, reverse=True):
        learned = None if shape.learned is None else run.found.most_learned(fewer)
        yield f"batch_size {fewer}", dataclasses.replace(shape, rows=fewer, learned=learned)
