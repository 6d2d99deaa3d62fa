"""Sequence classification: one class for each text, with any Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lora_lightning.tasks.classification import Classification
from lora_lightning.tasks.pretrained_task import Batch


class SequenceClassification(Classification):
    """A pretrained model with a classification head, trained on cross-entropy.

    Logs `train_loss` and `train_accuracy`; `val_loss`, `val_accuracy` and `val_f1` (macro), and the
    same of a test.

    Args:
        **options: Those of every classification, and of every task.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)

    def add_metrics(self, number_of_classes: int) -> None:
        """Accuracy, and macro F1 of what is evaluated."""
        for stage in ("train", "val", "test"):
            self.metrics[f"{stage}_accuracy"] = MulticlassAccuracy(
                number_of_classes, average="micro"
            )
            if stage != "train":
                self.metrics[f"{stage}_f1"] = MulticlassF1Score(number_of_classes, average="macro")

    def forward(self, batch: Batch) -> Tensor:
        """Class scores (batch, classes) in float32; labels in `batch` are left aside."""
        assert self.network is not None, "configure_model builds the network"
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.network(**inputs).logits.float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        return self._step("train", batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss, accuracy and macro F1."""
        self._step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss, accuracy and macro F1."""
        self._step("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The most probable class name of each text, and the probabilities of all classes."""
        probabilities = self(batch).softmax(dim=-1)
        assert self.label_names is not None, "configure_model sets the names"
        labels = [self.label_names[index] for index in probabilities.argmax(dim=-1).tolist()]
        return {"labels": labels, "probabilities": probabilities}

    def _step(self, stage: str, batch: Batch) -> Tensor:
        scores, labels = self(batch), batch["labels"]
        loss = nn.functional.cross_entropy(scores, labels)
        size, shown = len(labels), stage != "test"
        self.log(f"{stage}_loss", loss, prog_bar=shown, batch_size=size)
        for name, metric in self.metrics.items():
            if name.startswith(stage):
                metric(scores, labels)
                accuracy = name.endswith("_accuracy")
                self.log(name, metric, prog_bar=shown and accuracy, batch_size=size)  # type: ignore[arg-type]
        return loss
