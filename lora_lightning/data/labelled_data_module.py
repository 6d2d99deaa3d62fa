"""Base of data modules with classes: their order, and the number of each label."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch.utils.data import DataLoader, Dataset

from lora_lightning.data.split_data_module import SplitDataModule, SplitOptions
from lora_lightning.errors import ConfigError, RecordError, first_few, nearest_hint
from lora_lightning.utilities.constants import IGNORE_INDEX

# Makes a batch of examples.
Collate = Callable[[list[Any]], Any]


class LabelledDataModule(SplitDataModule):
    """Splits whose records have labels; a subclass documents its options."""

    # What has a label, in words of error messages.
    labelled: ClassVar[str]

    def __init__(
        self, options: SplitOptions, label_column: str | None, label_names: list[str] | None
    ) -> None:
        super().__init__(options)
        if label_names is not None and len(set(label_names)) < len(label_names):
            raise ConfigError(f"label_names holds a name twice: {label_names}. (data.label_names)")
        self.label_column = label_column
        self._label_names = label_names
        self._named = label_names is not None
        # Only of names that were given is it known which number means which.
        self._numbered = label_names is not None and not any(map(str.isdigit, label_names))

    @property
    def label_names(self) -> list[str]:
        """The classes; a label's index in this list is its class id."""
        if self._label_names is None and self.paths["train"] is not None:
            self._label_names = self._training_labels()
        if self._label_names is None:
            raise ConfigError(
                "the classes are not known: give data.train, whose labels they are, or name them "
                "in order. (data.label_names)"
            )
        return self._label_names

    def labels_of(self, record: Any) -> Iterable[str | None]:
        """The labels of one record."""
        return [record.label]

    def label_place(self, record: Any) -> str:
        """Place of the label of `record`, for error messages."""
        return f"{record.where}, column {self.label_column!r}"

    def setup(self, stage: str | None = None) -> None:
        """Read, check and prepare what `stage` needs and no earlier stage has prepared."""
        # The classes are the training labels, so these are read first, for every stage.
        if self._label_names is None and self.paths["train"] is not None:
            self._label_names = self._training_labels()
        super().setup(stage)

    def class_ids(self, record: Any) -> list[int]:
        """The numbers of a record's labels.

        Raises:
            RecordError: If one of them is none of the classes.
        """
        index = self._class_index
        labels = [str(label) for label in self.labels_of(record)]
        for label in labels:
            if label not in index:
                hint = nearest_hint(label, self.label_names)
                training = "the training data have none such"
                why = "it is none of those named" if self._named else training
                raise RecordError(
                    f"{self.label_place(record)}: label {label!r} is unknown: {why}. Known labels: "
                    f"{first_few(self.label_names, 20)}.{hint} (data.label_names)"
                )
        return [index[label] for label in labels]

    def lengths(self, examples: Any) -> list[int]:
        """Return the length of each example; by default all are alike."""
        return [1] * len(examples)

    def collator(self) -> Collate:
        """Return the collate function."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches in a random order; examples of about equal length share a batch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, by length."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, by length."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches without labels, in the order of the data."""
        return self._batches(self.prepared("predict"))

    def _loader(self, split: str, *, shuffle: bool = False) -> DataLoader[Any]:
        examples = self.prepared(split)
        order = self.order(self.lengths(examples), shuffle=shuffle, group=True)
        return self._batches(Labelled(examples), order)

    def _batches(self, examples: Any, sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(
            examples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collator(),
        )

    @cached_property
    def _class_index(self) -> dict[str, int]:
        names = self.label_names
        numbers = {str(i): i for i in range(len(names))} if self._numbered else {}
        return numbers | {name: number for number, name in enumerate(names)}

    def _training_labels(self) -> list[str]:
        records = list(self.records("train"))
        if self.paths["val"] is None:  # a rare class may be held out as a whole
            records += self.records("val")
        labels = sorted({label for record in records for label in self.labels_of(record) if label})
        if len(labels) < 2:
            raise RecordError(
                f"{self.paths['train']}: every training {self.labelled} has the label "
                f"{first_few(map(repr, labels))}; classification needs at least 2. "
                "(data.label_column)"
            )
        return labels


@dataclass(eq=False)  # torch hashes data sets
class Labelled(Dataset[Any]):
    """Labelled examples, and one past the end the first without its label.

    It fills up what processes share out, so that all have equally many, and counts for nothing.
    """

    examples: Any  # with class ids as `labels`, one or a list

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        if index < len(self):
            return self.examples[index]
        first = self.examples[0]  # once: an image is decoded for it
        several = isinstance(first["labels"], list)
        none = [IGNORE_INDEX] * len(first["labels"]) if several else IGNORE_INDEX
        return {**first, "labels": none}
