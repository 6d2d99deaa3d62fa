"""Callbacks that watch a run of an examination."""

from __future__ import annotations

from functools import wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.checkpoint.fingerprint import digest
from lora_lightning.examination.state import own_tensors, tensors
from lora_lightning.training.optimizers import is_left_out


class GradientProbe(Callback):
    """Which trained parameter ever had a gradient other than zero."""

    def __init__(self) -> None:
        self.reached: dict[str, bool] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at all gradients."""
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and not is_left_out(parameter):
                gradient = parameter.grad
                reached = gradient is not None and bool(gradient.count_nonzero())
                self.reached[name] = reached or self.reached.get(name, False)


class OptimizerProbe(Callback):
    """What the optimizers hold when training starts, beside what requires gradients."""

    def __init__(self) -> None:
        self.twice: list[str] = []
        self.missing: list[str] = []
        self.more: list[str] = []
        self.held: list[str] = []
        self.left_out: list[str] = []
        self.at_start: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take them down by name, and every tensor as it is then."""
        self.at_start = tensors(pl_module)
        names = {id(p): name for name, p in pl_module.named_parameters()}
        trains = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
        self.left_out = sorted(name for name, p in trains.items() if is_left_out(p))
        trained = trains.keys() - {*self.left_out}
        held: set[str] = set()
        for optimizer in trainer.optimizers:
            here = [
                names.get(id(parameter), f"one of shape {list(parameter.shape)}")
                for group in optimizer.param_groups
                for parameter in group["params"]
            ]
            self.twice += [name for name in {*here} if here.count(name) > 1]
            held |= {*here}
        self.held = sorted(held)
        self.missing, self.more = sorted(trained - held), sorted(held - trained)


class MoveProbe(Callback):
    """What a module moves by itself: all that changes between two steps of its optimizers.

    That is an EMA, a mask, a norm that is restored, the statistics of a BatchNorm.
    """

    def __init__(self) -> None:
        self.moved: set[str] = set()
        self.untouched: dict[str, Tensor] = {}
        self._before: dict[str, str] = {}
        self._module: nn.Module = nn.Module()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy every tensor of the module as it was built, and begin to watch."""
        self.untouched = tensors(pl_module)
        self._module, self._before = pl_module, _digests(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with what was built: a sanity check may have moved it. Watch the optimizers."""
        self.compare()
        for optimizer in trainer.optimizers:
            self._watch(optimizer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Compare with what the step before left."""
        self.compare()

    def compare(self) -> None:
        """Take down what has moved."""
        now = _digests(self._module)
        self.moved |= {name for name in now if now[name] != self._before.get(name)}
        self._before = now

    def _watch(self, optimizer: Any) -> None:
        step = optimizer.step

        @wraps(step)  # not by a hook, which wrappers of optimizers do not take
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self._before = _digests(self._module)
            return result

        optimizer.step = watched


def _digests(module: nn.Module) -> dict[str, str]:
    return {name: digest(tensor, limit=None) for name, tensor in own_tensors(module).items()}
