"""CausalLM under plain SGD, so that equal gradients give equal weights, and a negative control."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_lightning import CausalLM


class WithSGD(CausalLM):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class MeanOfMeans(WithSGD):
    """As everyone writes it."""

    def window_loss(self, total: Tensor, batch: Any, penalty: Any = None) -> Tensor:
        return total / self.batch_weight(batch)
