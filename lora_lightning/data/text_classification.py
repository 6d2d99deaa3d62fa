"""Labelled texts as batches of token ids, for any Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_lightning.data.records import Record, read_records
from lora_lightning.data.sampler import LengthGroupedSampler
from lora_lightning.data.splits import SplitDataModule
from lora_lightning.errors import ConfigError, RecordError, did_you_mean, first_few

Example = dict[str, Any]


class TextClassificationDataModule(SplitDataModule):
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
        label_names: The classes in order. Default: the sorted distinct labels of `train`.
        tokenizer: Name of the tokenizer's model. Default: the LightningModule's `model_name`.
        max_length: Longer texts are cut to this many tokens; how many were cut is reported.
        batch_size: Texts per batch, each batch padded to its longest text.
        num_workers: Worker processes per data loader; 0 loads in the main process.
    """

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
        super().__init__(train, val, test, predict, batch_size, num_workers)
        if label_names is not None and len(set(label_names)) < len(label_names):
            raise ConfigError(f"label_names holds a name twice: {label_names}. (data.label_names)")
        self.text_column = text_column
        self.label_column = label_column
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self._label_names = label_names
        self._tokenizer: Any = None

    @property
    def label_names(self) -> list[str]:
        """The classes; a label's index in this list is its class id. Known after `setup`."""
        if self._label_names is None:
            raise ConfigError(
                "the classes are not known: give data.train, whose labels they are, or name them "
                "in order. (data.label_names)"
            )
        return self._label_names

    def read(self, split: str, path: str) -> list[Record]:
        """The records of one split; subclasses with data of their own override this."""
        return read_records(
            path,
            key=f"data.{split}",
            text_column=self.text_column,
            label_column=None if split == "predict" else self.label_column,
        )

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenise what `stage` needs and no earlier stage has prepared."""
        # The classes are the training labels, so these are read first, for every stage.
        if self._label_names is None and self.paths["train"] is not None:
            self._label_names = self._training_labels()
        super().setup(stage)

    def train_dataloader(self) -> DataLoader[Example]:
        """Training batches, in a random order that puts texts of about equal length together."""
        examples = self.prepared("train")
        sampler = LengthGroupedSampler([_length(e) for e in examples], self.batch_size)
        return self._loader(examples, sampler)

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Validation batches; no loader where nothing is held out."""
        examples = self.prepared("val")
        return self._loader(_by_length(examples)) if examples else []

    def test_dataloader(self) -> DataLoader[Example]:
        """Test batches."""
        return self._loader(_by_length(self.prepared("test")))

    def predict_dataloader(self) -> DataLoader[Example]:
        """Batches without labels, in the order of the file."""
        return self._loader(self.prepared("predict"))

    def _training_labels(self) -> list[str]:
        records = self.records("train")
        if self.paths["val"] is None:  # a rare class may be held out as a whole
            records = [*records, *self.records("val")]
        labels = sorted({record.label for record in records if record.label})
        if len(labels) < 2:
            raise RecordError(
                f"{self.paths['train']}: every training text has the label {labels[0]!r}; "
                "classification needs at least 2. (data.label_column)"
            )
        return labels

    def prepare(self, split: str, records: Sequence[Record]) -> list[Example]:
        """Token ids and class ids."""
        self._tokenizer = self._tokenizer or self._load_tokenizer()
        texts = [record.text for record in records]
        encoded = self._tokenizer(texts, truncation=True, max_length=self.max_length)
        rank_zero_info(
            f"{split}: {len(texts):,} texts, {self._count_cut(texts, encoded):,} of them cut to "
            f"{self.max_length} tokens (data.max_length)"
        )
        columns = dict(encoded)
        if split != "predict":
            columns["labels"] = self._class_ids(records)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _count_cut(self, texts: list[str], encoded: Any) -> int:
        lengths = [len(ids) for ids in encoded["input_ids"]]
        full = [text for text, n in zip(texts, lengths, strict=True) if n == self.max_length]
        if not full:
            return 0
        # A text that just fits is not cut: allowing one token more tells the two apart.
        again = self._tokenizer(full, truncation=True, max_length=self.max_length + 1)
        return sum(len(ids) > self.max_length for ids in again["input_ids"])

    def _class_ids(self, records: Sequence[Record]) -> list[int]:
        index = {name: number for number, name in enumerate(self.label_names)}
        for record in records:
            if record.label not in index:
                near = did_you_mean(str(record.label), index)
                hint = f" Did you mean {near!r}?" if near else ""
                raise RecordError(
                    f"{record.where}, column {self.label_column!r}: label {record.label!r} is "
                    "unknown: the training data have none such. Known labels: "
                    f"{first_few(index, 20)}.{hint} (data.label_names)"
                )
        return [index[str(record.label)] for record in records]

    def _load_tokenizer(self) -> Any:
        tokenizer, name, key = self.load_processor(
            "AutoTokenizer", self.tokenizer_name, "data.tokenizer"
        )
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"the tokenizer of {name!r} has no padding token, so its texts cannot share a "
                f"batch; name one that has. ({key})"
            )
        fewest = tokenizer.num_special_tokens_to_add() + 1
        if not fewest <= self.max_length <= tokenizer.model_max_length:
            raise ConfigError(
                f"max_length must be from {fewest} to {tokenizer.model_max_length}, which is what "
                f"{name!r} takes; found {self.max_length}. (data.max_length)"
            )
        return tokenizer

    def _loader(
        self, examples: list[Example], sampler: Sampler[int] | None = None
    ) -> DataLoader[Example]:
        from transformers import DataCollatorWithPadding

        return DataLoader(
            cast(Dataset[Example], examples),  # a list is a map-style dataset
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=DataCollatorWithPadding(self._tokenizer),
        )


def _length(example: Example) -> int:
    return len(example["input_ids"])


def _by_length(examples: list[Example]) -> list[Example]:
    """In an order that wastes little on padding; metrics do not depend on it."""
    return sorted(examples, key=_length)
