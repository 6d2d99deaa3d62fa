"""Sequence classification: one class for each text, with any Hugging Face model."""

from __future__ import annotations

from typing import Any

from lora_lightning.tasks.classification import Classification
from lora_lightning.training._lightning import trainer_of


class SequenceClassification(Classification):
    """A pretrained model with a classification head, trained on cross-entropy.

    Logs `train_loss` and `train_accuracy`; `val_loss`, `val_accuracy` and `val_f1` (macro), and the
    same of a test. Predicts one label for each text, and the probabilities of all classes.

    Args:
        **options: Those of every classification, and of every task.
    """

    auto_class = "AutoModelForSequenceClassification"

    def configure_model(self) -> None:
        """Load the network, and say which token pads a text, in each run the data's own."""
        super().configure_model()
        tokenizer = getattr(getattr(trainer_of(self), "datamodule", None), "tokenizer", None)
        padding = getattr(tokenizer, "pad_token_id", None)
        if padding is not None:
            # A decoder (GPT-2, Llama) is classified by its last token before any padding, which it
            # finds by this id; its config has often none, or another than the tokenizer.
            network: Any = self.network
            network.config.get_text_config().pad_token_id = padding

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the token that pads, by which a decoder finds the last one of a text."""
        super().on_save_checkpoint(checkpoint)
        network: Any = self.network
        if network is not None:
            checkpoint["pad_token_id"] = network.config.get_text_config().pad_token_id

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Pad with the checkpoint's token; with a Trainer, it is the data's."""
        super().on_load_checkpoint(checkpoint)
        padding = checkpoint.get("pad_token_id")
        if isinstance(padding, int) and trainer_of(self) is None:
            network: Any = self.network
            network.config.get_text_config().pad_token_id = padding
