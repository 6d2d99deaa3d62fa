"""Encoder-decoders, such as T5 and BART: one text from another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_lightning.errors import ModelError
from lora_lightning.tasks.language_model import LanguageModel
from lora_lightning.tasks.pretrained_task import Batch


class Seq2SeqLM(LanguageModel):
    """An encoder-decoder, such as T5 or BART, trained to write the target of each input.

    The loss is -1/N sum_t log p(y_t | y_<t, x) in float32 over the N target tokens of an update, of
    all accumulated batches and all processes: one large batch and many small ones give the same
    update. Scores are computed in chunks, forward and backward, so that memory holds no matrix of
    tokens x vocabulary.

    Logs `train_loss`; `val_loss`, `val_perplexity` (e to the loss) and `val_accuracy` (share of
    tokens that have the highest score), means over all target tokens of the set; and the same of a
    test. Predicting writes the target of each input.

    Args:
        **options: Those of every language model, and of every task.
    """

    auto_class = "AutoModelForSeq2SeqLM"

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Add the target, shifted right, as the decoder's input."""
        shift = getattr(self.network, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ModelError(
                f"{type(self.network).__name__} does not say how its decoder reads a target "
                "(`prepare_decoder_input_ids_from_labels`), so it cannot be trained as a "
                "sequence-to-sequence model. (model.model)"
            )
        return {**super().inputs(batch), "decoder_input_ids": shift(self.labels(batch))}

    def targets(self, batch: Batch) -> Tensor:
        """The target's tokens, each at its place."""
        return self.labels(batch)

    def written(self, generated: Tensor, input_ids: Tensor) -> Tensor:
        """Cut off the token that the decoder starts with; BART's is the one that ends a text."""
        return generated[:, 1:]

    def count_tokens(self, batch: Batch) -> int:
        """Count input and target tokens."""
        return super().count_tokens(batch) + int(self.batch_weight(batch))
