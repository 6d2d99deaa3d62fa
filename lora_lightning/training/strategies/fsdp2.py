"""Adapters on a module that its user shards in `configure_model` (FSDP2, ModelParallelStrategy).

Where the module is built before, adapters are attached before it is sharded, and `fully_shard`
takes them up with their modules. Where `configure_model` builds and shards at once, they are
attached afterwards: the adapters inside one FSDP unit then become a unit of their own. Layers read
the tensors of adapters directly (the fused path, `transform_input`), so this unit is not entered
by a forward of its own: every layer gathers it when it is called. It stays gathered until backward
is over, where FSDP reduces its gradients together with those of units whose inputs needed none.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import nn

from lora_lightning.errors import ConfigError, first_few
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.traversal import named_adapted_layers, walk
from lora_lightning.training._lightning import all_callbacks
from lora_lightning.utilities._torch import mixed_precision_policy
from lora_lightning.utilities.dtensor import is_sharded, is_unit
from lora_lightning.utilities.is_a import is_a

_NO_TENSOR_PARALLEL = (
    "adapters do not follow weights that are split along their features, and each process would "
    "train one of its own on its part. Use data_parallel_size=<all processes>, "
    "tensor_parallel_size=1, and fully_shard alone. (trainer.strategy)"
)


def is_model_parallel(strategy: Strategy) -> bool:
    """Tell whether this is ModelParallelStrategy, under which modules shard themselves (FSDP2)."""
    return is_a(strategy, "ModelParallelStrategy")


def is_fsdp(strategy: Strategy) -> bool:
    """Tell whether this is Lightning's FSDP1."""
    return is_a(strategy, "FSDPStrategy")


def check_model_parallel(trainer: Trainer, starts_from_data: bool) -> None:
    """Refuse (ConfigError) what does not work with a module that is sharded."""
    strategy: Any = trainer.strategy
    if not is_model_parallel(strategy):
        return
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise ConfigError(
            "ModelParallelStrategy was given (or has chosen, as tensor_parallel_size is 'auto') "
            f"tensor_parallel_size={size}: {_NO_TENSOR_PARALLEL}"
        )
    if starts_from_data:
        raise ConfigError(
            "init_lora_weights='eva' chooses ranks by the data, and ModelParallelStrategy reads a "
            "checkpoint, which says them, only when the adapters are sharded already. Find them on "
            "one device with eva_start, and give rank_pattern. (lora.init_lora_weights)"
        )
    for callback in all_callbacks(trainer):
        if is_a(callback, "WeightAveraging"):
            raise ConfigError(
                f"{type(callback).__name__} copies the whole module, which cannot be done with a "
                "sharded one. Take one of the two out. (trainer.callbacks)"
            )


def shard_adapters(module: LightningModule) -> None:
    """Shard adapters that were attached to modules that are sharded already.

    ConfigError if adapters would be left whole beside sharded ones: nobody would reduce their
    gradients over the processes, and each would train an adapter of its own.
    """
    if not is_model_parallel(module.trainer.strategy):
        return
    _check_no_tensor_parallel(module)
    units: dict[tuple[nn.Module, frozenset[torch.dtype]], list[AdaptedLayer]] = {}
    for path, layer in named_adapted_layers(module):
        sharded = {is_sharded(p) for p in layer.adapters.parameters()}
        if False not in sharded:
            continue
        if len(sharded) == 2:
            raise ConfigError(
                f"{path!r} carries adapters that are sharded already, and new ones cannot join "
                "them. Start from a module that has not trained yet. (lora.adapter_name)"
            )
        unit = _unit_around(module, path)
        if unit is None:
            raise ConfigError(
                f"configure_model leaves {path!r} out of fully_shard, so its adapter would train "
                "on every process by itself. Apply fully_shard to a module that contains it, "
                "at the latest to the whole model. (trainer.strategy)"
            )
        dtypes = frozenset(p.dtype for p in layer.adapters.parameters())  # FSDP wants one a unit
        units.setdefault((unit, dtypes), []).append(layer)
    for (unit, _), layers in units.items():
        _shard_together(unit, layers)
    plain = [n for n, p in module.named_parameters() if p.requires_grad and not is_sharded(p)]
    if plain:
        raise ConfigError(
            f"{first_few(plain)} would train as whole tensors beside sharded ones: nobody would "
            "reduce their gradients over the processes. Apply fully_shard in configure_model to a "
            "module that contains them. (trainer.strategy)"
        )


def check_dtypes(module: nn.Module) -> None:
    """Raise ConfigError if one FSDP unit trains two dtypes: it reduces the gradients of one."""
    found: dict[nn.Module, dict[torch.dtype, str]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and is_sharded(parameter):
            unit = _unit_around(module, name.rpartition(".")[0])
            if unit is not None:
                found.setdefault(unit, {}).setdefault(parameter.dtype, name)
    for names in found.values():
        if len(names) > 1:
            shown = ", ".join(f"{name!r} in {dtype}" for dtype, name in names.items())
            raise ConfigError(
                f"One FSDP unit would train {shown}; it can have one dtype only. Keep the base in "
                "fp32 and compute in bf16 (MixedPrecisionPolicy), or use bias='none'. (lora.bias)"
            )


def _shard_together(unit: nn.Module, layers: list[AdaptedLayer]) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = next(p.device_mesh for p in unit.parameters() if is_sharded(p))
    group: list[nn.Module] = [layer.adapters for layer in layers]
    policy = mixed_precision_policy(unit)
    fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for layer in layers:
        layer.register_forward_pre_hook(_gather)
        if layer.trains_in_place:
            layer.show_active()


def _gather(layer: nn.Module, args: object) -> None:
    layer.adapters.unshard()  # type: ignore[operator,union-attr]


def _unit_around(module: nn.Module, path: str) -> nn.Module | None:
    """The innermost FSDP unit that holds the module at `path`."""
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        child = module.get_submodule(".".join(parts[:length]))
        if is_unit(child):
            return child
    return None


def _check_no_tensor_parallel(module: nn.Module) -> None:
    """Refuse (ConfigError) weights that processes share out along their features."""
    for path, child in walk(module):
        for name, parameter in child.named_parameters(recurse=False):
            if not is_sharded(parameter):
                continue
            # FSDP: parts along one dimension of the mesh; a second one holds copies (HSDP).
            *others, _ = parameter.placements
            if _unit_around(module, path) is None or not all(p.is_replicate() for p in others):
                raise ConfigError(
                    f"{(path + '.' if path else '') + name!r} is split over processes by "
                    f"tensor parallelism ({parameter.placements}): {_NO_TENSOR_PARALLEL}"
                )
