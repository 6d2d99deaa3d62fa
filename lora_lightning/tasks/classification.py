"""What classification tasks share: the classes in their order, and a head that may be new."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.errors import ConfigError, first_few
from lora_lightning.hosts.base import adapter_owners
from lora_lightning.tasks.pretrained_task import PretrainedTask, ancestors


class Classification(PretrainedTask):
    """A pretrained network with a classification head.

    Args:
        model: Hub id, local folder, or `package:import_name/sub/folder` (an installed package's).
        label_names: The classes in order. Default: those of the Trainer's data module.
        learning_rate: Learning rate of pretrained weights and adapters, at its peak. The default
            suits LoRA; full fine-tuning wants about a tenth of it.
        head_learning_rate: Learning rate of newly initialised weights, at its peak. They start
            from noise and have further to go.
        **options: Those of every task.
    """

    def __init__(
        self,
        model: str,
        label_names: list[str] | None = None,
        learning_rate: float = 2e-3,
        head_learning_rate: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(model, learning_rate=learning_rate, **options)
        self.label_names = label_names
        self.head_learning_rate = head_learning_rate
        self.metrics = nn.ModuleDict()

    def configure_model(self) -> None:
        """Load the network and give it a head for the classes, once."""
        self.label_names = self._agreed_label_names()
        if self.network is None:
            super().configure_model()
            self.add_metrics(len(self.label_names))

    def add_metrics(self, number_of_classes: int) -> None:
        """Fill `self.metrics`."""
        raise NotImplementedError

    def network_options(self) -> dict[str, Any]:
        """The classes; a head that was trained for others gives way to a new one."""
        labels = self.label_names or []
        return {
            **super().network_options(),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: number for number, name in enumerate(labels)},
            # Only a head trained for other classes can mismatch.
            "ignore_mismatched_sizes": True,
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Pretrained weights and adapters; newly initialised weights."""
        trainable = {n: p for n, p in self.named_parameters() if p.requires_grad}
        # A copy that an adapter trains in place of a new weight starts from noise as well.
        new_modules = set().union(*map(ancestors, self.new_parameters))
        owners = adapter_owners(self)
        new = {
            name
            for name, parameter in trainable.items()
            if name in self.new_parameters or owners.get(id(parameter)) in new_modules
        }
        rates = {False: self.learning_rate, True: self.head_learning_rate}
        groups = [
            {"params": [p for n, p in trainable.items() if (n in new) == is_new], "lr": rate}
            for is_new, rate in rates.items()
        ]
        return [group for group in groups if group["params"]]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the order of the classes: the head's rows mean nothing without it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["label_names"] = self.label_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose classes are others, or in another order."""
        super().on_load_checkpoint(checkpoint)
        saved, ours = checkpoint.get("label_names"), self.label_names or []
        # None: not a checkpoint of this class; its weights are what gives it away.
        if saved is not None and saved != ours:
            raise ConfigError(
                f"the checkpoint's classes are not this run's: {_difference(saved, ours)} "
                "(model.label_names)"
            )

    def _agreed_label_names(self) -> list[str]:
        data = getattr(self._trainer, "datamodule", None)
        theirs: list[str] | None = getattr(data, "label_names", None)
        ours = self.label_names
        if ours and theirs and ours != theirs:
            raise ConfigError(
                f"the model's classes are not the data's: {_difference(ours, theirs)} "
                "(model.label_names, data.label_names)"
            )
        names = ours or theirs
        if not names:
            raise ConfigError(
                "the classes are not known: the Trainer has no data module with `label_names`, "
                "so name them in order. (model.label_names)"
            )
        if len(set(names)) < max(2, len(names)):
            raise ConfigError(
                f"label_names must be at least 2 different names, found {names}. "
                "(model.label_names)"
            )
        return list(names)


def _difference(first: list[str], second: list[str]) -> str:
    if set(first) == set(second):
        return f"the same names in another order, {first} and {second}."
    only_first = first_few([name for name in first if name not in second]) or "nothing"
    only_second = first_few([name for name in second if name not in first]) or "nothing"
    return (
        f"{len(first)} and {len(second)} names; only in the first: {only_first}; "
        f"only in the second: {only_second}."
    )
