"""Tensors that are spread over the processes of a run (DTensor): whole values in and out.

Everything here is the identity on an ordinary tensor, and costs nothing where no process has
imported DTensor.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """True for a DTensor, of which this process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_unit(module: nn.Module) -> bool:
    """True for a module that `fully_shard` was applied to (FSDP2)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(module: nn.Module) -> None:
    """Make the module's parameters the parts that optimizers hold, where FSDP2 has gathered them.

    The next forward gathers them again, and puts them where they are used.
    """
    for child in module.modules():
        if is_unit(child):
            child.reshard()  # type: ignore[operator]


def local_part(tensor: Tensor) -> Tensor:
    """The values that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather all values of a tensor; where it is sharded, every process has to call it."""
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


def distribute_like(values: Tensor, own: Tensor | None) -> Tensor:
    """Whole `values`, which every process has, laid out as `own` is: nothing is communicated."""
    if not is_sharded(own) or is_sharded(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.to(device=own.device)
    return distribute_tensor(values, own.device_mesh, own.placements, src_data_rank=None)


def part_like(values: Tensor, own: Tensor) -> Tensor:
    """`values`, this process's part, as a part of a tensor that is laid out as `own` is."""
    if not is_sharded(own):
        return values
    return own.from_local(
        values,
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=own.shape,
        stride=own.stride(),
    )


@torch.no_grad()
def copy_full(own: Tensor, values: Tensor) -> None:
    """Write whole `values`, which every process has, into a tensor that may be sharded."""
    own.copy_(distribute_like(values.to(own.dtype), own))
