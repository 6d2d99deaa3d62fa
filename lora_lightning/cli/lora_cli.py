"""The command's part that Lightning runs: fit, validate, test, predict, examine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import CSVLogger

from lora_lightning.callback import LoraCallback
from lora_lightning.callbacks.comparison import (
    check_comparable,
    compare_with_base,
    validation_data,
)
from lora_lightning.callbacks.comparison_file import write_comparison
from lora_lightning.cli.early_checks import MonitorCheck, check_loggers, nothing_left
from lora_lightning.cli.examination import ExaminingTrainer, examine_config
from lora_lightning.cli.last_lines import to_evaluate, to_go_on, to_use_it
from lora_lightning.cli.log_filter import shorten_warnings
from lora_lightning.cli.parser import LoraParser
from lora_lightning.cli.planning import ON_NO_DEVICE, PlanningTrainer, plan_config
from lora_lightning.cli.predictions import PredictionFiles
from lora_lightning.cli.saved_config import RunConfig
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import CheckpointError, ConfigError, first_few
from lora_lightning.runs.checkpoints import best_of, checkpoints_in, last_of
from lora_lightning.training.checkpoint_io import files
from lora_lightning.training.messages import show
from lora_lightning.training.terminal_progress import TerminalProgress
from lora_lightning.verbs.preview.preview import idle_trainer


class LoraCLI(LightningCLI):
    """LightningCLI with a `lora:` section and run directories that are never overwritten.

    A run lives in `trainer.default_root_dir`: `checkpoints/` and `logs/version_N/` (metrics and
    the resolved config of every call). `--ckpt_path last` and `best` are looked up there.
    """

    def __init__(self, args: ArgsType = None) -> None:
        self._arguments = tuple(sys.argv[1:] if args is None else args)
        shorten_warnings()
        try:
            super().__init__(
                trainer_class=PlanningTrainer,
                model_class=LightningModule,
                datamodule_class=LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_class=LoraParser,
                seed_everything_default=0,
                save_config_callback=RunConfig,
                # Each call has a log directory of its own, so there is nothing to protect there,
                # and without a logger Lightning would refuse the second call only after all the
                # set-up.
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"default_root_dir": "runs/default"},
                args=args,
            )
        except SystemExit as stop:
            if hasattr(self, "trainer"):  # it was stopped in a run
                self._say_how_to_go_on(stop)
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and those of data and module before training."""
        own = {name: {"model", "datamodule"} for name in ("examine", "plan", "preview")}
        return {**LightningCLI.subcommands(), **own}

    def examine(self, **kwargs: Any) -> None:
        """Tell what holds for the module, which is made anew many times; exit with 1 if not all."""
        if not examine_config(type(self), self._arguments, kwargs["batches"]).holds:
            sys.exit(1)

    def plan(self, **kwargs: Any) -> None:
        """Print what the run needs; nothing is loaded, and nothing written."""
        trainer = self._options()["trainer"]
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        plan_config(self.model, callbacks, self.datamodule, trainer, kwargs).show()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback's options as a section of their own: `--lora.r 16`."""
        self._any_parser = parser
        parser.add_class_arguments(LoraCallback, "lora", fail_untyped=False, sub_configs=True)
        parser.add_argument(  # of every subcommand, so that they can share a config file
            "--compare_with_base",
            type=bool,
            default=True,
            help="After fit, validate without and with the adapter and say whether it helped.",
        )

    # -- before anything is built ----------------------------------------------------------------

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse a checkpoint that does not exist or cannot be read.

        LightningCLI reads it next, for the module's hyperparameters.
        """
        super().parse_arguments(parser, args)
        path = self._options().get("ckpt_path")
        if path and path not in ("last", "best", "hpc", "registry"):
            files.check_checkpoint_file(str(path))
            if Path(path).is_file():
                with files.damage_explained(path):
                    torch.load(path, weights_only=True, map_location="cpu")

    def before_instantiate_classes(self) -> None:
        """Look the checkpoint up, and refuse to start a run over an existing one."""
        check_loggers(self._options()["trainer"].get("logger"))
        if self.subcommand in ("examine", "plan", "preview"):
            return  # which leave the run directory alone
        options = self._options()
        found = self.found_checkpoints()
        wanted = options.get("ckpt_path")
        if self.subcommand == "fit" and requeued() and (found or wanted == "last"):
            options["ckpt_path"] = str(last_of(found)) if found else None
        elif wanted in ("last", "best"):
            if not found:
                raise CheckpointError(
                    f"ckpt_path={wanted!r}: {first_few(self._folders())} holds no checkpoint. "
                    "Start the run without --ckpt_path, or name its directory with "
                    "--trainer.default_root_dir. (ckpt_path)"
                )
            options["ckpt_path"] = str(best_of(found) if wanted == "best" else last_of(found))
        elif wanted is None and self.subcommand == "fit" and found:
            raise ConfigError(
                f"The run directory {str(self.run_directory)!r} holds {len(found)} checkpoints of "
                "an earlier run already; nothing is overwritten. Continue that run with "
                "--ckpt_path last, or start a new one with --trainer.default_root_dir DIRECTORY. "
                "(trainer.default_root_dir)"
            )
        elif wanted is None and self.subcommand != "fit":
            show("no --ckpt_path given: this evaluates the model before any fine-tuning")
        path = Path(str(options.get("ckpt_path")))
        if self.subcommand == "fit" and path.is_file():
            done = nothing_left(path, options["trainer"])
            if done:
                show(done)
                sys.exit(0)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, with logs and checkpoints inside the run directory."""
        if self.subcommand == "preview":  # whatever devices the run is for
            return idle_trainer(ExaminingTrainer)
        made = self.config_init[self.subcommand]
        if self.subcommand == "plan":
            kwargs |= ON_NO_DEVICE
        if made["trainer"].get("logger") in (None, True):
            kwargs["logger"] = CSVLogger(save_dir=str(self.run_directory), name="logs")
        callbacks = _as_list(made["trainer"].get("callbacks"))
        if any(isinstance(callback, LoraCallback) for callback in callbacks):
            self._check_section_is_unused()
        else:
            callbacks = [*callbacks, made["lora"]]
        if self.subcommand == "predict":
            callbacks = [*callbacks, PredictionFiles()]
        wants_bar = made["trainer"].get("enable_progress_bar") in (None, True)
        if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks = [*callbacks, TerminalProgress()]
        callbacks = [*callbacks, MonitorCheck()]
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks)
        # First, so that wrong options are found before other callbacks write files.
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, LoraCallback))  # type: ignore[attr-defined]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                if callback.dirpath is None:
                    callback.dirpath = str((self.run_directory / "checkpoints").absolute())
                if callback.monitor is not None and callback.save_last is None:
                    callback.save_last = True  # the best one may be an old one: resume needs both
        return trainer

    @property
    def run_directory(self) -> Path:
        """The folder of this run's checkpoints and logs."""
        return Path(self._options()["trainer"]["default_root_dir"] or "runs/default")

    def found_checkpoints(self) -> list[Path]:
        """Checkpoints of this run, the newest last."""
        folders = map(Path, self._folders())
        return checkpoints_in([*folders, self.run_directory])  # there Lightning's, before a requeue

    def _folders(self) -> list[str]:
        entries = _as_list(self._options()["trainer"].get("callbacks"))
        named = [getattr(entry, "init_args", None) for entry in entries]
        folders = [
            str(options["dirpath"]) for options in named if options and options.get("dirpath")
        ]
        return [str(self.run_directory / "checkpoints"), *folders]

    def _options(self) -> Any:
        return self.config[self.config["subcommand"]]

    def _check_section_is_unused(self) -> None:
        if self._options()["lora"] != self._any_parser.get_defaults()["lora"]:
            raise ConfigError(
                "LoRA options are given twice: in the `lora:` section (or as --lora...) and as a "
                "LoraCallback under trainer.callbacks. Keep one of them. (lora)"
            )

    # -- after the run ---------------------------------------------------------------------------

    def _say_how_to_go_on(self, stop: SystemExit) -> None:
        saved = self.subcommand == "fit" and self.found_checkpoints()
        if saved and self.trainer.is_global_zero:
            show(*to_go_on(self.trainer, self.run_directory))
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning ends with 1 then
            stop.code = 128 + signal.SIGINT

    def after_fit(self) -> None:
        """Say whether it helped, and what to do next."""
        if self._options()["compare_with_base"]:
            self._compare()
        if self.found_checkpoints() and self.trainer.is_global_zero:
            show(
                *self._to_use_it(),
                *to_go_on(self.trainer, self.run_directory, further=True),
                *(to_evaluate(self.trainer, self.run_directory) if self._validates() else []),
            )

    def _validates(self) -> bool:
        try:
            validation_data(self.trainer, self.model, self.datamodule)
        except ConfigError:
            return False
        return True

    def _compare(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback):
                callback.already_saved = True  # which a process started for fit only knows itself
        lines: list[Any] = []
        try:
            data = check_comparable(self.trainer, self.model, self.datamodule)
            if self.trainer.is_global_zero:
                show(
                    "comparing with the base: two validations, --compare_with_base false leaves "
                    "them out"
                )
            # By all processes together.
            comparison = compare_with_base(self.trainer, self.model, data)
        except ConfigError as reason:
            lines = [f"not compared with the base: {reason}"]
        else:
            lines = comparison.lines()
            # A fast_dev_run leaves nothing behind.
            if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                write_comparison(comparison, self.run_directory)
        if self.trainer.is_global_zero:
            show(*lines)

    def _after_evaluation(self) -> None:
        if self._options().get("ckpt_path") and self.trainer.is_global_zero:
            show(*self._to_use_it({str(self.subcommand)}))

    def _to_use_it(self, without: AbstractSet[str] = frozenset()) -> list[str]:
        # A run that trained all weights has no adapter, which is what these are for.
        ours = {"generate", "merge", "export", "report"}
        of_adapters = set() if adapter_names(self.model) else ours
        others = frozenset(without | of_adapters)
        return to_use_it(self.model, self.datamodule, self.run_directory, others)

    def after_validate(self) -> None:
        """Say what to do next."""
        self._after_evaluation()

    def after_test(self) -> None:
        """Say what to do next."""
        self._after_evaluation()

    def after_predict(self) -> None:
        """Say what to do next."""
        self._after_evaluation()


def _as_list(callbacks: Any) -> list[Any]:
    """`trainer.callbacks`, which may also be a single one, or none."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def requeued() -> bool:
    """Tell whether SLURM started this job again: with the old command, which is to go on unasked.

    Nothing of the run is at work while its processes look for its newest checkpoint: training
    begins when all of them are up.
    """
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
