"""Causal language models: each token is predicted from those before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_lightning.errors import ModelError
from lora_lightning.tasks.language_model import LanguageModel
from lora_lightning.tasks.lm_loss import next_tokens
from lora_lightning.tasks.pretrained_task import Batch


class CausalLM(LanguageModel):
    """A causal language model, such as a Llama, trained to predict each learned token.

    The loss is -1/N sum_t log p(x_t | x_<t) in float32 over the N learned tokens of an update, of
    all accumulated batches and all processes: one large batch and many small ones give the same
    update. Scores are computed for learned tokens only, in chunks, forward and backward, so that
    memory holds no matrix of tokens x vocabulary.

    Logs `train_loss`; `val_loss`, `val_perplexity` (e to the loss) and `val_accuracy` (share of
    tokens that have the highest score), means over all learned tokens of the set; and the same of a
    test. Predicting writes a continuation for each prompt.

    Args:
        **options: Those of every language model, and of every task.
    """

    auto_class = "AutoModelForCausalLM"

    def configure_model(self) -> None:
        """Load the network, and refuse one that sees what it is to predict."""
        super().configure_model()
        # An encoder such as BERT is loaded with a language model's head, but reads both ways unless
        # its config says that it is a decoder. transformers only warns of it.
        from transformers import MODEL_FOR_MASKED_LM_MAPPING

        network: Any = self.network
        causal = any(getattr(network.config, name, False) for name in ("is_decoder", "causal"))
        if type(network.config) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
            raise ModelError(
                f"{self.model_name!r} is an encoder ({type(network).__name__}): it sees the tokens "
                "after each, and would learn to copy the next one. Name a decoder, such as a "
                "Llama; or set `is_decoder: true` in a copy's config.json. (model.model)"
            )

    def targets(self, batch: Batch) -> Tensor:
        """The label after each position; none where another packed sequence begins."""
        return next_tokens(self.labels(batch), batch.get("position_ids"))

    def prompts(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Move padding to the left, so that generation continues the last token."""
        order = attention_mask.argsort(dim=1, stable=True)
        return {
            "input_ids": input_ids.gather(1, order),
            "attention_mask": attention_mask.gather(1, order),
        }

    def written(self, generated: Tensor, input_ids: Tensor) -> Tensor:
        """Cut the prompt off."""
        return generated[:, input_ids.shape[1] :]
