"""FSDP1 (`strategy="fsdp"`): the frozen base is sharded, adapters stay whole on every process.

FSDP lays the parameters of a unit into one flat tensor: of one dtype, so that float32 adapters
cannot lie beside a bf16 base, and with a gradient for all of it, although only adapters train. So
adapters are left out of every unit (`ignored_modules`), and the units are frozen throughout: no
gradient of the base is allocated or sent. The adapters' gradients are averaged over the processes
at the end of every backward pass, in one message per dtype, as DDP does it. Checkpoints need no
gathering: each process has all that is saved.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lora_lightning.checkpoint.fingerprint import persistent_buffers
from lora_lightning.checkpoint.state_entries import load_entries, owner_of, writes_entries
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import CheckpointError, ConfigError, first_few
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters
from lora_lightning.training._lightning import setup_model
from lora_lightning.training.checkpoint_io.baseline import base_buffers
from lora_lightning.training.module_state import callbacks_of, module_state
from lora_lightning.training.strategies.fsdp2 import is_fsdp
from lora_lightning.training.weight_averaging import averaged_models
from lora_lightning.utilities._torch import call_when_backward_ends


def check_fsdp(strategy: Strategy) -> None:
    """Refuse (ConfigError) options with which adapters cannot be left out of FSDP's units."""
    options: dict[str, Any] = strategy.kwargs  # type: ignore[attr-defined]
    if not options["use_orig_params"]:
        raise ConfigError(
            f"{type(strategy).__name__}(use_orig_params=False) hides the adapters from the "
            "optimizer. Leave it at its default, True. (trainer.strategy)"
        )
    if options.get("ignored_states") is not None:
        raise ConfigError(
            f"{type(strategy).__name__}(ignored_states=...) cannot be given beside adapters, which "
            "are left out as modules. Name modules: ignored_modules. (trainer.strategy)"
        )
    # Passed on when `configure_model` begins, to wrap by; adapters attached in it are added.
    options["ignored_modules"] = [*(options.get("ignored_modules") or [])]


def leave_out_adapters(module: LightningModule) -> None:
    """Exclude adapters from FSDP's wrapping, whether the strategy or the module wraps.

    ConfigError if a part of the base trains, or FSDP cannot flatten one.
    """
    strategy: Any = module.trainer.strategy
    if not is_fsdp(strategy):
        return
    packed = [name for name, p in module.named_parameters() if not p.is_floating_point()]
    if packed:
        raise ConfigError(
            f"FSDP cannot flatten weights that are held as integers ({first_few(packed)}): the "
            "base is quantised. Use strategy='ddp', or ModelParallelStrategy. (trainer.strategy)"
        )
    ignored = strategy.kwargs["ignored_modules"]
    known = {id(part) for part in ignored}
    adapters = adapter_modules(module)
    ignored += [part for part in adapters if id(part) not in known]
    biases = [name for name, _, _ in trained_biases(module)]
    if biases:
        raise ConfigError(
            f"bias trains {first_few(biases)}, which FSDP would shard with the frozen weights "
            "beside them. Use bias='none', or ModelParallelStrategy. (lora.bias)"
        )


def adapter_modules(module: nn.Module) -> list[nn.Module]:
    """All that FSDP leaves alone: adapters, and what the base has in place of those that train."""
    found: list[nn.Module] = []
    for _, layer in named_adapted_layers(module):
        found.append(layer.adapters)
        found += [layer.original_tensors] if layer.trains_in_place else []
    return found


def check_not_wrapped(module: LightningModule) -> None:
    """Refuse (ConfigError) to attach adapters to weights that FSDP has flattened."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    attached = adapter_names(module)
    if not is_fsdp(module.trainer.strategy) or all(
        callback.adapter_name in attached for callback in callbacks_of(module)
    ):
        return
    wrapped = [n for n, m in module.named_modules() if isinstance(m, FullyShardedDataParallel)]
    if wrapped:
        raise ConfigError(
            f"{first_few(wrapped)} were wrapped in FSDP before adapters could be attached to them: "
            "their weights are flattened by now. Build the model in __init__ or setup and give the "
            "strategy an auto_wrap_policy instead; or, to build and shard in configure_model, "
            "use ModelParallelStrategy. (trainer.strategy)"
        )


def setup_fsdp(self: Strategy, module: LightningModule, model: nn.Module) -> nn.Module:
    """Wrap a module with adapters in FSDPStrategy's way; further calls return the first's."""
    remembered = module_state(module)
    if averaged_models(module.trainer):
        raise ConfigError(
            "WeightAveraging swaps whole models, and under FSDP each process has parts of the base "
            "only. Take it out, or use strategy='ddp'. (trainer.callbacks)"
        )
    if remembered.fsdp is None:
        leave_out_adapters(module)
        root = setup_model(self, model)
        adapters = nn.ModuleList(adapter_modules(module))
        own = [*adapters.parameters(), *adapters.buffers()]
        for tensor in own:
            tensor.data = tensor.data.to(self.root_device)
            dist.broadcast(tensor.data, src=0)
        layers = [layer for _, layer in named_adapted_layers(module)]
        average = GradientAverage([p for layer in layers for p in layer.adapters.parameters()])
        remembered.fsdp = root, average
        remembered.baseline.note_parts(module)
    remembered.fsdp[1].begin()
    # Gradients are whole here, so that the plain way to clip them is right.
    plugin: Any = self.precision_plugin
    plugin.clip_grad_by_norm = MethodType(Precision.clip_grad_by_norm, plugin)
    return remembered.fsdp[0]


@dataclass
class GradientAverage:
    """Average of the gradients of some parameters over all processes, at the end of a backward.

    A gradient that none of the processes has stays None; one that only some have is averaged with
    zeros, as under DDP.
    """

    parameters: list[nn.Parameter]
    _queued: bool = False

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            hook: Any = parameter.register_post_accumulate_grad_hook
            hook(self._queue)

    def begin(self) -> None:
        """Forget a backward pass that an exception has ended: the next would not be averaged."""
        self._queued = False

    def _queue(self, _: Tensor) -> None:
        if not self._queued:
            self._queued = True
            call_when_backward_ends(self._average)

    def _average(self) -> None:
        self._queued = False
        groups: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.parameters:
            if parameter.requires_grad:
                groups[parameter.dtype].append(parameter)
        for parameters in groups.values():
            _average(parameters)


def _average(parameters: list[nn.Parameter]) -> None:
    grads = [p.grad for p in parameters]
    present = parameters[0].new_tensor([float(g is not None) for g in grads])
    pieces = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(piece.flatten() for piece in pieces), present])
    dist.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    *averages, present = torch.split(flat, [*sizes, len(parameters)])
    somewhere = [True] * len(grads) if None not in grads else present.bool().tolist()
    for parameter, average, there in zip(parameters, averages, somewhere, strict=True):
        if there:
            average = (average / dist.get_world_size()).view_as(parameter)
            if parameter.grad is None:
                parameter.grad = average
            else:
                parameter.grad.copy_(average)


# -- state -----------------------------------------------------------------------------------------


def load_fsdp_module_state(module: LightningModule, state: dict[str, Any]) -> None:
    """Load what `trained_state` gives; CheckpointError if the module lacks a tensor."""
    own: dict[str, Tensor] = {**dict(named_parameters(module)), **dict(_own_tensors(module))}
    entries, left = {}, []
    for key, value in state.items():
        if key in own and own[key].shape == value.shape:
            with torch.no_grad():
                own[key].copy_(value)
        elif key not in own and writes_entries(owner_of(module, key)):
            entries[key] = value
        else:
            left.append(key)
    if left:
        raise CheckpointError(
            f"The module has no place for {first_few(sorted(left))} of the checkpoint. (ckpt_path)"
        )
    load_entries(module, entries)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """List persistent buffers, which FSDP leaves whole, those of adapters too."""
    found = base_buffers(module)
    for path, layer in named_adapted_layers(module):
        for inner, part in layer.adapters.named_modules():
            prefix = ".".join(filter(None, (path, "adapters", inner)))
            found += [(f"{prefix}.{n}", b) for n, b in persistent_buffers(part)]
    return found
