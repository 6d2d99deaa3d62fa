"""Labelled images as batches of pixels, as a Hugging Face vision model wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.batches.image_augmentation import Augmentation
from lora_lightning.data.labelled_data_module import Collate, LabelledDataModule
from lora_lightning.data.sources.image_record import ImageRecord, load_image
from lora_lightning.data.sources.labelled_images import read_images
from lora_lightning.data.split_data_module import SplitOptions
from lora_lightning.data.validation_split import split_records
from lora_lightning.errors import ConfigError

Example = dict[str, Any]


class ImageDataModule(LabelledDataModule):
    """Images and their classes.

    Each source is a folder with one folder of images for each class; a JSONL, JSON or CSV file with
    the paths of images (relative ones from the file's folder) and their labels; a folder saved by
    Hugging Face `datasets`, a Parquet file, or the name of a dataset on the hub, with a column of
    images. Every image is opened before training; pixels are decoded when a batch needs them, made
    RGB, and prepared by the model's own image processor.

    Args:
        train: Training data; their labels are the classes.
        val: Validation data, or the share of the training images held out for it, from 0 (none) to
            below 1. A hash of each image decides, so the split is the same in every run and equal
            files never fall on both sides.
        test: Test data.
        predict: Images to predict; labels are not read, and a folder needs no classes.
        image_column: Column or key of the image, or of its path.
        label_column: Column or key of the label, a string or an integer.
        label_names: The classes in order. Default: the sorted distinct labels of `train`. Where
            none of these names is a number, a number among the data's labels is the place of a
            class in this list, from 0.
        image_processor: Name of the image processor's model. Default: the LightningModule's
            `model_name`.
        random_horizontal_flip: Probability that a training image is mirrored.
        random_crop: The least share of a training image's area that is kept of it, above 0: a part
            of random size, place and ratio of sides (3/4 to 4/3 of its own); 1 keeps all.
        batch_size: Images per batch.
        num_workers: Worker processes per data loader; 0 loads in the main process.
    """

    labelled = "image"

    def __init__(
        self,
        train: str | None = None,
        val: float | str = 0.1,
        test: str | None = None,
        predict: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        label_names: list[str] | None = None,
        image_processor: str | None = None,
        random_horizontal_flip: float = 0.0,
        random_crop: float = 1.0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        options = SplitOptions(train, val, test, predict, batch_size, num_workers)
        super().__init__(options, label_column, label_names)
        self.image_column = image_column
        self.image_processor_name = image_processor
        self.augmentation = Augmentation(random_horizontal_flip, random_crop)

    @cached_property
    def image_processor(self) -> Any:
        """The image processor, loaded when it is first used."""
        name = self.image_processor_name
        return self.load_processor("AutoImageProcessor", name, "data.image_processor")[0]

    def read(self, split: str, path: str) -> list[ImageRecord]:
        """The images of one split."""
        return read_images(
            path,
            key=f"data.{split}",
            image_column=self.image_column,
            label_column=None if split == "predict" else self.label_column,
        )

    def hold_out(
        self, records: Sequence[ImageRecord]
    ) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """Training and validation images of those of `train`."""
        return split_records(records, self.val_fraction, content=lambda record: record.content)

    def input_of(self, record: ImageRecord) -> dict[str, Any]:
        """The path of the image, or its place in a dataset."""
        return {"image": str(record.image) if isinstance(record.image, Path) else record.where}

    def label_place(self, record: ImageRecord) -> str:
        """Place of `record`: the label may be its folder's name."""
        return record.where

    def prepare(self, split: str, records: Sequence[ImageRecord]) -> ImageDataset:
        """A dataset of pixels and class ids."""
        self.tell(split, f"{split}: {len(records):,} images")
        predicts = split == "predict"
        return ImageDataset(
            records,
            None if predicts else [number for r in records for number in self.class_ids(r)],
            self.image_processor,
            self.augmentation if split == "train" else None,
        )

    def collator(self) -> Collate:
        """Return the collate function, which takes images of one size."""
        return collate_images


@dataclass(eq=False)  # torch hashes data sets
class ImageDataset(Dataset[Example]):
    """Images by their number, decoded and prepared.

    Attributes:
        records: The images.
        labels: Their class ids; None where they are to be predicted.
        processor: Makes `pixel_values` (channels, height, width) of an image.
        augmentation: What is done to an image before.
    """

    records: Sequence[ImageRecord]
    labels: Sequence[int] | None
    processor: Any
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        image = load_image(self.records[index])
        if self.augmentation is not None:
            image = self.augmentation(image)
        pixels = cast(Tensor, self.processor(images=image, return_tensors="pt")["pixel_values"][0])
        if self.labels is None:
            return {"pixel_values": pixels, "where": self.records[index].where}
        return {"pixel_values": pixels, "labels": self.labels[index]}


def collate_images(examples: list[Example]) -> Example:
    """A batch: `pixel_values` (batch, channels, height, width) and `labels`, or `where`."""
    pixels = [example["pixel_values"] for example in examples]
    if len({image.shape for image in pixels}) > 1:
        sizes = sorted({f"{image.shape[-1]} x {image.shape[-2]}" for image in pixels})
        raise ConfigError(
            f"the image processor leaves images of different sizes ({', '.join(sizes)}), which "
            "cannot share a batch. Use one that crops or resizes to one size "
            "(data.image_processor), or batches of one image (data.batch_size)."
        )
    batch: Example = {"pixel_values": torch.stack(pixels)}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    else:
        batch["where"] = [example["where"] for example in examples]
    return batch
