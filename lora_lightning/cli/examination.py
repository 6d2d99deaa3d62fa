"""`lora-lightning examine`: the module of a config put through `lora_lightning.examine`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from lora_lightning.callback import LoraCallback
from lora_lightning.examination.examine import examine
from lora_lightning.examination.recipe import quiet
from lora_lightning.examination.result import Examination
from lora_lightning.utilities.rng import random_state, set_random_state
from lora_lightning.verbs.preview.preview import preview

# Of the trainer's section; the rest, loggers and other callbacks say nothing of the module.
_OPTIONS = (
    "accelerator", "precision", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "deterministic", "benchmark",
)  # fmt: skip

# By the command's arguments, which are parsed once.
_BUILT: dict[tuple[str, ...], LightningCLI] = {}


class ExaminingTrainer(Trainer):
    """Lightning's Trainer with more methods, for they are the command's subcommands."""

    def examine(self, model: Any, datamodule: Any = None, batches: int = 4) -> None:
        """Run a few steps in a temporary folder, and tell what of the promises holds.

        Args:
            model: The LightningModule.
            datamodule: Its data.
            batches: Batches of an epoch.

        """
        raise NotImplementedError("lora_lightning.examine makes modules anew; call it instead")

    def preview(
        self, model: Any, datamodule: Any = None, rows: int = 2, tokens: int = 1000
    ) -> None:
        """Show the data as the model will see them, without any weights.

        Args:
            model: The LightningModule.
            datamodule: Its data.
            rows: Examples that are shown.
            tokens: The most tokens that are shown of one text.

        """
        preview(datamodule, model, rows, tokens).show()


@dataclass(frozen=True)
class FromCommand:
    """A fresh module, or fresh data, of a command's config; any process can make them.

    Attributes:
        cli: The class of the command.
        arguments: What it was called with.
        part: "model" or "datamodule".

    """

    cli: type[LightningCLI]
    arguments: tuple[str, ...]
    part: str

    def __call__(self) -> Any:
        """Make all anew, and give the part that is asked for."""
        state = random_state()
        built = _built(self.cli, self.arguments)
        set_random_state(state)  # the first call in a process has made all of it once
        built.instantiate_classes()
        return getattr(built, self.part)


def examine_config(
    cli: type[LightningCLI], arguments: tuple[str, ...], batches: int
) -> Examination:
    """Examine what the arguments of the command describe."""
    built = _built(cli, arguments)
    options: Mapping[str, Any] = built.config["examine"]["trainer"]
    callbacks = built.trainer.callbacks  # type: ignore[attr-defined]
    return examine(
        FromCommand(cli, arguments, "model"),
        FromCommand(cli, arguments, "datamodule"),
        [callback for callback in callbacks if isinstance(callback, LoraCallback)],
        batches=batches,
        trainer_options={k: options[k] for k in _OPTIONS if options.get(k) is not None},
    )


def _built(cli: type[LightningCLI], arguments: tuple[str, ...]) -> LightningCLI:
    """All that the config describes, built and not run."""
    if arguments in _BUILT:
        return _BUILT[arguments]

    class Built(cli):  # type: ignore[valid-type, misc]
        def examine(self, **kwargs: Any) -> None:
            pass

    with quiet():  # Lightning's advice against arguments that stand in sys.argv as well
        _BUILT[arguments] = Built([*arguments])
    return _BUILT[arguments]
