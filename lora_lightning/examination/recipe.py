"""How runs of an examination are made: each from a fresh module, fresh data and fresh callbacks."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger

from lora_lightning.errors import ConfigError
from lora_lightning.examination.leaves import leaves
from lora_lightning.training.module_state import defines_hook
from lora_lightning.utilities.rng import seed_all

BASE_SEED = 0  # under which modules and data are made: it stands for pretrained weights
RUN_SEED, OTHER_SEED = 1, 2  # of the uninterrupted runs, and of those that resume
EPOCHS = 2

# Stage: the hook that a module has for it, and the loader of its data.
STAGES = {
    "validate": ("validation_step", "val_dataloader"),
    "test": ("test_step", "test_dataloader"),
    "predict": ("predict_step", "predict_dataloader"),
}


class _Quiet(DummyLogger):
    """Takes what modules log, images and all; they may write files beside, as in real logs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @property
    def log_dir(self) -> str:
        self._folder.mkdir(parents=True, exist_ok=True)
        return str(self._folder)

    def __reduce__(self) -> Any:  # DummyLogger's answers to pickle's questions cannot be pickled
        return type(self), (self._folder,)


@dataclass
class Run:
    """A Trainer and the module that it ran."""

    trainer: Trainer
    module: LightningModule


@dataclass(frozen=True)
class Recipe:
    """A user's module, data and callbacks, made anew for each run; it can be pickled if they can.

    Attributes:
        make_module, make_data, callbacks: As of `examine`; callbacks are copied for each run.
        folder: Where the runs write.
        batches: Batches of an epoch.
        options: Of each run's Trainer.

    """

    make_module: Callable[[], LightningModule]
    make_data: Callable[[], Any]
    callbacks: tuple[Callback, ...]
    folder: Path
    batches: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def module(self) -> LightningModule:
        """A fresh module; the same weights each time."""
        seed_all(BASE_SEED)
        module = self.make_module()
        if not isinstance(module, LightningModule):
            raise ConfigError(
                f"make_module returned a {type(module).__name__}; it is called without arguments "
                "and returns a fresh LightningModule each time. (make_module)"
            )
        return module

    def data(self) -> Any:
        """Fresh data: a data module, loaders, or None where the module has its own."""
        seed_all(BASE_SEED)
        return self.make_data()

    def trainer(self, *more: Callback, adapted: bool = True) -> Trainer:
        """A Trainer of a few batches, with the user's callbacks before `more`, or without them."""
        kept = tuple(c for c in self.callbacks if not isinstance(c, ProgressBar))
        own = copy.deepcopy(kept) if adapted else ()
        small: dict[str, Any] = {
            "max_epochs": EPOCHS,
            "limit_train_batches": self.batches,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            "limit_predict_batches": 2,
            "log_every_n_steps": 1,
            "devices": 1,
            "logger": _Quiet(self.folder / "logs"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": self.folder,
        }
        callbacks = [*own, *more, _Seed()]
        if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks.append(ModelCheckpoint(save_top_k=0))  # modules may ask for it; never writes
        return Trainer(callbacks=callbacks, **{**small, **self.options})

    def fit(
        self,
        *more: Callback,
        adapted: bool = True,
        seed: int = RUN_SEED,
        ckpt_path: Path | None = None,
    ) -> Run:
        """Train a fresh module, on from a checkpoint or from the beginning."""
        run = Run(self.trainer(*more, adapted=adapted), self.module())
        data = self.data()
        loaders = {"datamodule": data}
        if not isinstance(data, LightningDataModule):
            loaders = {"train_dataloaders": data}
            if defines_hook(run.module, "validation_step"):
                loaders["val_dataloaders"] = data
        _seed(run, seed)
        run.trainer.fit(run.module, ckpt_path=ckpt_path, **loaders)
        return run

    def evaluate(self, run: Run, stage: str, ckpt_path: Path | None = None) -> dict[str, Any]:
        """What a stage logs and returns, under its names."""
        data = self.data()
        is_module = isinstance(data, LightningDataModule)
        options: dict[str, Any] = {"datamodule" if is_module else "dataloaders": data}
        _seed(run, RUN_SEED)
        if stage == "predict":
            found = run.trainer.predict(run.module, ckpt_path=ckpt_path, **options)
            return leaves(found, "predictions")
        way = run.trainer.validate if stage == "validate" else run.trainer.test
        logged = way(run.module, ckpt_path=ckpt_path, verbose=False, **options)
        return {name: value for one in logged for name, value in one.items()}

    def stages(self) -> list[str]:
        """The stages that module and data have hooks for."""
        module, data = self.module(), self.data()
        return [stage for stage, hooks in STAGES.items() if _serves(module, data, *hooks)]


class _Seed(Callback):
    """Starts a run from its own seed, once the module has built its layers."""

    seed = RUN_SEED

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            seed_all(self.seed)

    on_validation_start = on_test_start = on_predict_start = _start

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if builds_later(pl_module):
            seed_all(self.seed)


def builds_later(module: LightningModule) -> bool:
    """True for a module that may make its layers when the Trainer sets it up."""
    return defines_hook(module, "configure_model") or defines_hook(module, "setup")


def _seed(run: Run, seed: int) -> None:
    (starter,) = (c for c in run.trainer.callbacks if isinstance(c, _Seed))  # type: ignore[attr-defined]
    starter.seed = seed
    # Layers that are built then are the base's as well, and the same in every run.
    seed_all(BASE_SEED if builds_later(run.module) else seed)


def _serves(module: LightningModule, data: Any, step: str, loader: str) -> bool:
    if not defines_hook(module, step):
        return False
    if data is None:
        return defines_hook(module, loader)
    if not isinstance(data, LightningDataModule):
        return True  # the same loader for all stages
    homes = (kind for kind in type(data).__mro__ if loader in vars(kind))
    return not next(homes).__module__.startswith(("lightning.pytorch.", "pytorch_lightning."))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the words of each single run."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        nothing = io.StringIO()
        with redirect_stdout(nothing), redirect_stderr(nothing), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
