"""Labelled texts as batches of token ids, for any Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_lightning.data.labelled_text_data_module import Example, LabelledTextDataModule
from lora_lightning.data.sources.labelled_texts import Record, read_records
from lora_lightning.data.split_data_module import SplitOptions

if TYPE_CHECKING:
    from transformers import BatchEncoding


class TextClassificationDataModule(LabelledTextDataModule):
    """Texts and labels from JSONL, CSV or Hugging Face dataset folders.

    Args:
        train: File or folder of the training data; its labels are the classes.
        val: Validation data, or the share of the training texts held out for it, from 0 (none) to
            below 1. A hash of each text decides, so the split is the same in every run and equal
            texts never fall on both sides.
        test: Test data.
        predict: Texts to predict; labels are not read.
        text_column: Column or key of the text.
        label_column: Column or key of the label, a string or an integer.
        label_names: The classes in order. Default: the sorted distinct labels of `train`. Where
            none of these names is a number, a number among the data's labels is the place of a
            class in this list, from 0.
        tokenizer: Name of the tokenizer's model. Default: the LightningModule's `model_name`.
        max_length: Longer texts are cut to this many tokens; how many were cut is reported.
        batch_size: Texts per batch, each batch padded to its longest text.
        num_workers: Worker processes per data loader; 0 loads in the main process.
    """

    labelled = "text"

    def __init__(
        self,
        train: str | None = None,
        val: float | str = 0.1,
        test: str | None = None,
        predict: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        label_names: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        options = SplitOptions(train, val, test, predict, batch_size, num_workers)
        super().__init__(options, label_column, label_names, tokenizer, max_length)
        self.text_column = text_column

    def read(self, split: str, path: str) -> list[Record]:
        """The records of one split; subclasses with data of their own override this."""
        return read_records(
            path,
            key=f"data.{split}",
            text_column=self.text_column,
            label_column=None if split == "predict" else self.label_column,
        )

    def input_of(self, record: Record) -> dict[str, Any]:
        """The text."""
        return {"text": record.text}

    def prepare(self, split: str, records: Sequence[Record]) -> list[Example]:
        """Token ids and class ids."""
        texts = [record.text for record in records]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        self.tell(
            split,
            f"{split}: {len(texts):,} texts, {self._count_cut(texts, encoded):,} of them cut to "
            f"{self.max_length} tokens (data.max_length)",
        )
        columns = dict(encoded)
        if split != "predict":
            columns["labels"] = [number for r in records for number in self.class_ids(r)]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _count_cut(self, texts: list[str], encoded: BatchEncoding) -> int:
        lengths = [len(ids) for ids in encoded["input_ids"]]
        full = [text for text, n in zip(texts, lengths, strict=True) if n == self.max_length]
        if not full:
            return 0
        # A text that just fits is not cut: allowing one token more tells the two apart.
        again = self.tokenizer(full, truncation=True, max_length=self.max_length + 1)
        return sum(len(ids) > self.max_length for ids in again["input_ids"])
