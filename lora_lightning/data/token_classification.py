"""Sentences with a label for each word, as batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_lightning.data.labelled_data_module import Collate
from lora_lightning.data.labelled_text_data_module import Example, LabelledTextDataModule
from lora_lightning.data.sources import labelled_words
from lora_lightning.data.sources.labelled_words import Sentence
from lora_lightning.data.split_data_module import SplitOptions
from lora_lightning.errors import ConfigError
from lora_lightning.utilities.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenClassificationDataModule(LabelledTextDataModule):
    """Words and their labels, such as named entities or parts of speech.

    A row holds two lists of the same length, `{"tokens": ["EU", "rejects"], "labels": ["B-ORG",
    "O"]}`, in a JSONL, JSON or Parquet file or a Hugging Face dataset. The words are tokenised as
    running text, with a blank between two; the first sub-token of each word carries its label, all
    others none. Words that get no sub-token, and those that are cut off, are counted.

    Args:
        train: Training data; their labels are the classes.
        val: Validation data, or the share of the training sentences held out for it, from 0 (none)
            to below 1. A hash of each sentence decides, so the split is the same in every run and
            equal sentences never fall on both sides.
        test: Test data.
        predict: Sentences to predict; labels are not read.
        tokens_column: Column or key of the words.
        label_column: Column or key of the labels, strings or integers. Default: the one of
            `labels`, `ner_tags` and `tags` that the data have.
        label_names: The classes in order. Default: the sorted distinct labels of `train`. Where
            none of these names is a number, a number among the data's labels is the place of a
            class in this list, from 0.
        tokenizer: Name of the tokenizer's model. Default: the LightningModule's `model_name`.
        max_length: Longer sentences are cut to this many tokens; how many were cut, and how many
            words were lost with that, is reported.
        batch_size: Sentences per batch, each batch padded to its longest sentence.
        num_workers: Worker processes per data loader; 0 loads in the main process.
    """

    labelled = "word"

    def __init__(
        self,
        train: str | None = None,
        val: float | str = 0.1,
        test: str | None = None,
        predict: str | None = None,
        tokens_column: str = "tokens",
        label_column: str | None = None,
        label_names: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        options = SplitOptions(train, val, test, predict, batch_size, num_workers)
        super().__init__(options, label_column, label_names, tokenizer, max_length)
        self.tokens_column = tokens_column

    def read(self, split: str, path: str) -> list[Sentence]:
        """The sentences of one split."""
        key = f"data.{split}"
        if split != "predict" and self.label_column is None:
            self.label_column = labelled_words.find_label_column(path, key)
        return labelled_words.read_sentences(
            path,
            key=key,
            tokens_column=self.tokens_column,
            label_column=None if split == "predict" else self.label_column,
        )

    def labels_of(self, record: Sentence) -> tuple[str, ...]:
        """The labels of one sentence."""
        return record.labels

    def input_of(self, record: Sentence) -> dict[str, Any]:
        """The words."""
        return {"tokens": list(record.words)}

    def prepare(self, split: str, records: Sequence[Sentence]) -> list[Example]:
        """Token ids; the class ids of first sub-tokens, or the words that are to be predicted."""
        encoded, cut = self._encode([sentence.text for sentence in records])
        offsets = encoded.pop("offset_mapping")
        rows = zip(*encoded.values(), strict=True)
        examples = [dict(zip(encoded, row, strict=True)) for row in rows]
        lost = lost_to_cut = 0
        for number, (example, sentence) in enumerate(zip(examples, records, strict=True)):
            places = labelled_words.first_subtokens(sentence.words, offsets[number])
            missing = places.count(None)
            lost_to_cut += missing * (number in cut)
            lost += missing * (number not in cut)
            length = len(example["input_ids"])
            if split == "predict":
                example["words"] = _spread(range(len(places)), places, length)
                example["word_count"] = len(places)
            else:
                example["labels"] = _spread(self.class_ids(sentence), places, length)
        words = sum(len(sentence.words) for sentence in records)
        self.tell(
            split,
            f"{split}: {len(records):,} sentences, {words:,} words; {len(cut):,} sentences cut to "
            f"{self.max_length} tokens (data.max_length), {lost_to_cut:,} words lost with that"
            + (f"; {lost:,} words have no token of their own" if lost else ""),
        )
        return examples

    def collator(self) -> Collate:
        """Return the collate function, which pads a batch of examples."""
        return _PaddedWords(super().collator(), self.tokenizer.padding_side)

    def _encode(self, texts: list[str]) -> tuple[dict[str, list[Any]], set[int]]:
        """Columns of token ids with offsets, and which of the texts were cut."""
        options = {"return_offsets_mapping": True, "verbose": False}
        encoded = dict(self.tokenizer(texts, **options))
        long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > self.max_length]
        if long:
            again = self.tokenizer(
                [texts[i] for i in long], truncation=True, max_length=self.max_length, **options
            )
            for column, values in again.items():
                for i, value in zip(long, values, strict=True):
                    encoded[column][i] = value
        return encoded, set(long)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = super()._load_tokenizer()
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not say which characters its tokens "
                "stand for, so words cannot be found again; name one of the library 'tokenizers'. "
                "(data.tokenizer)"
            )
        return tokenizer


@dataclass(frozen=True)
class _PaddedWords:
    """Pads what the tokenizer's own collator knows nothing of."""

    collator: Collate
    side: str

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        ours = ("labels", "words")
        batch = self.collator([{k: v for k, v in e.items() if k not in ours} for e in examples])
        for key in ours:
            if key in examples[0]:
                batch[key] = pad_sequence(
                    [torch.tensor(example[key]) for example in examples],
                    batch_first=True, padding_value=IGNORE_INDEX, padding_side=self.side,
                )  # fmt: skip
        return dict(batch)


def _spread(values: Sequence[int], places: Sequence[int | None], length: int) -> list[int]:
    """`values` at their `places`, `IGNORE_INDEX` in all others."""
    spread = [IGNORE_INDEX] * length
    for value, place in zip(values, places, strict=True):
        if place is not None:
            spread[place] = value
    return spread
