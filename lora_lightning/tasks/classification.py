"""Base of classification tasks: the classes in order, a head that may be new, the loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import adapter_owners
from lora_lightning.tasks import class_names
from lora_lightning.tasks.lr_schedule import check_not_negative
from lora_lightning.tasks.pretrained_task import Batch, PretrainedTask, ancestors
from lora_lightning.training._lightning import trainer_of
from lora_lightning.utilities.constants import IGNORE_INDEX


class Classification(PretrainedTask):
    """A pretrained network with a classification head, trained on cross-entropy.

    Logs `train_loss` and `train_accuracy`; `val_loss`, `val_accuracy` and `val_f1` (macro: the mean
    of the classes' F1), and the same of a test. Losses are means over all that is labelled, on all
    processes: in the update's batches so far, and in the whole of an evaluation. Those of
    validation and test are plain cross-entropy, whatever `label_smoothing` and `class_weights` are,
    so that runs can be compared.

    Args:
        label_names: The classes in order. Default: those of the Trainer's data module.
        learning_rate: Learning rate of pretrained weights and adapters, at its peak. The default
            suits LoRA; full fine-tuning wants about a tenth of it.
        head_learning_rate: Learning rate of newly initialised weights, at its peak. They start
            from noise and have further to go.
        label_smoothing: s, 0 <= s < 1: what is learned is (1 - s) for the labelled class and s / C
            more for each of the C classes.
        class_weights: What an example of a class counts in the training loss, by name; 1 where
            none is given. The mean is weighted: sum_i w_i loss_i / sum_i w_i.
        **options: Those of every task.
    """

    # What of a batch the network is not given.
    not_inputs: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(
        self,
        model: str,
        label_names: list[str] | None = None,
        learning_rate: float = 2e-3,
        head_learning_rate: float = 1e-2,
        label_smoothing: float = 0.0,
        class_weights: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, learning_rate=learning_rate, **options)
        check_not_negative(head_learning_rate=head_learning_rate)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(
                f"label_smoothing must be at least 0 and below 1, found {label_smoothing}. "
                "(model.label_smoothing)"
            )
        self.label_names = label_names
        self.head_learning_rate = head_learning_rate
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights or {}
        self._weights = torch.ones(0)  # of all classes, in their order
        self.metrics = nn.ModuleDict()

    def configure_model(self) -> None:
        """Load the network and give it a head for the classes, once."""
        self.label_names = class_names.agreed_label_names(self.label_names, trainer_of(self))
        if self.network is None:
            self._weights = class_names.weights_of_classes(self.class_weights, self.label_names)
            super().configure_model()
            # Without new weights, the head is that of the file.
            if self.options.pretrained and not self.new_parameters:
                hub = self.options.hub()
                class_names.check_trained_head(self.model_name, hub, self.label_names)
            self.add_metrics(self.label_names)

    def configure_without_weights(self, precision: str) -> None:
        """Build it with a head for `label_names`."""
        self.label_names = class_names.agreed_label_names(self.label_names, trainer_of(self))
        self._weights = class_names.weights_of_classes(self.class_weights, self.label_names)
        super().configure_without_weights(precision)

    def options_to_keep(self) -> dict[str, Any]:
        """Add the classes, as they are now known, and what trains on them."""
        found = super().options_to_keep()
        own = {
            "label_names": self.label_names,
            "head_learning_rate": self.head_learning_rate,
            "label_smoothing": self.label_smoothing,
            "class_weights": self.class_weights or None,
        }
        return {**found, **own} if found else {}

    def add_metrics(self, names: list[str]) -> None:
        """Accuracy, and macro F1 of what is evaluated."""
        for stage in ("train", "val", "test"):
            accuracy = MulticlassAccuracy(len(names), average="micro", ignore_index=IGNORE_INDEX)
            self.metrics[f"{stage}_accuracy"] = accuracy
            if stage != "train":
                f1 = MulticlassF1Score(len(names), average="macro", ignore_index=IGNORE_INDEX)
                self.metrics[f"{stage}_f1"] = f1

    def forward(self, batch: Batch) -> Tensor:
        """Class scores (..., classes) in float32; labels in `batch` are left aside."""
        assert self.network is not None, "configure_model builds the network"
        inputs = {key: tensor for key, tensor in batch.items() if key not in self.not_inputs}
        scores: Tensor = self.network(**inputs).logits.float()
        return scores

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy, as the update's mean over its whole window wants it."""
        scores, labels = self(batch), batch["labels"]
        total = self._loss_sum(scores, labels, training=True)
        loss = self.window_loss(total, batch)
        shown = loss if trainer_of(self) is None else self.window_mean
        self.log("train_loss", shown.float(), prog_bar=True, batch_size=len(labels))
        self.measure("train", scores, labels)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Log accuracy and macro F1; sum up the loss."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log accuracy and macro F1; sum up the loss."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> dict[str, Tensor]:
        scores, labels = self(batch), batch["labels"]
        self.measure(stage, scores, labels)
        total = self._loss_sum(scores, labels, training=False)
        return self.add_up(total, self._weight_of(labels, training=False))

    def log_means(self, stage: str, total: Tensor, weight: Tensor, *others: Tensor) -> None:
        """Log the mean loss."""
        loss, shown = (total / weight).float(), stage == "val"
        self.log(f"{stage}_loss", loss, prog_bar=shown, sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The most probable class name of each row, and the probabilities of all classes."""
        probabilities = self(batch).softmax(dim=-1)
        return {"labels": self.names_of(probabilities), "probabilities": probabilities}

    def names_of(self, probabilities: Tensor) -> list[str]:
        """The name of the most probable class of each row (rows, classes)."""
        assert self.label_names is not None, "configure_model sets the names"
        return [self.label_names[index] for index in probabilities.argmax(dim=-1).tolist()]

    def measure(self, stage: str, scores: Tensor, labels: Tensor) -> None:
        """Log what is said of scores (..., classes) and labels (...) beside the loss."""
        for name, metric in self.metrics.items():
            if name.startswith(stage):
                metric(scores.flatten(0, -2), labels.flatten())
                shown = stage != "test" and name.endswith("_accuracy")
                self.log(name, metric, prog_bar=shown, batch_size=len(labels))  # type: ignore[arg-type]

    def batch_weight(self, batch: Batch) -> Tensor:
        """The weights of all that is labelled."""
        return self._weight_of(batch["labels"], training=True)

    def _loss_sum(self, scores: Tensor, labels: Tensor, training: bool) -> Tensor:
        weights = self._weights.to(scores.device) if training and self.class_weights else None
        return nn.functional.cross_entropy(
            scores.flatten(0, -2),
            labels.flatten(),
            weight=weights,
            label_smoothing=self.label_smoothing if training else 0.0,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )

    def _weight_of(self, labels: Tensor, training: bool) -> Tensor:
        """The sum of the weights that `_loss_sum` takes losses by."""
        labelled = (labels != IGNORE_INDEX).float()
        if training and self.class_weights:
            labelled = labelled * self._weights.to(labels.device)[labels.clamp(min=0)]
        return labelled.sum()

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
            how = class_names.difference(saved, ours)
            raise ConfigError(
                f"the checkpoint's classes are not this run's: {how} (model.label_names)"
            )
