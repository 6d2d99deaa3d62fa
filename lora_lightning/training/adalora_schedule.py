"""AdaLoRA's rank budget in a Trainer's run: when the allocator is called.

One optimizer step, under automatic and manual optimization alike:

    on_before_optimizer_step   gradients are whole (accumulated, reduced over processes, unscaled)
                               and not clipped yet: that of the orthogonality term is added;
    the optimizer's post hook  weights have moved and nobody can have zeroed the gradients yet:
                               importance is measured; not called for a step that a gradient scaler
                               leaves out;
    on_train_batch_end         the step counts, ranks are allocated; checkpoints are written later.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lora_lightning.adapters.adalora import AdaLoraConfig
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.engine.rank_allocation import RankAllocator, adalora_adapters
from lora_lightning.engine.targets.hints import shown_name
from lora_lightning.errors import ConfigError
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.utilities._torch import unscales_in_step


class RankSchedule:
    """The allocator of one LoraCallback in its run; does nothing for other types than AdaLoRA."""

    def __init__(self) -> None:
        # Made when training starts, as only then the length of the run is known
        self.allocator: RankAllocator | None = None
        self._saved: dict[str, Any] | None = None
        self._hooks: list[RemovableHandle] = []
        self._stepping = False  # True once this batch has made a step

    def load(self, state: dict[str, Any] | None) -> None:
        """Keep the state of a checkpoint (`state()`), or None, until training starts."""
        self._saved = state

    def start(
        self, trainer: Trainer, root: nn.Module, config: AdapterConfig, adapter_name: str
    ) -> None:
        """Begin at step 0, or go on where the checkpoint or the last fit of this Trainer ended.

        ConfigError if the run is too short for the schedule, or its length is not known.
        """
        self.stop()
        saved, self._saved = self._saved, None
        if saved is None and trainer.global_step:
            saved = self.state()
        self.allocator = None
        adapters = adalora_adapters(root, adapter_name)
        trains = any(adapter.lora_E.requires_grad for adapter in adapters.values())
        if not isinstance(config, AdaLoraConfig) or not trains:
            return
        run = trainer.estimated_stepping_batches
        tried_out = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        length = int(run) if math.isfinite(run) and run > 0 else None
        # A run that is resumed for longer does not take back ranks that have been allocated.
        total = config.total_step or (saved["total_step"] if saved else length)
        if total is None:
            raise ConfigError(
                "AdaLoRA needs to know how many optimizer steps the run has, and this Trainer "
                "cannot tell. Set total_step, or max_steps of the Trainer. (lora.total_step)"
            )
        if not tried_out:
            config.check_schedule(total)
        self.allocator = RankAllocator(adapters, config, total)
        if saved:
            self.allocator.load_state(saved)
        if length is not None and length < self.allocator.last_step and not tried_out:
            rank_zero_warn(
                f"The run ends after {length} optimizer steps, before AdaLoRA's ranks are final "
                f"(step {self.allocator.last_step}). Lower total_step, or leave it out. "
                "(lora.total_step)"
            )
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Add the orthogonality term's gradient to those that `optimizer` is about to use."""
        if self.allocator is None:
            return
        among = _held(optimizer)
        if any(id(a.lora_E) in among for a in self.allocator.adapters.values()):
            self._stepping = True
            # A fused optimizer unscales the gradients itself, in its step.
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            fused = unscales_in_step(optimizer)
            scale = scaler.get_scale() if scaler is not None and fused else 1.0
            self.allocator.add_orthogonality(among, scale)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # what makes a fused one skip its step
        if self.allocator is not None and self._stepping and not found_inf:
            self.allocator.measure(_held(optimizer))

    def after_batch(self) -> None:
        """Count the step, if this batch made one, and allocate ranks."""
        if self.allocator is not None and self._stepping:
            self.allocator.advance()
        self._stepping = False

    def stop(self) -> None:
        """Remove the hooks from the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._stepping = False

    def finish(self) -> list[str]:
        """End the run; returns the lines that tell its user how ranks were shared out."""
        self.stop()
        if self.allocator is None:
            return []
        if self.allocator.settled:
            self.allocator.mask()  # once more: weights may have been averaged over the run
        return rank_lines(self.allocator)

    def state(self) -> dict[str, Any] | None:
        """The state that `load` takes: plain values and tensors; None without AdaLoRA."""
        self.after_batch()  # where another callback writes a checkpoint before us
        return None if self.allocator is None else self.allocator.state()


def rank_lines(allocator: RankAllocator) -> list[str]:
    """Total rank, and the ranks of modules that share the last part of their path."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for path, adapter in allocator.adapters.items():
        mask = allocator.masks.get(path)
        ranks[shown_name(path)].append(adapter.r if mask is None else int(mask.sum()))
    total = sum(sum(group) for group in ranks.values())
    listed = ", ".join(f"{name} {_range(group)}" for name, group in sorted(ranks.items()))
    lines = [f"AdaLoRA kept a total rank of {total} of {allocator.initial_budget}: {listed}"]
    if not allocator.settled:
        lines.append(
            f"AdaLoRA's ranks are not final: {allocator.steps} of {allocator.last_step} steps "
            f"until then were made; the target is a total of {allocator.target_budget}"
        )
    return lines


def _range(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
