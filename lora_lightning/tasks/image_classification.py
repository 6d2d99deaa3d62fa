"""Image classification: one class for each image, with any Hugging Face vision model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_lightning.tasks.classification import Classification
from lora_lightning.tasks.pretrained_task import Batch


class ImageClassification(Classification):
    """A pretrained vision model (ViT, Swin, ConvNeXt, ResNet, ...) with a classification head.

    Logs `train_loss` and `train_accuracy`; `val_loss`, `val_accuracy` and `val_f1` (macro), and the
    same of a test. Predicts one label for each image, and the probabilities of all classes.

    Args:
        **options: Those of every classification, and of every task.
    """

    auto_class = "AutoModelForImageClassification"
    not_inputs = ("labels", "where")

    def forward(self, batch: Batch) -> Tensor:
        """Class scores (images, classes) in float32; labels in `batch` are left aside."""
        # Images are float32, and with `dtype` weights may not be; not all networks see to that.
        dtype: Any = self.network.dtype  # type: ignore[union-attr]
        return super().forward({**batch, "pixel_values": batch["pixel_values"].to(dtype)})

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Predict each image's class name and probabilities; `where` says which image it is."""
        where = {"where": batch["where"]} if "where" in batch else {}
        return {**where, **super().predict_step(batch, batch_idx)}
