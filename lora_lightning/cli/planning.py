"""`lora-lightning plan`: what a config describes, given to `lora_lightning.plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback

from lora_lightning.cli.examination import ExaminingTrainer
from lora_lightning.verbs.plan.plan import TRAINER_OPTIONS, plan
from lora_lightning.verbs.plan.result import Plan

# The Trainer that the command makes of the config, which trains nothing.
ON_NO_DEVICE: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "logger": False,
}


class PlanningTrainer(ExaminingTrainer):
    """Lightning's Trainer with methods `examine` and `plan`."""

    def plan(
        self,
        model: Any,
        datamodule: Any = None,
        batch_size: int | None = None,
        length: int | None = None,
        target_length: int | None = None,
        memory: str | None = None,
    ) -> None:
        """Tell what the run needs, before any weight is loaded.

        Args:
            model: The LightningModule.
            datamodule: Its data.
            batch_size: Rows on each device. Default: the data's.
            length: Tokens of a row. Default: of the longest in the data; else what they may have.
            target_length: Tokens of an encoder-decoder's targets. Default: likewise.
            memory: Of a device, such as `24GB`. Default: what is at hand.

        """
        raise NotImplementedError("lora_lightning.plan makes no Trainer; call it instead")


def plan_config(
    model: Any,
    callbacks: Sequence[Callback],
    data: Any,
    trainer: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Plan:
    """Plan what a config describes: the module, its data, and options of the Trainer's section."""
    given = {name: trainer[name] for name in TRAINER_OPTIONS if trainer.get(name) is not None}
    named = getattr(given.get("strategy"), "class_path", None)
    if named:
        given["strategy"] = named.rpartition(".")[2]
    asked = ("batch_size", "length", "target_length", "memory")
    return plan(model, callbacks, data, **{name: options.get(name) for name in asked}, **given)
