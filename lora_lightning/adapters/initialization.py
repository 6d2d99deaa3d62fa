"""Start values of the tensors of an adapter.

Random values come from a generator of their own, seeded by the run's seed and the tensor's name:
every process draws the same values whatever it did before, the order of injection does not
matter, and the user's random state is not disturbed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_lightning.utilities.dtensor import copy_full


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `name` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@torch.no_grad()
def constant_(tensor: Tensor, value: float) -> None:
    """One value in place, also under Lightning's `empty_init`, which skips `nn.init`."""
    tensor.fill_(value)


@torch.no_grad()
def kaiming_uniform_(tensor: Tensor, generator: torch.Generator) -> None:
    """U(-b, b) with b = 1 / sqrt(fan_in), fan_in = inputs of one output: shape[1] * kernel.

    This is what `nn.Linear` does (Kaiming-uniform with a = sqrt(5)) and what PEFT starts A with.
    """
    bound = 1 / math.sqrt(tensor.shape[1:].numel())
    _fill(tensor, lambda draft: draft.uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """N(0, std^2) in place."""
    _fill(tensor, lambda draft: draft.normal_(0, std, generator=generator))


def _fill(tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    if tensor.is_meta:
        return
    # Drawn on the CPU in fp32 and copied, so that the values do not depend on device or dtype.
    draft = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    draw(draft)
    copy_full(tensor, draft)
