"""AdaLoRA's rank allocation: importance of triplets, budget, masks.

For every number w of A, E and B, after each optimizer step,

    I = |w * dL/dw|;   I_mean <- beta1 I_mean + (1 - beta1) I;
    U_mean <- beta2 U_mean + (1 - beta2) |I - I_mean|;   s(w) = I_mean * U_mean,

and the importance of triplet i is s(E_i) + mean_j s(A_ij) + mean_j s(B_ji). Those of all modules
compete: the b(t) most important ones stay, the E of the others is set to zero, with

    b(t) = target + (initial - target) * (1 - (t - tinit) / (total_step - tfinal - tinit))^3.

Without Lightning:

    allocator = RankAllocator(adalora_adapters(model), config, total_step=1000)
    for batch in batches:
        loss(model, batch).backward()
        allocator.add_orthogonality()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()

Source: Zhang et al. 2023 (arXiv:2303.10512), equations 6 to 10; the order of events is that of PEFT
0.21.2, with t = 1 after the first optimizer step.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.adalora import AdaLoraAdapter, AdaLoraConfig
from lora_lightning.engine.injection import adapters_named
from lora_lightning.errors import AdapterMismatchError, ConfigError
from lora_lightning.utilities.autocast import without_autocast
from lora_lightning.utilities.dtensor import distribute_like, full_tensor

_TENSORS = ("lora_A", "lora_E", "lora_B")


class RankAllocator:
    """Schedule by which the ranks of AdaLoRA adapters fall to `target_r` each in the mean.

    Args:
        adapters: They, by path.
        config: Their schedule.
        total_step: Optimizer steps of the run, where the config does not say.

    Attributes:
        steps: Optimizer steps so far.
        settled: Whether the ranks are final.
        masks: Which triplets of each adapter were left by the last allocation; (r,) booleans.

    Raises:
        ConfigError: If nobody says how many steps the run has.

    """

    def __init__(
        self,
        adapters: Mapping[str, AdaLoraAdapter],
        config: AdaLoraConfig,
        total_step: int | None = None,
    ) -> None:
        total = config.total_step or total_step
        if total is None:
            raise ConfigError(
                "total_step is not set, and the budget of ranks cannot fall along a curve whose "
                "end is not known. Give the number of optimizer steps of the run. (lora.total_step)"
            )
        self.adapters = dict(adapters)
        self.config = config
        self.total_step = total
        self.steps = 0
        self.settled = False
        self.masks: dict[str, Tensor] = {}
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    # -- the schedule ----------------------------------------------------------------------------

    @property
    def last_step(self) -> int:
        """The step at which ranks become final."""
        return self.total_step - self.config.tfinal

    @property
    def initial_budget(self) -> int:
        """Total rank at the start."""
        return sum(adapter.r for adapter in self.adapters.values())

    @property
    def target_budget(self) -> int:
        """Total rank at the end; of adapters that are smaller already, what they have."""
        return min(self.config.target_r * len(self.adapters), self.initial_budget)

    def budget(self, step: int) -> int:
        """Total rank that is allowed after `step` optimizer steps."""
        tinit = self.config.tinit
        if step <= tinit:
            return self.initial_budget
        if step >= self.last_step:
            return self.target_budget
        left = 1 - (step - tinit) / (self.last_step - tinit)
        return int((self.initial_budget - self.target_budget) * left**3 + self.target_budget)

    def step(self) -> None:
        """After `optimizer.step()`, before gradients are zeroed: measure, and allocate if due."""
        self.measure()
        self.advance()

    @torch.no_grad()
    def measure(self, among: Container[int] | None = None) -> None:
        """Take the gradients of the last step into the importance; only those of ids `among`."""
        named = {key: p for key, p in self._named_tensors() if among is None or id(p) in among}
        # The scores of the step before decide the last allocation, as in PEFT.
        over = self.steps + 1 >= self.last_step and bool(self.sensitivity)
        if self.settled or over or all(p.grad is None for p in named.values()):
            return
        for key, p in named.items():
            weight = full_tensor(p)  # every process measures all of it
            if key not in self.sensitivity:
                self.sensitivity[key] = torch.zeros_like(weight)
                self.uncertainty[key] = torch.zeros_like(weight)
            mean, deviation = self.sensitivity[key], self.uncertainty[key]
            grad = torch.zeros_like(weight) if p.grad is None else full_tensor(p.grad)
            now = (weight * grad).abs()
            mean.mul_(self.config.beta1).add_(now, alpha=1 - self.config.beta1)
            deviation.mul_(self.config.beta2)
            deviation.add_((now - mean).abs(), alpha=1 - self.config.beta2)

    def advance(self) -> None:
        """Count a step; allocate where the schedule says so, keep to the masks once final."""
        self.steps += 1
        if self.settled:
            self.mask()
        elif not self.sensitivity:  # no step was made yet: a gradient scaler left them out
            return
        elif self.steps >= self.last_step:
            self._allocate(self.target_budget)
            self.settled = True
            self.sensitivity, self.uncertainty = {}, {}
        elif self.steps > self.config.tinit and self.steps % self.config.deltaT == 0:
            self._allocate(self.budget(self.steps))

    @torch.no_grad()
    def mask(self) -> None:
        """Set E to zero where the last allocation left nothing."""
        for path, mask in self.masks.items():
            e = self.adapters[path].lora_E
            e.masked_fill_(distribute_like(~mask.to(e.device).view(-1, 1), e), 0)

    def _allocate(self, budget: int) -> None:
        scores = {path: self._importance(path) for path in self.adapters}
        device = next(iter(scores.values())).device
        ranked = torch.cat([score.to(device) for score in scores.values()])
        kept = torch.zeros_like(ranked, dtype=torch.bool)
        kept[ranked.argsort(descending=True, stable=True)[:budget]] = True
        sizes = [len(score) for score in scores.values()]
        self.masks = dict(zip(scores, torch.split(kept, sizes), strict=True))
        self.mask()

    def _importance(self, path: str) -> Tensor:
        """Importance of each triplet of one adapter, (r,)."""
        keys = [f"{path}.{name}" for name in _TENSORS]
        if not self.sensitivity.keys() >= {*keys}:  # it has never been stepped
            return torch.zeros_like(full_tensor(self.adapters[path].lora_E.detach())).flatten()
        a, e, b = (self.sensitivity[key] * self.uncertainty[key] for key in keys)
        return e.flatten() + a.mean(1) + b.mean(0)

    def _named_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, adapter in self.adapters.items():
            for name in _TENSORS:
                yield f"{path}.{name}", getattr(adapter, name)

    # -- orthogonality ---------------------------------------------------------------------------

    @torch.no_grad()
    def add_orthogonality(
        self, among: Container[int] | None = None, grad_scale: float = 1.0
    ) -> None:
        """Add to the gradients that of orth_reg_weight * mean(|A A^T - I|, |B^T B - I|).

        The mean is over all A and B, |.| the Frobenius norm, whose gradient is
        2 (A A^T - I) A / |A A^T - I|. Nothing is added where the loss has given no gradients: a
        batch that was skipped.

        Args:
            among: Only for tensors with these ids. Default: for all.
            grad_scale: What the gradients are multiplied by (a gradient scaler's factor).

        """
        named = [(key, p) for key, p in self._named_tensors() if among is None or id(p) in among]
        if all(p.grad is None for _, p in named):
            return
        factor = self.config.orth_reg_weight * grad_scale / (2 * len(self.adapters))
        for key, p in named:
            if key.endswith("lora_E") or not p.requires_grad or not factor:
                continue
            # Lightning's manual optimization steps inside of autocast, which would narrow this.
            with without_autocast(p):
                rows = full_tensor(p) if key.endswith("lora_A") else full_tensor(p).T
                excess = rows @ rows.T - torch.eye(len(rows), dtype=p.dtype, device=p.device)
                grad = excess @ rows
                grad *= 2 * factor / excess.norm().clamp_min(torch.finfo(p.dtype).tiny)
            grad = distribute_like((grad if key.endswith("lora_A") else grad.T).contiguous(), p)
            p.grad = grad if p.grad is None else p.grad.add_(grad)

    # -- the state -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """State that a resumed run needs, as plain values and the allocator's own tensors."""
        return {
            "steps": self.steps,
            "total_step": self.total_step,
            "settled": self.settled,
            "masks": dict(self.masks),
            "sensitivity": dict(self.sensitivity),
            "uncertainty": dict(self.uncertainty),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` left off, but with the own schedule.

        Raises:
            AdapterMismatchError: If it is of other adapters. Nothing is changed then.

        """
        tensors = dict(self._named_tensors())
        values = {path: adapter.lora_E.flatten() for path, adapter in self.adapters.items()}
        for part, own in (("masks", values), ("sensitivity", tensors), ("uncertainty", tensors)):
            for key, saved in state[part].items():
                if key not in own or own[key].shape != saved.shape:
                    raise AdapterMismatchError(
                        f"This rank allocation is of other adapters: it has {part} of shape "
                        f"{tuple(saved.shape)} for {key!r}."
                    )
        self.steps, self.settled = int(state["steps"]), bool(state["settled"])
        self.masks = {path: mask.to(values[path].device) for path, mask in state["masks"].items()}
        self.sensitivity, self.uncertainty = (
            {
                k: saved.to(tensors[k].device, tensors[k].dtype, copy=True)
                for k, saved in state[part].items()
            }
            for part in ("sensitivity", "uncertainty")
        )


def adalora_adapters(model: nn.Module, adapter_name: str = "default") -> dict[str, AdaLoraAdapter]:
    """The AdaLoRA adapters of that name, by path; of a module of several weights, one for each."""
    return {
        f"{path}.{inner}" if inner else path: part
        for path, adapter in adapters_named(model, adapter_name).items()
        for inner, part in adapter.named_modules()
        if isinstance(part, AdaLoraAdapter)
    }


def rank_pattern(model: nn.Module, adapter_name: str = "default") -> dict[str, list[bool]]:
    """Masks of the triplets that act, by name: {"encoder.query.lora_E": [True, False, ...]}.

    Empty where all do, or none has begun to.
    """
    adapters = adalora_adapters(model, adapter_name)
    begun = any(adapter.lora_E.any() for adapter in adapters.values())
    pattern = {}
    for path, adapter in adapters.items():
        acts = iter((adapter.lora_E != 0).flatten().tolist())
        pattern[f"{path}.lora_E"] = [
            there and (bool(next(acts)) or not begun) for there in adapter.triplets
        ]
    return {} if all(all(mask) for mask in pattern.values()) else pattern
