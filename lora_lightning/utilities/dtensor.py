"""Tensors that are spread over the processes of a run (DTensor): whole values in and out.

Everything here is the identity on an ordinary tensor, and costs nothing where no process has
imported DTensor.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor, of which this process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flattened(tensor: Any) -> bool:
    """Whether FSDP1 has laid this parameter into a flat tensor that it splits over processes."""
    return bool(getattr(tensor, "_fsdp_flattened", False))  # torch's mark


def full_tensor(tensor: Any) -> Any:
    """All values of a tensor. Of a sharded one they are gathered: every process has to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_state(state: Any) -> Any:
    """A state of nested containers with whole tensors, gathered by all processes together."""
    if is_sharded(state):
        return full_tensor(state).cpu()
    if isinstance(state, dict):
        return {key: full_state(item) for key, item in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(full_state(item) for item in state)
    return state


def distribute_like(values: Tensor, own: Any) -> Tensor:
    """Whole `values`, which every process has, laid out as `own` is: nothing is communicated."""
    if not is_sharded(own) or is_sharded(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.to(device=own.device)
    return distribute_tensor(values, own.device_mesh, own.placements, src_data_rank=None)


@torch.no_grad()
def copy_full(own: Tensor, values: Tensor) -> None:
    """Write whole `values`, which every process has, into a tensor that may be sharded."""
    own.copy_(distribute_like(values.to(own.dtype), own))
