"""Sequence classification: one class for each text, with any Hugging Face model."""

from __future__ import annotations

from typing import Any

from lora_lightning.tasks.classification import Classification


class SequenceClassification(Classification):
    """A pretrained model with a classification head, trained on cross-entropy.

    Logs `train_loss` and `train_accuracy`; `val_loss`, `val_accuracy` and `val_f1` (macro), and the
    same of a test. Predicts one label for each text, and the probabilities of all classes.

    Args:
        **options: Those of every classification, and of every task.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
