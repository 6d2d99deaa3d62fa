"""One training step of a module without memory: what lives at its worst moments."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.tasks.chunked_cross_entropy import chunks_sized_for
from lora_lightning.tasks.model_options import weights_of
from lora_lightning.tasks.sharding import repeated_layers
from lora_lightning.verbs.plan.live_bytes import ALL_LEARNED, Answers, LiveBytes
from lora_lightning.verbs.plan.subject import Subject

# Layers that a trace is made of where there are many alike: the rest goes on in a straight line.
TRACED = 4
# What differs between layers that compute alike.
_NUMBERS = ("layer_idx", "layer_id", "layer_index", "block_idx")
RESIDENT = ("base", "adapters", "gradients", "optimizer")
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

Batch = Any
MakeOptimizers = Callable[[nn.Module], list[Optimizer]]


@dataclass(frozen=True)
class Asked:
    """How a step is made.

    Attributes:
        make_batch: The batch, called where tensors have no memory.
        optimizers: Those of a module.
        precision: The Trainer's.
        device: Kind of device that is planned for: `cpu` or another.
        answers: To what a step asks of the values of its batch.

    """

    make_batch: Callable[[], Batch]
    optimizers: MakeOptimizers
    precision: str
    device: str
    answers: Answers = ALL_LEARNED


def resident_bytes(subject: Subject, optimizers: MakeOptimizers) -> tuple[Counter[str], list[int]]:
    """Bytes of what lives all the time, and those of each tensor of an optimizer's state."""
    live = LiveBytes()
    with subject.fake, live:
        _count_resident(subject, live)
        made = optimizers(subject.module)
        state = _prepare(subject.module, made, live)
        resident = Counter({part: live.live[part] for part in RESIDENT})
        del made
        for p in subject.module.parameters():
            p.grad = None
    return resident, state


def step_peaks(subject: Subject, asked: Asked) -> dict[str, Counter[str]]:
    """The bytes of each part when most live, in each phase, but for what lives all the time.

    Of a module with many layers that are alike, a few are traced; each further one adds what the
    last of these added.
    """
    lists = _alike(subject.module)
    if not lists:
        return _traced(subject, asked)
    whole = [[*layers] for layers in lists]
    short = [min(TRACED, len(layers)) for layers in lists]
    try:
        peaks = _with_layers(subject, asked, lists, [n - 1 for n in short])
        result = {phase: Counter(parts) for phase, parts in peaks.items()}
        for i, layers in enumerate(whole):
            counts = [n - (j != i) for j, n in enumerate(short)]
            more = _with_layers(subject, asked, lists, counts)
            for phase, parts in more.items():
                for part in parts:
                    each = parts[part] - peaks[phase][part]
                    result[phase][part] += each * (len(layers) - short[i] + 1)
    finally:
        for held, modules in zip(lists, whole, strict=True):
            _set(held, modules)
    return result


def _with_layers(
    subject: Subject, asked: Asked, lists: list[nn.ModuleList], counts: list[int]
) -> dict[str, Counter[str]]:
    whole = [[*layers] for layers in lists]
    for layers, count in zip(lists, counts, strict=True):
        _set(layers, [*layers][:count])
    try:
        return _traced(subject, asked)
    finally:
        for layers, modules in zip(lists, whole, strict=True):
            _set(layers, modules)


def _set(layers: nn.ModuleList, modules: list[nn.Module]) -> None:
    layers._modules = {str(i): module for i, module in enumerate(modules)}


def _traced(subject: Subject, asked: Asked) -> dict[str, Counter[str]]:
    module, live = subject.module, LiveBytes(asked.answers)
    cast = weights_of(asked.precision)
    how = (chunks_sized_for(asked.device), _default_dtype(cast), _as_if_not_traced())
    with subject.fake, live, how[0], how[1], how[2]:
        _count_resident(subject, live)
        optimizers = asked.optimizers(module)
        _prepare(module, optimizers, live)
        live.part = "batch"
        batch = asked.make_batch()
        head = _watch_head(module, live)
        try:
            with live.phase("forward", "activations"), _autocast(asked.precision):
                output = module.training_step(batch, 0)
                loss: Any = output["loss"] if isinstance(output, dict) else output
                del output
        finally:
            head()
        with live.phase("kept", "backward"):
            pass  # what forward leaves
        with live.phase("backward", "backward"):
            loss.backward()
            del loss
        with live.phase("step", "step"):
            for optimizer in optimizers:
                optimizer.step()
        for p in module.parameters():
            p.grad = None
    return {
        phase: Counter({part: n for part, n in parts.items() if part not in RESIDENT})
        for phase, parts in live.peaks.items()
        if phase
    }


def _count_resident(subject: Subject, live: LiveBytes) -> None:
    live.count(subject.of_adapters(), "adapters")
    live.count(subject.module.parameters(), "base")
    live.count(subject.module.buffers(), "base")
    for module in subject.module.modules():
        live.count(_scales(module), "base")


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside a packed weight."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    for holder in (weight, state, getattr(state, "state2", None), module.__dict__.get("state")):
        for name in ("SCB", "absmax", "code", "offset"):
            value = getattr(holder, name, None)
            if isinstance(value, Tensor):
                yield value


def _prepare(module: nn.Module, optimizers: list[Optimizer], live: LiveBytes) -> list[int]:
    """Give the module gradients and the optimizers their state, as after a step before."""
    live.part = "gradients"
    for p in module.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    live.part = "optimizer"
    for optimizer in optimizers:
        optimizer.step()
    live.part = "other"
    states = [state for o in optimizers for state in o.state.values()]
    return [t.numel() * t.element_size() for state in states for t in _tensors(state)]


def _tensors(found: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _watch_head(module: Any, live: LiveBytes) -> Callable[[], None]:
    """Count what is made from the call of a network's output head on for the loss."""
    network = getattr(module, "network", None)
    find = getattr(network, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is None:
        return lambda: None

    def reached(*_: Any) -> None:
        live.enter("head", "loss head")

    handle = head.register_forward_pre_hook(reached)
    loss = getattr(module, "lm_loss", None)
    if loss is not None:
        loss.by_chunks = True  # whether it may be is found by values
    removed: Callable[[], None] = handle.remove
    return removed


@contextmanager
def _as_if_not_traced() -> Iterator[None]:
    """Have transformers ask whether a mask of attention is needed, also where it may not know.

    Of tensors without values it makes one in any case.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    before = getattr(masks, "is_tracing", None)
    if before is None:
        yield
        return
    masks.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masks.is_tracing = before


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    dtype = _AUTOCAST.get(precision)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _alike(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of more than a few layers that all, but perhaps the first, are alike."""
    layers = {id(layer) for layer in repeated_layers(module)}
    lists = [
        child
        for child in module.modules()
        if isinstance(child, nn.ModuleList) and len(child) and id(child[0]) in layers
    ]
    # A first layer of its own kind is in every trace.
    if any(len({_look(layer) for layer in [*found][1:]}) > 1 for found in lists):
        return []
    return lists if any(len(found) > TRACED for found in lists) else []


def _look(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers have in common that compute alike."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (
            name,
            type(child),
            *((k, v) for k, v in vars(child).items() if type(v) in plain and k not in _NUMBERS),
            *((k, p.shape, p.dtype) for k, p in child._parameters.items() if p is not None),
        )
        for name, child in layer.named_modules()
    )
