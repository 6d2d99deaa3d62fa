"""Validation without and with the adapters, side by side: did they help?"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from rich.table import Table

from lora_lightning.engine.switching import adapter_names, disable_adapter
from lora_lightning.errors import ConfigError, first_few
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.training import _lightning, messages
from lora_lightning.training.module_state import callbacks_of, module_state
from lora_lightning.utilities.rng import random_state, seed_all, set_random_state

# Word error rate as a word: "answer_accuracy" has its letters, too.
_SMALLER_IS_BETTER = re.compile(r"loss|perplexity|error|nll|mse|mae|(?<![a-z])wer(?![a-z])")
_LARGER_IS_BETTER = re.compile(r"acc|f1|auc|bleu|rouge")
# What may lie between 0 and 1 and is no share, so that its change is no number of points.
_NO_SHARE = re.compile(r"loss|perplexity|nll|mse|mae|entropy|divergence|distance")


@dataclass(frozen=True)
class Comparison:
    """Metrics of the validation data with the adapters off and on.

    Attributes:
        base: Metrics of the base alone, by name.
        tuned: Metrics with the adapters.
        headline: The metric that decides: what a ModelCheckpoint monitors, else `val_loss`, else
            the first loss, else the first metric.
        mode: Whether a small ("min") or large ("max") headline is good; None: not known.
        standard_error: Of the headline's difference (tuned - base), from the differences of
            single batches; None: fewer than four batches, or they were in other processes.
        title: What was compared.
        copies: Modules that train as a whole (`modules_to_save`); the base has their original.
        new: Those of them that no file had weights for: the base's are random.
    """

    base: dict[str, float]
    tuned: dict[str, float]
    headline: str
    mode: str | None = None
    standard_error: float | None = None
    title: str = "base and tuned"
    copies: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def helped(self) -> bool | None:
        """True if the headline improved by more than twice its standard error; None: not known."""
        change = self.tuned[self.headline] - self.base[self.headline]
        if self.mode is None or not math.isfinite(change) or abs(change) <= self._margin:
            return None
        return (change < 0) == (self.mode == "min")

    @property
    def verdict(self) -> str:
        """One sentence."""
        base, tuned = self.base[self.headline], self.tuned[self.headline]
        change = tuned - base
        if _is_share(self.headline, base, tuned):
            size = f"{100 * abs(change):.1f} points"
            margin = "" if self.standard_error is None else f" +- {100 * self._margin:.1f}"
        else:
            size = _percent(abs(change), base) or f"{abs(change):.4g}"
            margin = f" +- {_percent(self._margin, base) or f'{self._margin:.4g}'}"
            margin = "" if self.standard_error is None else margin
        if not math.isfinite(change):
            return f"{self.headline} is not finite: {base:.4g} before, {tuned:.4g} after"
        if change == 0:
            return f"the adapter changes nothing: {self.headline} stays {base:.4g}"
        if abs(change) <= self._margin:
            return f"no clear difference: {self.headline} changes by {size}{margin}"
        verb = "lowers" if change < 0 else "raises"
        worse = ", which is worse" if self.helped is False else ""
        ends = f" ({base:.3f} -> {tuned:.3f})" if _is_share(self.headline, base, tuned) else ""
        return f"the adapter {verb} {self.headline} by {size}{margin}{ends}{worse}"

    @property
    def _margin(self) -> float:
        return 2 * (self.standard_error or 0.0)

    def table(self) -> Table:
        """Metric, base, tuned, change."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("metric")
        for column in ("base", "tuned", "change"):
            table.add_column(column, justify="right")
        for name in [n for n in self.tuned if n in self.base]:
            base, tuned = self.base[name], self.tuned[name]
            if _is_share(name, base, tuned):
                change = f"{100 * (tuned - base):+.1f} points"
            else:
                relative = _percent(tuned - base, base, signed=True)
                change = f"{tuned - base:+.4g}" + (f" ({relative})" if relative else "")
            table.add_row(name, f"{base:.4g}", f"{tuned:.4g}", change)
        return table

    def lines(self) -> list[Table | str]:
        """The table, what to know of it, and the verdict."""
        known = [path for path in self.copies if path not in self.new]
        notes = [
            f"base: its {first_few(self.new)} is new and untrained, so its row is chance"
            for _ in self.new[:1]
        ] + [
            f"base: with {first_few(known)} (modules_to_save) as before training, which is "
            "random where it was newly initialised"
            for _ in known[:1]
        ]
        return [self.table(), *notes, self.verdict]

    def show(self) -> None:
        """Print `lines`."""
        messages.show(*self.lines())


def compare_with_base(
    trainer: Trainer, module: LightningModule | None = None, data: Any = None
) -> Comparison:
    """Validate twice, with all adapters disabled and as they are, on the same data.

        trainer.fit(module, data)
        compare_with_base(trainer).show()

    It works with every LightningModule that has a `validation_step`; all metrics it logs are
    compared. Compared are the weights in memory. Both passes start from the same random state,
    which is restored afterwards. Loggers see nothing of the two passes, then `base/<metric>` and
    `tuned/<metric>` once (not where the Trainer starts processes for each call: spawn and fork).
    `trainer.callback_metrics` are those of the second pass.

    Args:
        trainer: A Trainer; every process of the run has to call.
        module: Default: that of the Trainer's last run.
        data: A data module or validation loaders. Default: those of the Trainer's last fit, unless
            it started processes of its own for it.

    Raises:
        ConfigError: If there is nothing to compare: no adapter, no `validation_step`, no validation
            data, or nothing that it logs.
    """
    module = module or trainer.lightning_module
    data = check_comparable(trainer, module, data)
    loggers, state = trainer.loggers, random_state()
    seed = int(torch.randint(2**62, ()))
    passes = _Pass(seed, disabled=True), _Pass(seed, disabled=False)
    trainer.loggers = [_Silent(logger.save_dir) for logger in loggers]
    try:
        base, tuned = (_validated(trainer, module, data, one) for one in passes)
    finally:
        trainer.loggers = loggers
        set_random_state(state)
    if not base.keys() & tuned.keys():
        raise ConfigError(
            "the validation data are empty, or nothing is logged of them, so base and adapter "
            "cannot be compared. (data.val)"
        )
    headline, mode = _headline(trainer, list(tuned))
    error = _standard_error(*(one.values.get(headline, []) for one in passes))
    step = f" (step {trainer.global_step})" if trainer.global_step else ""
    copies = [path for path, layer in named_adapted_layers(module) if layer.trained_copies()]
    new_names = module_state(module).new_names
    comparison = Comparison(
        base,
        tuned,
        headline,
        mode,
        # Every process has a share of the batches.
        standard_error=None if error is None else error / math.sqrt(trainer.world_size),
        title=f"validation without and with the adapter, weights in memory{step}",
        copies=copies,
        new=[path for path in copies if any(n.startswith(f"{path}.") for n in new_names)],
    )
    if not _lightning.starts_processes(trainer.strategy.launcher):
        _log(trainer, comparison)
    return comparison


def _validated(trainer: Any, module: LightningModule, data: Any, one: _Pass) -> dict[str, float]:
    trainer.callbacks.insert(0, one)
    try:
        with warnings.catch_warnings():
            # That examples may count twice to fill the last batches: in both passes then.
            warnings.filterwarnings("ignore", message="Using `DistributedSampler`")
            outputs = trainer.validate(module, data, verbose=False)
    finally:
        trainer.callbacks.remove(one)
    return {name: float(value) for output in outputs for name, value in output.items()}


class _Silent(DummyLogger):
    """Takes everything and keeps nothing; callbacks may still ask where logs are."""

    def __init__(self, save_dir: str | None) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    def __reduce__(self) -> Any:  # DummyLogger's answers to pickle's questions cannot be pickled
        return type(self), (self._save_dir,)


class _Pass(Callback):
    """One of the two validations: from a random state of its own, and what single batches say."""

    def __init__(self, seed: int, disabled: bool) -> None:
        self.seed = seed
        self.disabled = disabled
        self.values: dict[str, list[tuple[float, float]]] = {}  # value, weight of each batch
        self._sums: dict[str, tuple[float, float]] = {}
        self._off: AbstractContextManager[None] | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_all(self.seed)
        if self.disabled:
            if not adapter_names(pl_module):
                raise ConfigError(f"{type(pl_module).__name__} has no adapter to compare. (lora)")
            self._off = disable_adapter(pl_module)
            with torch.inference_mode(False):
                self._off.__enter__()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        for key, result in _lightning.logged_results(trainer).items():
            if result.is_tensor:
                if not (result.meta.is_mean_reduction and result.meta.on_epoch):
                    continue
                total = float(result.value), float(result.cumulated_batch_size)
                before = self._sums.get(key, (0.0, 0.0))
                self._sums[key] = total
                weight = total[1] - before[1]
                value = (total[0] - before[0]) / weight if weight else None
            else:
                value, weight = _lightning.last_value(result), 1.0
            if isinstance(value, (float, torch.Tensor)):
                self._note(result.meta.name, value, weight)
        if isinstance(outputs, Mapping) and {"loss", "weight"} <= outputs.keys():
            self._note("val_loss", outputs["loss"], outputs["weight"])

    def _note(self, name: str, value: Any, weight: Any) -> None:
        self.values.setdefault(name, []).append((float(value), float(weight)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        off, self._off = self._off, None
        if off is not None:
            with torch.inference_mode(False):
                off.__exit__(None, None, None)


def check_comparable(trainer: Any, module: LightningModule | None, data: Any) -> Any:
    """The validation data, None where the module itself has them.

    Raises:
        ConfigError: If there is no adapter, or nothing to validate.

    """
    if module is None:
        raise ConfigError("give a module: this Trainer has run none. (module)")
    if not adapter_names(module) and not callbacks_of(module):
        raise ConfigError(
            f"{type(module).__name__} has no adapter to compare with its base. (lora)"
        )
    return validation_data(trainer, module, data)


def validation_data(trainer: Any, module: LightningModule, data: Any) -> Any:
    """The validation data, None where the module itself has them.

    Raises:
        ConfigError: If there is nothing to validate.

    """
    if not _defines(module, "validation_step"):
        name = type(module).__name__
        raise ConfigError(f"{name} has no validation_step to compare with its base by. (model)")
    if trainer.limit_val_batches == 0:
        raise ConfigError("the validation data are left out. (trainer.limit_val_batches)")
    if data is None:
        data = trainer.datamodule or _lightning.given_validation_data(trainer)
    owner = module if data is None else data
    if hasattr(owner, "val_dataloader") and not _defines(owner, "val_dataloader"):
        raise ConfigError(
            "there are no validation data to compare base and adapter by. (data.val; from Python "
            "the argument `data`)"
        )
    return data


def _defines(owner: Any, hook: str) -> bool:
    """True if a module or data module has a hook of its own, rather than Lightning's."""
    home = str(getattr(owner, hook).__module__)
    return not home.startswith(("lightning.pytorch.core.", "pytorch_lightning.core."))


def _headline(trainer: Any, names: list[str]) -> tuple[str, str | None]:
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None) in names:
            return callback.monitor, callback.mode
    losses = [name for name in names if "loss" in name]
    chosen = "val_loss" if "val_loss" in names else (losses or names)[0]
    if _SMALLER_IS_BETTER.search(chosen.lower()):
        return chosen, "min"
    return chosen, "max" if _LARGER_IS_BETTER.search(chosen.lower()) else None


def _standard_error(
    base: list[tuple[float, float]], tuned: list[tuple[float, float]]
) -> float | None:
    """Standard error of the weighted mean of paired differences."""
    if len(base) != len(tuned) or len(base) < 4:
        return None
    weights = [weight for _, weight in tuned]
    differences = [t - b for (b, _), (t, _) in zip(base, tuned, strict=True)]
    total, count = sum(weights), len(weights)
    if not total:  # no batch has anything that counts
        return None
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / total
    squares = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    return math.sqrt(squares * count / (count - 1)) / total


def _log(trainer: Any, comparison: Comparison) -> None:
    sides = {"base": comparison.base, "tuned": comparison.tuned}
    metrics = {f"{side}/{name}": v for side, found in sides.items() for name, v in found.items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=_lightning.logged_step(trainer))
        logger.save()


def _is_share(name: str, base: float, tuned: float) -> bool:
    """Whether the change of a metric is told in points: both lie between 0 and 1."""
    return 0 <= base <= 1 and 0 <= tuned <= 1 and not _NO_SHARE.search(name.lower())


def _percent(part: float, whole: float, signed: bool = False) -> str:
    if not whole or not math.isfinite(part / whole):
        return ""
    share = 100 * part / abs(whole)
    return f"{share:+.1f} %" if signed else f"{share:.1f} %"
