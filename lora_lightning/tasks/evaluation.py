"""Means over all that is evaluated, of all batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.tasks.token_mean import TokenMean, widest


class Evaluation(TokenMean):
    """Sums over what is validated or tested, in float64; a subclass logs what they say.

    Not Lightning's mean of values that are logged with `batch_size` and `sync_dist`: over two
    processes with 11 and 10 rows it divides by 20, as the mean of whole numbers is one there. Nor
    torchmetrics' MeanMetric, whose sums a module in bfloat16 rounds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add_up(self, total: Tensor, weight: Tensor, *others: Tensor) -> dict[str, Tensor]:
        """Add what a batch has: its summed loss, the weight of that, and whatever else is summed.

        Returns:
            `loss`, the mean of this batch, and `weight`: by them `compare_with_base` knows how much
            batches differ.
        """
        wide = widest(total)
        values = torch.stack([value.detach().to(wide) for value in (total, weight, *others)])
        self._sums = values if self._sums is None else self._sums + values
        return {"loss": total / weight.where(weight > 0, 1), "weight": weight}

    def log_means(self, stage: str, total: Tensor, weight: Tensor, *others: Tensor) -> None:
        """Log what the sums over all batches and processes say of `stage`.

        With `sync_dist`, which Lightning asks for in a warning: all processes log the same.
        """
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Begin to sum up."""
        self._sums = None

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the means."""
        self._evaluated("val")

    def on_test_epoch_end(self) -> None:
        """Log the means."""
        self._evaluated("test")

    def _evaluated(self, stage: str) -> None:
        if self._sums is not None:
            self.log_means(stage, *self.sum_over_processes(self._sums))
