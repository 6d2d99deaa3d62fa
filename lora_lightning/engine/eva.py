"""EVA: start A with the directions in which the layers' inputs vary most, measured on the data.

For every adapted layer, the principal components of its inputs over the first batches are found
incrementally; A starts with the leading ones and B with zero. The ranks are shared out anew: of all
components of all layers, those that explain the largest part of their layer's variance are taken,
as many as there were ranks, at most rho * r for one layer. A layer that gets none is left out.

Source: Paischer et al. 2024, "One Initialization to Rule them All" (arXiv:2410.07170), algorithm 1;
incremental components: Ross et al. 2008, "Incremental Learning for Robust Visual Tracking".
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.config import SELECTION, pattern_value
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.init_weights import EvaConfig
from lora_lightning.engine.targets.selection import select_modules
from lora_lightning.errors import ConfigError, first_few
from lora_lightning.layers.parametrized import value


class PrincipalComponents:
    """The leading principal components of rows that come in batches.

    Shapes:
        components (k, features), rows of unit length; singular_values (k).

    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.count = 0
        self.total = 0.0  # sum of squared distances from the mean
        self.mean = self.components = self.singular_values = torch.empty(0)  # until an update
        self.converged = torch.zeros(k, dtype=torch.bool)

    def update(self, rows: Tensor, tau: float) -> None:
        """Take in a batch of rows (n, features), n >= k."""
        rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        mean = rows.mean(0)
        centred = rows - mean
        seen_before, previous = self.count > 0, self.components
        n = rows.shape[0]
        self.total += float(centred.square().sum())
        if not seen_before:
            stack, self.mean = centred, mean
        else:
            shift = self.mean - mean
            weight = self.count * n / (self.count + n)
            self.total += weight * float(shift.square().sum())
            seen = self.singular_values[:, None] * previous
            stack = torch.cat([seen, centred, weight**0.5 * shift[None]])
            self.mean = (self.count * self.mean + n * mean) / (self.count + n)
        self.count += n
        _, values, vectors = torch.linalg.svd(stack, full_matrices=False)
        vectors, self.singular_values = vectors[: self.k], values[: self.k]
        largest = vectors.abs().argmax(1, keepdim=True)  # the sign is a convention: make it one
        self.components = vectors * vectors.gather(1, largest).sign()
        if seen_before:
            self.converged = torch.cosine_similarity(self.components, previous).cpu() >= tau

    def explained(self) -> Tensor:
        """The part of the variance along each component."""
        return (self.singular_values.double().square() / max(self.total, 1e-30)).cpu()


# The options in which the config that `eva_start` gives differs from the one that it was given.
FOUND = (*SELECTION, "rank_pattern", "alpha_pattern")


def eva_start(
    model: nn.Module, config: LoraConfig, batches: Iterable[Any], forward: Callable[[Any], Any]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Ranks and start values of A from what goes through `model`.

    Args:
        model: The model without this adapter.
        config: What is asked for; `eva_config` has the options.
        batches: The first batches of the training data.
        forward: Runs the model on one of them.

    Returns:
        (`config` with the ranks that were found as patterns, A (r, in) by module path).

    Raises:
        ConfigError: If a target is no linear map, or the batches are too small or too few.

    """
    options = config.eva_config or EvaConfig()
    targets = select_modules(model, config).targets
    ranks = {path: _rank(config, path, module) for path, module in targets.items()}
    found = _components(model, targets, ranks, options, batches, forward)
    explained = {path: c.explained() for path, c in found.items()}
    budget = sum(ranks.values())
    candidates = [(value, path) for path in ranks for value in explained[path].tolist()]
    candidates.sort(key=lambda pair: -pair[0])
    shares = Counter(path for _, path in candidates[:budget])
    start, rank_pattern, alpha_pattern = {}, {}, {}
    for path, r in ranks.items():
        share = shares[path]
        if not share:
            continue
        components, values = found[path].components, found[path].singular_values
        a = components[:share]
        start[path] = a / values[:share, None].sqrt() if options.whiten else a
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        if options.adjust_scaling_factors:
            factor = share / r
            alpha *= factor**0.5 if config.use_rslora else factor
        key = "^" + re.escape(path)
        if share != config.r:
            rank_pattern[key] = share
        if alpha != config.lora_alpha:
            alpha_pattern[key] = alpha
    changes: dict[str, Any] = {
        **dict.fromkeys(SELECTION),
        # No list: a whole path as a name also selects every longer one that ends with it.
        "target_modules": "|".join(re.escape(path) for path in sorted(start)),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    return dataclasses.replace(config, **changes), start


def _rank(config: LoraConfig, path: str, module: nn.Module) -> int:
    """The rank that is asked for, which a default lowers to what a small layer has."""
    named: int | None = pattern_value(config.rank_pattern, path, None)
    if named is None and config.names_no_module:
        return min(config.r, *_sizes(path, module))
    return config.r if named is None else named


@torch.no_grad()
def _components(
    model: nn.Module,
    targets: dict[str, nn.Module],
    ranks: dict[str, int],
    options: EvaConfig,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> dict[str, PrincipalComponents]:
    largest = {
        path: min(round(r * options.rho), *_sizes(path, targets[path])) for path, r in ranks.items()
    }
    inputs = _Inputs(largest, options)
    handles = [
        module.register_forward_pre_hook(partial(inputs.take, path), with_kwargs=True)
        for path, module in targets.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in islice(batches, options.max_batches):
            inputs.expect(batch)
            forward(batch)
            if all(bool(c.converged.all()) for c in inputs.components.values()):
                break
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    empty = [path for path, c in inputs.components.items() if not c.count]
    if empty:
        raise ConfigError(
            f"EVA saw no batch with enough rows for {first_few(empty, 3)}: a batch must bring at "
            f"least rho * r = {max(largest.values())} rows (examples times positions) to a layer, "
            "and the layer must be called. Take larger batches or a lower rho or r. "
            "(lora.eva_config)"
        )
    return inputs.components


class _Inputs:
    """The principal components of what goes into each layer; those that read one tensor share."""

    def __init__(self, sizes: dict[str, int], options: EvaConfig) -> None:
        self.options = options
        self.components = {path: PrincipalComponents(k) for path, k in sizes.items()}
        self.expect(None)

    def expect(self, batch: Any) -> None:
        """Begin with another batch."""
        self.batch = batch
        self._seen: dict[tuple[int, int], PrincipalComponents] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of one of this batch

    def take(self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in what the layer at `path` is called with, as a forward pre-hook."""
        x = next(iter((*args, *kwargs.values())))  # a linear map has one input
        own = self.components[path]
        key = (id(x), own.k)
        self._alive.append(x)
        if key in self._seen:
            self.components[path] = self._seen[key]
            return
        self._seen[key] = own
        rows = _rows(x, self.batch, self.options)
        if rows.shape[0] >= own.k:
            own.update(rows, self.options.tau)


def _sizes(path: str, module: nn.Module) -> tuple[int, int]:
    features = getattr(module, "in_features", getattr(module, "nf", None))
    weight = value(module, "weight")
    if features is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ConfigError(
            f"init_lora_weights='eva' is defined for linear maps, but {path!r} is a "
            f"{type(module).__name__}. Leave it out (lora.exclude_modules). "
            "(lora.init_lora_weights)"
        )
    height, width = weight.shape
    return height, width


def _rows(x: Tensor, batch: Any, options: EvaConfig) -> Tensor:
    """The positions of x (..., features) that count, as rows."""
    mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if isinstance(batch, Mapping):
        attention, labels = batch.get("attention_mask"), batch.get("labels")
        if isinstance(attention, Tensor) and attention.shape == mask.shape:
            mask &= attention.bool().to(x.device)
        if options.use_label_mask and isinstance(labels, Tensor) and labels.shape == mask.shape:
            mask &= labels.to(x.device) != options.label_mask_value
    return x[mask]
