"""The command's part that Lightning runs: fit, validate, test, predict, examine."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import CSVLogger

from lora_lightning.callback import LoraCallback
from lora_lightning.callbacks.comparison import compare_with_base
from lora_lightning.cli.examination import examine_config
from lora_lightning.cli.parser import PROGRAM, LoraParser
from lora_lightning.cli.planning import ON_NO_DEVICE, PlanningTrainer, plan_config
from lora_lightning.cli.predictions import save_predictions
from lora_lightning.cli.saved_config import RunConfig
from lora_lightning.errors import CheckpointError, ConfigError, first_few
from lora_lightning.runs.checkpoints import best_of, checkpoints_in, last_of
from lora_lightning.training.checkpoint_io import files
from lora_lightning.training.messages import show


class LoraCLI(LightningCLI):
    """LightningCLI with a `lora:` section and run directories that are never overwritten.

    A run lives in `trainer.default_root_dir`: `checkpoints/` and `logs/version_N/` (metrics and
    the resolved config of every call). `--ckpt_path last` and `best` are looked up there.
    """

    def __init__(self, args: ArgsType = None) -> None:
        self._arguments = tuple(sys.argv[1:] if args is None else args)
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
        """Lightning's, `examine` and `plan`."""
        own = {name: {"model", "datamodule"} for name in ("examine", "plan")}
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
        if self.subcommand in ("examine", "plan"):
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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, with logs and checkpoints inside the run directory."""
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
            show(f"to go on:\n  {self._again()}")
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning ends with 1 then
            stop.code = 128 + signal.SIGINT

    def _again(self) -> str:
        """The command that starts this run again."""
        if self._launched_from_outside():
            return "start it again as before, with --ckpt_path last"
        arguments = _without_ckpt_path(sys.argv[1:])
        return shlex.join([_typed_program(), *arguments, "--ckpt_path", "last"])

    def _launched_from_outside(self) -> bool:
        """Tell whether the processes were started by torchrun, SLURM or the like."""
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        return not isinstance(environment, (LightningEnvironment, type(None)))

    def after_fit(self) -> None:
        """Print the commands that resume and evaluate this run, and whether it helped."""
        if self.found_checkpoints() and self.trainer.is_global_zero:
            self._show_commands()
        if not self._options()["compare_with_base"]:
            return
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback):
                callback.already_saved = True  # which a process started for fit only knows itself
        try:
            # By all processes together.
            comparison = compare_with_base(self.trainer, self.model, self.datamodule)
        except ConfigError as reason:
            lines: list[Any] = [f"not compared with the base: {reason}"]
        else:
            lines = comparison.lines()
        if self.trainer.is_global_zero:
            show(*lines)

    def _show_commands(self) -> None:
        arguments = _without_ckpt_path(sys.argv[1:])
        limit = "max_epochs" if self.trainer.max_steps == -1 else "max_steps"
        evaluate = ["validate" if argument == "fit" else argument for argument in arguments]
        if self._launched_from_outside():
            alone = {"num_nodes": "1", "devices": "1", "strategy": "auto"}
            evaluate += [part for key in alone for part in (f"--trainer.{key}", alone[key])]
        show(
            f"to train on (raise trainer.{limit}):\n  {self._again()}",
            "to evaluate:\n  " + shlex.join([_typed_program(), *evaluate, "--ckpt_path", "best"]),
        )

    def after_predict(self) -> None:
        """Keep what was predicted, which LightningCLI would drop: files for each process."""
        trainer = self.trainer
        folder = Path(trainer.log_dir or self.run_directory)  # all processes ask for it together
        predictions = trainer.predict_loop.predictions
        if not predictions:
            return
        number = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        # `save_predictions` makes the folder, on a machine that does not share it.
        *lines, whole = save_predictions(predictions, folder / f"predictions{number}")
        if trainer.is_global_zero:
            others = f" of process 0 of {trainer.world_size}" if number else ""
            read = "".join(f"{path}, a line for each row; " for path in lines)
            show(f"predictions{others}: {read}{whole} (torch.load), batch by batch")


def _as_list(callbacks: Any) -> list[Any]:
    """`trainer.callbacks`, which may also be a single one, or none."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def requeued() -> bool:
    """Tell whether SLURM started this job again: with the old command, which is to go on unasked.

    Nothing of the run is at work while its processes look for its newest checkpoint: training
    begins when all of them are up.
    """
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def _typed_program() -> str:
    """The command's name where the shell finds it, else the path by which it was called."""
    found = shutil.which(PROGRAM)
    called = sys.argv[0]
    if found and os.path.exists(called) and not os.path.samefile(found, called):
        return called
    return PROGRAM if found or not os.path.exists(called) else called


def _without_ckpt_path(arguments: list[str]) -> list[str]:
    pairs = zip(["", *arguments], arguments, strict=False)  # the one before, and each argument
    return [
        argument
        for before, argument in pairs
        if "--ckpt_path" not in (before, argument) and not argument.startswith("--ckpt_path=")
    ]
