"""Token classification: one class for each word, with any Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.tasks.classification import Classification
from lora_lightning.tasks.entity_f1 import EntityF1, writes_entities
from lora_lightning.tasks.pretrained_task import Batch
from lora_lightning.utilities.constants import IGNORE_INDEX


class TokenClassification(Classification):
    """A pretrained model with a classification head over its tokens: entities, parts of speech.

    Logs `train_loss` and `train_accuracy`; `val_loss`, `val_accuracy` and `val_f1` (macro), and the
    same of a test; all are of words (their first sub-tokens). Where the classes are tags of
    entities (`O`, `B-PER`, `I-PER`, ...: IOB, IOBES or BILOU), `val_entity_f1` and `test_entity_f1`
    are of whole entities, which are right where all of their words and their type are.
    Predicts a label for each word, and the probabilities of all classes.

    Args:
        **options: Those of every classification, and of every task.
    """

    auto_class = "AutoModelForTokenClassification"
    not_inputs = ("labels", "words", "word_count")

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        self.entity_metrics = nn.ModuleDict()

    def add_metrics(self, names: list[str]) -> None:
        """Add F1 of entities where the classes are tags of entities."""
        super().add_metrics(names)
        if writes_entities(names):
            self.entity_metrics.update({stage: EntityF1(names) for stage in ("val", "test")})

    def measure(self, stage: str, scores: Tensor, labels: Tensor) -> None:
        """Log what is said of scores (batch, tokens, classes) and labels (batch, tokens)."""
        super().measure(stage, scores, labels)
        if stage in self.entity_metrics:
            metric = self.entity_metrics[stage]
            metric(scores.argmax(dim=-1), labels)
            shown = stage == "val"
            self.log(f"{stage}_entity_f1", metric, prog_bar=shown, batch_size=len(labels))  # type: ignore[arg-type]

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The most probable class name of each word, and the probabilities of all classes.

        Args:
            batch: What the network takes; `words` (batch, tokens), the number of the word in its
                sentence at its first sub-token, else -100; `word_count` (batch,).
            batch_idx: Not used.

        Returns:
            `labels`, a list of names for each sentence, and `probabilities`, a tensor (words,
            classes) for each: None and NaN for words that have no token, because they were cut off.
        """
        probabilities = self(batch).softmax(dim=-1)
        labels, per_word = [], []
        rows = zip(probabilities, batch["words"], batch["word_count"].tolist(), strict=True)
        for tokens, words, count in rows:
            first = words != IGNORE_INDEX
            found = tokens.new_full((count, tokens.shape[-1]), float("nan"))
            found[words[first]] = tokens[first]
            names: list[str | None] = [None] * count
            for word, name in zip(words[first].tolist(), self.names_of(tokens[first]), strict=True):
                names[word] = name
            labels.append(names)
            per_word.append(found)
        return {"labels": labels, "probabilities": per_word}
