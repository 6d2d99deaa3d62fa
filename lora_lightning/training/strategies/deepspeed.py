"""DeepSpeed, ZeRO stages 1 and 2: the optimizer's state is partitioned, the module is whole.

DeepSpeed's engine lays the parameters of each group into one flat tensor, of which every process
updates a part and keeps the optimizer's state for it. Its own checkpoints are folders of such
parts, loaded without being looked at. Here a checkpoint is that of any other strategy: the moments
of a parameter are put together from the parts (they are small) and stand under its name, so that
it is compared before anything is loaded, and goes on under every strategy and number of processes.

Under `precision="bf16-true"` the engine would round adapters together with the base. Lightning's
plugin has cast the base by then, which adapters withstand, so the engine is told nothing about it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.errors import CheckpointError, ConfigError, OptimizerError, first_few
from lora_lightning.training import _lightning
from lora_lightning.training.collectives import all_or_none
from lora_lightning.training.module_state import defines_hook, module_state
from lora_lightning.training.optimizers import check_coverage, plain_optimizer, trainable_parameters
from lora_lightning.utilities._torch import keep_scheduler_groups
from lora_lightning.utilities.is_a import is_a

_STAGES = (1, 2)
_LAYOUT = ("round_robin_bit16_groups", "round_robin_bit16_offsets", "bit16_groups_flat")
_NOT_SUPPORTED = {
    "optimizer": "define it in configure_optimizers, where adapters can be put into it",
    "scheduler": "define it in configure_optimizers, where checkpoints find its state",
    "bf16": "say Trainer(precision='bf16-true'), which leaves adapters in float32",
    "fp16": "say Trainer(precision='bf16-true'), which leaves adapters in float32",
    "torch_autocast": "say Trainer(precision='bf16-true'), which leaves adapters in float32",
}


def is_deepspeed(strategy: Strategy) -> bool:
    """Tell whether this is Lightning's DeepSpeed."""
    return is_a(strategy, "DeepSpeedStrategy")


def check_deepspeed(trainer: Trainer, configs: list[AdapterConfig]) -> None:
    """Refuse (ConfigError) what adapters are not known to train, save and resume with."""
    if is_deepspeed(trainer.strategy):
        name = type(trainer.strategy).__name__
        _check_options(trainer.strategy, name)
        _check_run(trainer, name)
        _check_adapters(configs, name)


def _check_options(strategy: Strategy, name: str) -> None:
    config: dict[str, Any] = strategy.config or {}  # type: ignore[attr-defined]
    zero = config.get("zero_optimization") or {}
    if zero.get("stage", 0) not in _STAGES:
        raise ConfigError(
            f"LoraCallback supports {name} at stages 1 and 2, not {zero.get('stage', 0)}: stage 3 "
            "takes the weights of a module apart and gathers them when that module is called, but "
            "adapters are read by the module that they sit on. strategy='fsdp' shards the frozen "
            "base as stage 3 does; strategy='ddp' is stage 0. (trainer.strategy)"
        )
    for option in ("offload_optimizer", "offload_param", "zenflow_config", "zenflow"):
        if zero.get(option):
            raise ConfigError(
                f"LoraCallback does not support {name} with {option}: what it would move to the "
                "CPU, the state of what trains, is small here. Leave it out. (trainer.strategy)"
            )
    for option, instead in _NOT_SUPPORTED.items():
        asked = config.get(option)
        off = isinstance(asked, dict) and asked.get("enabled") is False
        # Lightning itself writes some of these when the strategy is set up.
        if asked and not off and not _lightning.has_completed_config(strategy):
            raise ConfigError(
                f"LoraCallback does not support {option!r} in the config of {name}: {instead}. "
                "(trainer.strategy)"
            )


def _check_run(trainer: Trainer, name: str) -> None:
    precision = trainer.precision_plugin.precision
    if precision not in ("32-true", "bf16-true"):
        raise ConfigError(
            f"precision={precision!r} under {name} is not mixed: DeepSpeed casts every weight, "
            "adapters too. Use precision='bf16-true', which casts the base and leaves the adapters "
            "in float32, or '32-true'. (trainer.precision)"
        )
    if trainer.accumulate_grad_batches > 1:
        raise ConfigError(
            f"LoraCallback does not support accumulate_grad_batches under {name}: Lightning and "
            "DeepSpeed both divide the loss by it, so that gradients are too small, and DeepSpeed "
            "goes on accumulating across the end of an epoch. Use "
            "strategy='ddp', or larger batches. (trainer.accumulate_grad_batches)"
        )
    if not getattr(trainer.lightning_module, "automatic_optimization", True):
        raise ConfigError(
            f"LoraCallback does not support manual optimization under {name}. Use strategy='ddp'. "
            "(trainer.strategy)"
        )
    for callback in _lightning.all_callbacks(trainer):
        if is_a(callback, "WeightAveraging"):
            raise ConfigError(
                f"LoraCallback does not support {type(callback).__name__} under {name}. Take it "
                "out, or use strategy='ddp'. (trainer.callbacks)"
            )


def _check_adapters(configs: list[AdapterConfig], name: str) -> None:
    for config in configs:
        if config.peft_type == "ADALORA" or getattr(config, "init_lora_weights", None) == "eva":
            what = "AdaLoRA" if config.peft_type == "ADALORA" else "init_lora_weights='eva'"
            raise ConfigError(
                f"LoraCallback does not support {what} under {name}, which frees gradients before "
                "they can be read and reads checkpoints after ranks are chosen. Use "
                "strategy='ddp'. (trainer.strategy)"
            )


class WholeOptimizer:
    """An optimizer that ZeRO has partitioned, seen as if it had not.

    Its `param_groups` hold the module's parameters; `defaults`, `state_dict` and `load_state_dict`
    are those of `torch.optim.Optimizer`. All processes must take part in both. ConfigError if this
    version of DeepSpeed lays parameters out in another way.
    """

    def __init__(self, optimizer: Any) -> None:
        lacking = [name for name in _LAYOUT if not hasattr(optimizer, name)]
        if lacking:
            raise ConfigError(
                f"DeepSpeed's {type(optimizer).__name__} has no {first_few(lacking)}: adapters are "
                "known to work with DeepSpeed 0.19.8. (trainer.strategy)"
            )
        self.zero = optimizer
        self.inner: Optimizer = optimizer.optimizer
        self.defaults = self.inner.defaults
        self.param_groups = [
            {**group, "params": list(params)}
            for group, params in zip(
                self.inner.param_groups, optimizer.round_robin_bit16_groups, strict=True
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """State by the numbers of the parameters, each tensor whole."""
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for index, group in enumerate(self.param_groups):
            numbers = list(range(first, first + len(group["params"])))
            first += len(numbers)
            groups.append({**group, "params": numbers})
            for key, value in self.inner.state.get(self._part(index), {}).items():
                for number, whole in zip(numbers, self._whole(index, key, value), strict=True):
                    state.setdefault(number, {})[key] = whole
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this process's part of each tensor; weights are taken from the module."""
        self.zero.refresh_fp32_params()
        parts = {}
        for index, group in enumerate(saved["param_groups"]):
            states = [saved["state"].get(number, {}) for number in group["params"]]
            keys = dict.fromkeys(key for state in states for key in state)
            if keys:
                parts[index] = {k: self._split(index, [s.get(k) for s in states]) for k in keys}
        groups = [{**group, "params": [i]} for i, group in enumerate(saved["param_groups"])]
        self.inner.load_state_dict({**saved, "state": parts, "param_groups": groups})

    def _part(self, index: int) -> Tensor:
        flat: Tensor
        (flat,) = self.inner.param_groups[index]["params"]
        return flat

    def _whole(self, index: int, key: str, value: Any) -> list[Any]:
        """Gather the parts of a group's state, parameter by parameter."""
        params, part = self.param_groups[index]["params"], self._part(index)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return [value.clone() if isinstance(value, Tensor) else value for _ in params]
        if value.shape != part.shape:
            raise OptimizerError(
                f"The state {key!r} of {type(self.inner).__name__} has shape {tuple(value.shape)} "
                f"for {part.numel()} numbers that ZeRO has laid end to end: it cannot be saved by "
                "parameters. Use an optimizer that treats every number alike (AdamW, SGD)."
            )
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        flat = torch.cat(parts)
        return [
            flat[start : start + p.numel()].view(p.shape).clone()
            for p, start in zip(params, self.zero.round_robin_bit16_offsets[index], strict=True)
        ]

    def _split(self, index: int, values: list[Any]) -> Any:
        """This process's part of a group's state, from those of its parameters."""
        part = self._part(index)
        first = next(value for value in values if value is not None)
        if not isinstance(first, Tensor) or first.dim() == 0:
            if any(value is not None and value != first for value in values):
                raise CheckpointError(
                    "Tensors of one parameter group have made different numbers of steps in the "
                    "checkpoint's optimizer, which ZeRO cannot hold: there a group steps as one. "
                    "Resume under the strategy that it was trained with. (ckpt_path)"
                )
            return first.clone() if isinstance(first, Tensor) else first
        flat = torch.zeros(
            part.numel() * dist.get_world_size(), dtype=first.dtype, device=part.device
        )
        for value, start in zip(values, self.zero.round_robin_bit16_offsets[index], strict=True):
            if value is not None:  # a parameter without a gradient has no state elsewhere
                flat[start : start + value.numel()].copy_(value.flatten())
        start = part.numel() * dist.get_rank()
        return flat[start : start + part.numel()].clone()


def whole_optimizers(optimizers: list[Any]) -> list[Any]:
    """The optimizers as they hold the module's parameters, whatever ZeRO has made of them."""
    return [
        WholeOptimizer(o) if hasattr(o, "round_robin_bit16_groups") else o
        for o in map(plain_optimizer, optimizers)
    ]


# -- the overrides ---------------------------------------------------------------------------------


def setup_deepspeed(self: Strategy, module: LightningModule, model: nn.Module) -> nn.Module:
    """Set the model up without the engine's cast: the base is cast by now."""
    self.config.pop("bf16", None)  # type: ignore[attr-defined]
    if not defines_hook(module, "configure_gradient_clipping"):
        # The engine clips, and Lightning would warn that ours, which it cannot tell from one of
        # the user's, does not.
        module.__dict__.pop("configure_gradient_clipping", None)
    return _lightning.setup_model(self, model)


def setup_engine(
    self: Strategy,
    module: LightningModule,
    model: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: object = None,
) -> tuple[Any, Any]:
    """Check the optimizer in the last place where its groups are not flat, and make the engine."""
    check_coverage([optimizer], module)
    trainable = trainable_parameters(module)
    narrow = [name for name, p in trainable.items() if p.dtype is not torch.float32]
    if narrow:
        raise ConfigError(
            f"{first_few(narrow)} would train in {trainable[narrow[0]].dtype}, and under "
            f"{type(self).__name__} all that trains must be float32: leave "
            "autocast_adapter_dtype at True, and train no biases of a base in 16 bits. "
            "(lora.autocast_adapter_dtype)"
        )
    _watch_gradients(module)
    _drop_empty_groups(optimizer, lr_scheduler)
    return _lightning.setup_model_and_optimizer(self, model, optimizer, lr_scheduler)


def save_whole_checkpoint(
    self: Strategy,
    module: LightningModule,
    checkpoint: dict[str, Any],
    filepath: str | Path,
    storage_options: object = None,
) -> None:
    """Write one file by rank 0 through the CheckpointIO, as under DDP."""
    save = Strategy.save_checkpoint
    all_or_none(self, lambda: save(self, checkpoint, filepath, storage_options), filepath)


def _drop_empty_groups(optimizer: Optimizer, lr_scheduler: object) -> None:
    """Take out the groups that nothing trains in, as the engine does, from the schedule as well."""
    kept = [index for index, group in enumerate(optimizer.param_groups) if group["params"]]
    count = len(optimizer.param_groups)
    if len(kept) < count:
        optimizer.param_groups[:] = [optimizer.param_groups[index] for index in kept]
        keep_scheduler_groups(lr_scheduler, kept, count)


def _watch_gradients(module: LightningModule) -> None:
    """Note which parameters the first backward pass reaches: ZeRO frees their gradients at once."""
    reached = module_state(module).had_gradient = set()

    def watch(parameter: nn.Parameter) -> None:
        def note(_: Tensor) -> None:
            reached.add(id(parameter))
            handle.remove()

        register: Any = parameter.register_hook
        handle = register(note)

    for parameter in trainable_parameters(module).values():
        watch(parameter)


def partitioned_gradients(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """This process's part of the averaged gradients of the next step; none if not partitioned."""
    optimizer = plain_optimizer(optimizer)
    found: dict[nn.Parameter, Tensor] = {}
    for index, params in enumerate(getattr(optimizer, "params_in_partition", [])):
        grads = optimizer.averaged_gradients.get(index) or []  # type: ignore[attr-defined]
        found.update(zip(params, grads, strict=False))  # padding comes last
    return found
