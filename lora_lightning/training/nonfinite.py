"""NaN or inf in the loss or in a gradient is noticed before the step that would spread it.

Once for every optimizer step, after gradients were accumulated, reduced over the processes and
unscaled, and before clipping: the largest magnitude among losses and gradients, one fused
reduction per dtype and one number that the device is waited for. A maximum, not the 2-norm, which
overflows on large gradients that are finite.

Under a gradient scaler (16-mixed) inf gradients are normal: the scaler leaves such steps out and
lowers its scale. Only a loss that is not finite, or gradients that overflow although the scale has
come down to 1 and less, are more than it can mend.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import get_total_norm
from torch.optim import LBFGS, Optimizer

from lora_lightning.errors import ConfigError, NonfiniteError, first_few, nearest_hint
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.strategies.deepspeed import partitioned_gradients
from lora_lightning.utilities._torch import stored_values, unscales_in_step
from lora_lightning.utilities.dtensor import local_part

POLICIES = ("stop", "skip", "ignore")
MAX_IN_A_ROW = 10  # skipped steps after which nothing is left to hope for
MAX_LOSSES = 10_000  # kept for a step that has not come


class NonfiniteGuard:
    """A run's guard against losses and gradients that are not finite.

    Args:
        policy: "stop" raises before the step; "skip" drops its gradients, so that the optimizer
            changes nothing, and raises after `MAX_IN_A_ROW` in a row; "ignore" does not look.
            Any other is a ConfigError.

    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ConfigError(
                f"nonfinite={policy!r}: known are {', '.join(map(repr, POLICIES))}."
                f"{nearest_hint(str(policy), POLICIES)} (lora.nonfinite)"
            )
        self.policy = policy
        self.skipped = 0  # steps that were left out in this run, resumes included
        self.skipping = False  # True while the step that is under way is
        self._in_a_row = 0
        self._losses: list[tuple[int, Tensor]] = []  # (batch index, loss) since the last step
        self._statistics: list[tuple[Tensor, Tensor]] = []  # buffers and what they were

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a fit; ConfigError if steps of this optimizer cannot be left out."""
        self._in_a_row = 0
        self.skipping = False
        self._losses = []
        # The running statistics of trained copies of norm layers move in forward already.
        self._statistics = [
            (buffer, buffer.clone())
            for _, layer in named_adapted_layers(module)
            for copy in layer.trained_copies().values()
            for buffer in copy.buffers()
        ]
        if self.policy == "skip" and any(isinstance(o, LBFGS) for o in trainer.optimizers):
            raise ConfigError(
                "nonfinite='skip' is not possible with LBFGS, which evaluates the loss several "
                "times within one step. Use 'stop' or 'ignore'. (lora.nonfinite)"
            )

    def before_batch(self) -> None:
        """Keep the statistics as they are before the first batch of a step."""
        if self.policy != "ignore" and not self._losses:
            for buffer, kept in self._statistics:
                kept.copy_(buffer)

    def before_backward(self, trainer: Trainer, loss: Tensor) -> None:
        """Remember a loss; nothing is computed yet."""
        # A loss in float16 may have overflowed in the scaler's multiplication.
        if self.policy != "ignore" and not (_scaler(trainer) and loss.dtype is torch.float16):
            self._losses.append((trainer.fit_loop.batch_idx, loss.detach()))
        if len(self._losses) == MAX_LOSSES:
            self._losses = []
            rank_zero_warn(
                f"{MAX_LOSSES} backward passes without an optimizer step that Lightning knows of: "
                f"nonfinite={self.policy!r} looks at nothing. Under manual optimization call "
                "step() of what self.optimizers() returns. (lora.nonfinite)"
            )

    def before_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Look at all losses since the last step and at the gradients that it is about to use.

        NonfiniteError if one is not finite and that step cannot be left out.
        """
        if self.policy == "ignore":
            return
        losses, self._losses = self._losses, []
        held = [p for group in optimizer.param_groups for p in group["params"]]
        scaler = _scaler(trainer)
        # The scaler waits for the device in its own step anyway.
        scaling = scaler is not None and scaler.get_scale() > 1
        partitioned = partitioned_gradients(optimizer)
        gradients = {} if scaling else {p: _local(p.grad) for p in held if p.grad is not None}
        gradients.update(partitioned)
        looked_at = [*(loss for _, loss in losses), *gradients.values()]
        # A process may hold no row of a small sharded tensor; of nothing there is no maximum.
        largest = get_total_norm([values for values in looked_at if values.numel()], torch.inf)
        found: Any = (~largest.isfinite()).float().to(trainer.strategy.root_device)
        # Losses differ between processes; all of them have to do the same.
        self.skipping = bool(trainer.strategy.reduce(found, reduce_op="max"))
        if not self.skipping:
            self._in_a_row = 0
            return
        for buffer, kept in self._statistics:
            buffer.copy_(kept)
        self._in_a_row += 1
        what = _describe(trainer, module, losses, gradients)
        if self.policy == "stop" or self._in_a_row == MAX_IN_A_ROW:
            raise NonfiniteError(self._advice(trainer, module, what, optimizer))
        self.skipped += 1
        if str(self.skipped).strip("0") == "1":  # 1, 10, 100, ...
            rank_zero_warn(f"{what} This step is left out, number {self.skipped} of this run.")
        for gradient in partitioned.values():  # DeepSpeed leaves such steps out by itself
            gradient.fill_(torch.nan)
        if scaler is not None and unscales_in_step(optimizer):
            for p in held:  # it unscales in its step: the scaler has to find this, and skips
                if p.grad is not None:
                    p.grad.fill_(torch.nan)
        else:
            for p in held:  # without a gradient, optimizers leave a tensor and its state alone
                p.grad = None

    def finish(self) -> list[str]:
        """End the fit; returns the line that says what was left out."""
        self._losses, self._statistics = [], []
        if not self.skipped:
            return []
        return [
            f"{self.skipped} optimizer steps were left out, as the loss or a gradient was not "
            "finite (lora.nonfinite)"
        ]

    def _advice(
        self, trainer: Trainer, module: LightningModule, what: str, optimizer: Optimizer
    ) -> str:
        broken = [n for n, p in named_parameters(module) if not _is_finite(_local(p.detach()))]
        callback: Any = trainer.checkpoint_callback
        last = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        if broken:
            state = (
                f"Weights are not finite already: {first_few(broken, 3)}. The update before was "
                "too large, or they came so."
            )
        elif isinstance(optimizer, LBFGS):
            state = "LBFGS was within a step: weights are those that it was trying."
        else:
            state = "The step was not made: weights and optimizer are as they were before it."
        where, init_from = (repr(last), repr(last)) if last else ("a checkpoint", "...")
        if self.policy == "skip":
            forward = f"{MAX_IN_A_ROW} steps in a row were not finite: skipping does not help."
        else:
            forward = "LoraCallback(nonfinite='skip') leaves such steps out."
        return (
            f"{what} {state} To go on, resume from {where} with gradients clipped "
            "(Trainer(gradient_clip_val=1.0)), or take the bad record out of that batch. A lower "
            "learning rate takes a new run from these adapters, without ckpt_path: "
            f"LoraCallback(init_from={init_from}). Trainer(detect_anomaly=True) names the "
            f"operation. {forward} (lora.nonfinite)"
        )


def check_same_policy(policies: dict[str, str]) -> None:
    """Raise ConfigError if policies differ: a step is left out for all adapters or for none."""
    if len(set(policies.values())) > 1:
        listed = ", ".join(f"{policy!r} for adapter {n!r}" for n, policy in policies.items())
        raise ConfigError(
            f"The LoraCallbacks of this Trainer differ in nonfinite: {listed}. A step is made or "
            "left out as a whole; give all of them the same. (lora.nonfinite)"
        )


def _describe(
    trainer: Trainer,
    module: LightningModule,
    losses: list[tuple[int, Tensor]],
    gradients: dict[nn.Parameter, Tensor],
) -> str:
    """Step, epoch, batch, values and names: read tensor by tensor, as the run is at its end."""
    bad = [(index, loss) for index, loss in losses if not _is_finite(loss)]
    batches = sorted({index for index, _ in bad or losses} or {trainer.fit_loop.batch_idx})
    where = "batch " + " and ".join(dict.fromkeys(map(str, (batches[0], batches[-1]))))
    parts = [f"the loss is {_value(loss)}" for _, loss in bad[:1]]
    names = {id(p): name for name, p in named_parameters(module)}
    broken = [(names.get(id(p), "?"), g) for p, g in gradients.items() if not _is_finite(g)]
    if broken:
        listed = first_few([f"{name} ({_value(grad)})" for name, grad in broken], 3)
        parts.append(f"{len(broken)} of {len(gradients)} gradients are not finite: {listed}")
    return (
        f"At global_step={trainer.global_step}, epoch {trainer.current_epoch}, {where}: "
        f"{'; '.join(parts) or 'another process has a loss or gradient that is not finite'}."
    )


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _value(tensor: Tensor) -> str:
    return "nan" if tensor.isnan().any() else "inf" if (tensor == torch.inf).any() else "-inf"


def _local(tensor: Tensor) -> Tensor:
    """The values that this process holds of a gradient: its shard, or a sparse one's rows."""
    return stored_values(local_part(tensor))


def _scaler(trainer: Trainer) -> GradScaler | None:
    scaler: GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None
