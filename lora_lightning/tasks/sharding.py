"""FSDP2 of a task's network: `strategy: ModelParallelStrategy`.

Rank 0 alone loads the files, into its main memory; the others build the network without memory.
Every repeated layer is one FSDP unit, and the rest another: each process has its part of the
parameters, and gathers those of a unit while it computes. Values go from rank 0 to all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def data_parallel_mesh(module: LightningModule) -> DeviceMesh | None:
    """Device mesh that a LightningModule is sharded over; None without such a strategy.

    Raises:
        ConfigError: If they are to share the work inside layers as well.
    """
    mesh = module.device_mesh
    if mesh is None:
        return None
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            "ModelParallelStrategy was given (or has chosen, as tensor_parallel_size is 'auto') "
            f"tensor_parallel_size={mesh['tensor_parallel'].size()}, and tasks are shared out by "
            "FSDP alone. Set data_parallel_size to the number of processes, and "
            "tensor_parallel_size to 1. (trainer.strategy)"
        )
    return mesh["data_parallel"]


def repeated_layers(network: nn.Module) -> list[nn.Module]:
    """The layers that a network is made of: what its outermost lists hold."""
    found: list[nn.Module] = []
    for child in network.children():
        found += list(child) if isinstance(child, nn.ModuleList) else repeated_layers(child)
    return found


def shard(
    load: Callable[[], tuple[Any, set[str]]], skeleton: Any, mesh: DeviceMesh, device: torch.device
) -> set[str]:
    """Shard a network on the meta device and give it its part of what `load` gives on rank 0.

    Args:
        load: Gives the network in main memory, and a set of names, which all processes return.
        skeleton: The same network on the meta device.
        mesh: The processes.
        device: Where this process's part lies.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    loaded, names = _on_rank_0(load)
    for layer in repeated_layers(skeleton):
        fully_shard(layer, mesh=mesh)
    fully_shard(skeleton, mesh=mesh)
    skeleton.to_empty(device=device)
    skeleton.tie_weights()  # to_empty gives every name a tensor of its own
    set_model_state_dict(
        skeleton,
        {} if loaded is None else loaded.state_dict(),
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    kept = skeleton.state_dict().keys()
    values = {} if loaded is None else dict(loaded.named_buffers())
    for name, buffer in skeleton.named_buffers():
        if name not in kept:  # made by the layers themselves, as tables of positions are
            if loaded is not None:
                buffer.copy_(values[name])
            dist.broadcast(buffer, src=0)
    return names


def _on_rank_0(load: Callable[[], tuple[Any, set[str]]]) -> tuple[Any, set[str]]:
    """Call `load` on rank 0; others get None for the network. Errors are raised on all ranks."""
    loaded: Any = None
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            loaded, *result = load()
        except Exception as error:
            result = [error]
    dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], Exception):
        raise result[0]
    return loaded, result[0]
