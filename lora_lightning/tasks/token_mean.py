"""Gradient accumulation whose update is the mean over all learned tokens of its window."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.training._lightning import trainer_of
from lora_lightning.utilities.dtensor import local_part

KEY = "token_mean"  # in checkpoints


class TokenMean(LightningModule):
    """Accumulation over batches and processes that is exactly one large batch.

    The loss of a window of micro-batches j, over all processes r, is
    L = sum_jr s_jr / sum_jr n_jr: s the summed loss, n the number of tokens (or examples, or the
    sum of their weights). Means of means, which Lightning's own accumulation and DDP make, weight a
    token the more the fewer tokens its batch has.

    The window's number of tokens is not known before its last micro-batch. So the gradient is kept
    right at every moment: with N_j the tokens of all processes up to micro-batch j, gradients so
    far are multiplied by N_(j-1) / N_j before s_j / N_j adds its own. What hooks, gradient clipping
    and optimizers see is the mean over the window, and a window that the end of an epoch cuts short
    is nothing special. Of each micro-batch, two numbers are reduced over the processes.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of the window so far, over all processes: weight, and summed loss. No buffers, which a
        # module in bfloat16 would round.
        self._window_weight = torch.zeros((), dtype=torch.float64)
        self._window_total = torch.zeros((), dtype=torch.float64)

    def batch_weight(self, batch: Any) -> Tensor | None:
        """The number of tokens (or what else is averaged over) that a batch trains on; may be 0.

        None, of a module that does not say: its loss is its own affair.
        """
        return None

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Rescale gradients so far to the mean over the window with this batch in it.

        Before the step, not within it: FSDP shows gradients only outside of its forward.
        """
        own = self.batch_weight(batch)
        if own is None:
            return
        weight = self.sum_over_processes(own)
        gradients = self._gradients() if batch_idx % self.trainer.accumulate_grad_batches else []
        # No gradients: a window begins, or a resumed run has none of what was accumulated.
        if not gradients:
            self._window_weight = self._window_total = torch.zeros_like(weight)
        before, self._window_total = self._window_weight.to(weight), self._window_total.to(weight)
        self._window_weight = before + weight
        if gradients:
            torch._foreach_mul_(gradients, before / _not_zero(self._window_weight))

    def window_loss(self, total: Tensor, batch: Any, penalty: Tensor | None = None) -> Tensor:
        """Scale a loss for `training_step` to return, so that the update is the window's mean.

        Args:
            total: Summed loss of this process's micro-batch, of float32 or wider.
            batch: The micro-batch. Without a Trainer, the mean over it is returned.
            penalty: A mean that is added to the micro-batch's mean; no part of `window_mean`.
        """
        weight = self.batch_weight(batch)
        assert weight is not None, "`batch_weight` says what the mean is over"
        summed = total if penalty is None else total + penalty * weight
        if trainer_of(self) is None:
            return summed / _not_zero(weight).to(total)
        self._window_total = self._window_total + self.sum_over_processes(total.detach())
        # Lightning divides by the one; strategies average gradients over the other.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return summed * (parts / _not_zero(self._window_weight)).to(total)

    @property
    def window_mean(self) -> Tensor:
        """Mean loss of the window so far, over all processes."""
        return self._window_total / _not_zero(self._window_weight)

    def on_fit_start(self) -> None:
        """Refuse strategies that keep accumulated gradients to themselves."""
        super().on_fit_start()
        if trainer_of(self) is None:
            return
        strategy, accumulate = self.trainer.strategy, self.trainer.accumulate_grad_batches
        if strategy.handles_gradient_accumulation and accumulate > 1:
            raise ConfigError(
                f"{type(strategy).__name__} accumulates gradients by itself and would take the "
                f"mean of {accumulate} means, in which tokens of short batches count more. Use "
                "accumulate_grad_batches=1 with larger batches, or strategy='ddp' or 'fsdp'. "
                "(trainer.accumulate_grad_batches)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the window has so far: gradients may be kept, too (`LoraCallback`)."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = {"weight": float(self._window_weight), "total": float(self._window_total)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on within the window."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(KEY, {"weight": 0.0, "total": 0.0})
        self._window_weight = torch.tensor(saved["weight"], dtype=torch.float64)
        self._window_total = torch.tensor(saved["total"], dtype=torch.float64)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of a number that each process has, in float64."""
        return self.trainer.strategy.reduce(value.to(widest(value), copy=True), reduce_op="sum")

    def _gradients(self) -> list[Tensor]:
        groups = [group for o in self.trainer.optimizers for group in o.param_groups]
        held = (p for group in groups for p in group["params"])
        return [local_part(p.grad) for p in held if p.grad is not None]


def widest(value: Tensor) -> torch.dtype:
    """float64, but on Apple's GPUs, which have none."""
    return torch.float32 if value.device.type == "mps" else torch.float64


def _not_zero(weight: Tensor) -> Tensor:
    return weight.where(weight > 0, 1)
