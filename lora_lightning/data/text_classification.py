"""Labelled texts as batches of token ids, for any Hugging Face tokenizer."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_lightning.data.records import Record, read_records
from lora_lightning.data.sampler import LengthGroupedSampler
from lora_lightning.data.split import split_records
from lora_lightning.errors import ConfigError, RecordError, did_you_mean, first_few
from lora_lightning.tasks.pretrained import load_pretrained

# The splits that each Trainer stage reads; None stands for all that are given.
STAGE_SPLITS = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}
Example = dict[str, Any]


class TextClassificationData(LightningDataModule):
    """Texts and labels from JSONL, CSV or Hugging Face dataset folders.

    Args:
        train: File or folder of the training data; its labels are the classes.
        validation: Validation data. Default: a part of the training data, see
            `validation_fraction`.
        test: Test data.
        predict: Texts to predict; labels are not read.
        validation_fraction: Share of the training texts held out where no `validation` is given,
            0 <= fraction < 1; 0 trains without validation. A hash of each text decides, so the
            split is the same in every run and equal texts never fall on both sides.
        text_column: Column or key of the text.
        label_column: Column or key of the label, a string or an integer.
        label_names: The classes in order. Default: the sorted distinct labels of `train`.
        tokenizer: Name of the tokenizer's model. Default: the LightningModule's `model_name`.
        max_tokens: Longer texts are cut to this many tokens; how many were cut is reported.
        batch_size: Texts per batch, each batch padded to its longest text.
        num_workers: Worker processes per data loader; 0 loads in the main process.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        validation_fraction: float = 0.1,
        text_column: str = "text",
        label_column: str = "label",
        label_names: list[str] | None = None,
        tokenizer: str | None = None,
        max_tokens: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction must be at least 0 and below 1, found {validation_fraction}. "
                "(data.validation_fraction)"
            )
        if label_names is not None and len(set(label_names)) < len(label_names):
            raise ConfigError(f"label_names holds a name twice: {label_names}. (data.label_names)")
        self.paths = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.validation_fraction = validation_fraction
        self.text_column = text_column
        self.label_column = label_column
        self.tokenizer_name = tokenizer
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._label_names = label_names
        self._records: dict[str, list[Record]] = {}
        self._examples: dict[str, list[Example]] = {}
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
        # The Trainer may be given other loaders; a split that is missed is found in `records`.
        splits = [s for s in self._given_splits() if stage is None or s in STAGE_SPLITS[stage]]
        # The classes are the training labels, so these are read first, for every stage.
        if self._label_names is None and self.paths["train"] is not None:
            self._label_names = self._training_labels()
        for split in splits:
            self._prepared(split)

    def records(self, split: str) -> list[Record]:
        """The records of `split`, read at the first call."""
        if split not in self._records:
            held_out = self.paths["validation"] is None and split in ("train", "validation")
            path = self.paths["train" if held_out else split]
            if path is None:
                raise ConfigError(
                    f"there is no {split} data: set data.{split} to a file or dataset folder. "
                    f"(data.{split})"
                )
            if held_out:
                self._hold_out(self.read("train", path))
            else:
                self._records[split] = self.read(split, path)
        return self._records[split]

    def train_dataloader(self) -> DataLoader[Example]:
        """Training batches, in a random order that puts texts of about equal length together."""
        examples = self._prepared("train")
        sampler = LengthGroupedSampler([_length(e) for e in examples], self.batch_size)
        return self._loader(examples, sampler)

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Validation batches; no loader where nothing is held out."""
        examples = self._prepared("validation")
        return self._loader(_by_length(examples)) if examples else []

    def test_dataloader(self) -> DataLoader[Example]:
        """Test batches."""
        return self._loader(_by_length(self._prepared("test")))

    def predict_dataloader(self) -> DataLoader[Example]:
        """Batches without labels, in the order of the file."""
        return self._loader(self._prepared("predict"))

    def _prepared(self, split: str) -> list[Example]:
        if split not in self._examples:
            self._examples[split] = self._encoded(split, self.records(split))
        return self._examples[split]

    def _given_splits(self) -> list[str]:
        held_out = self.paths["train"] is not None
        return [
            s for s, p in self.paths.items() if p is not None or (s == "validation" and held_out)
        ]

    def _hold_out(self, records: list[Record]) -> None:
        train, validation = split_records(records, self.validation_fraction)
        if not train or (self.validation_fraction and not validation):
            raise ConfigError(
                f"validation_fraction {self.validation_fraction} splits the {len(records)} "
                f"training records into {len(train)} for training and {len(validation)} for "
                "validation. Change it, or give data.validation. (data.validation_fraction)"
            )
        self._records.update(train=train, validation=validation)

    def _training_labels(self) -> list[str]:
        records = self.records("train")
        if self.paths["validation"] is None:  # a rare class may be held out as a whole
            records = records + self.records("validation")
        labels = sorted({record.label for record in records if record.label})
        if len(labels) < 2:
            raise RecordError(
                f"{self.paths['train']}: every training text has the label {labels[0]!r}; "
                "classification needs at least 2. (data.label_column)"
            )
        return labels

    def _encoded(self, split: str, records: list[Record]) -> list[Example]:
        if not records:
            return []
        self._tokenizer = self._tokenizer or self._load_tokenizer()
        texts = [record.text for record in records]
        encoded = self._tokenizer(texts, truncation=True, max_length=self.max_tokens)
        rank_zero_info(
            f"{split}: {len(texts):,} texts, {self._count_cut(texts, encoded):,} of them cut to "
            f"{self.max_tokens} tokens (data.max_tokens)"
        )
        columns = dict(encoded)
        if split != "predict":
            columns["labels"] = self._class_ids(records)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _count_cut(self, texts: list[str], encoded: Any) -> int:
        lengths = [len(ids) for ids in encoded["input_ids"]]
        full = [text for text, n in zip(texts, lengths, strict=True) if n == self.max_tokens]
        if not full:
            return 0
        # A text that just fits is not cut: allowing one token more tells the two apart.
        again = self._tokenizer(full, truncation=True, max_length=self.max_tokens + 1)
        return sum(len(ids) > self.max_tokens for ids in again["input_ids"])

    def _class_ids(self, records: list[Record]) -> list[int]:
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
        name, key = self.tokenizer_name, "data.tokenizer"
        if name is None:
            module = self.trainer.lightning_module if self.trainer else None
            name, key = getattr(module, "model_name", None), "model.model"
        if name is None:
            raise ConfigError(
                "no tokenizer is named, and there is no LightningModule with a `model_name` to "
                "take it from. (data.tokenizer)"
            )
        tokenizer = load_pretrained("AutoTokenizer", name, key)
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"the tokenizer of {name!r} has no padding token, so its texts cannot share a "
                f"batch; name one that has. ({key})"
            )
        fewest = tokenizer.num_special_tokens_to_add() + 1
        if not fewest <= self.max_tokens <= tokenizer.model_max_length:
            raise ConfigError(
                f"max_tokens must be from {fewest} to {tokenizer.model_max_length}, which is what "
                f"{name!r} takes; found {self.max_tokens}. (data.max_tokens)"
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
