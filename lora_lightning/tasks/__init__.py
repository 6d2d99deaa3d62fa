"""Ready LightningModules for users who bring only the name of a model."""

from typing import TYPE_CHECKING

from lora_lightning.utilities.lazy_imports import lazy_names

if TYPE_CHECKING:
    from lora_lightning.tasks.causal_lm import CausalLM as CausalLM
    from lora_lightning.tasks.image_classification import ImageClassification as ImageClassification
    from lora_lightning.tasks.seq2seq_lm import Seq2SeqLM as Seq2SeqLM
    from lora_lightning.tasks.sequence_classification import (
        SequenceClassification as SequenceClassification,
    )
    from lora_lightning.tasks.token_classification import TokenClassification as TokenClassification

__all__, __getattr__, __dir__ = lazy_names(__name__)
