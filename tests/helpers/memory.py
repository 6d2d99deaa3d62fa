"""How much a training step really takes on a CPU: what torch's allocator was asked for."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of each memory that tensors lie in, by its address."""
    found = (t.untyped_storage() for t in tensors if isinstance(t, Tensor))
    return {s.data_ptr(): s.nbytes() for s in found}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Of its state."""
    values = (v for state in optimizer.state.values() for v in state.values())
    return [v for v in values if isinstance(v, Tensor)]


def base_tensors(module: torch.nn.Module) -> list[Any]:
    """Parameters, buffers, and what bitsandbytes keeps beside them."""
    found: list[Any] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        weight = part._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        for holder in (weight, state, getattr(state, "state2", None)):
            found += [getattr(holder, n, None) for n in ("SCB", "absmax", "code", "offset")]
    return found


class MeasuredPeak(Callback):
    """The most bytes that live in a step: those before it, and what is allocated in it and not yet
    freed, kernels' own buffers too.
    """

    last: MeasuredPeak | None = None

    def __init__(self, first: int = 0) -> None:
        self.first = first  # batch
        self.peak = self.resident = self.optimizer = self.before = 0
        self.profile: Any = None
        type(self).last = self

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx < self.first:
            return
        gradients = [p.grad for p in pl_module.parameters()]
        state = [t for o in trainer.optimizers for t in optimizer_tensors(o)]
        self.before = sum(storages([*base_tensors(pl_module), *gradients, *state]).values())
        if isinstance(batch, dict):
            self.before += sum(storages(batch.values()).values())
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.profile is None:
            return
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        live = most = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            live += change
            most = max(most, live)
        self.peak = max(self.peak, self.before + most)
        self.profile = None
        state = [t for o in trainer.optimizers for t in optimizer_tensors(o)]
        self.optimizer = max(self.optimizer, sum(storages(state).values()))
        base = sum(storages(base_tensors(pl_module)).values())
        self.resident = base
