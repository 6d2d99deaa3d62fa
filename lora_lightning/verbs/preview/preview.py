"""`lora_lightning.preview`: the data of a run as the model will see them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lora_lightning.data.labelled_data_module import LabelledDataModule
from lora_lightning.data.text import TextDataModule
from lora_lightning.errors import ConfigError
from lora_lightning.training._lightning import trainer_of
from lora_lightning.training.messages import notes_kept
from lora_lightning.utilities.rng import random_state_kept
from lora_lightning.verbs.preview.batches import preview_batches
from lora_lightning.verbs.preview.labelled import preview_labelled
from lora_lightning.verbs.preview.result import Preview
from lora_lightning.verbs.preview.texts import preview_texts


def preview(
    data: Any = None,
    module: LightningModule | None = None,
    rows: int = 2,
    tokens: int = 1000,
) -> Preview:
    """Show the data as the model will see them, before anything is trained.

        from lora_lightning import CausalLM, TextDataModule, preview

        preview(TextDataModule("my.jsonl"), CausalLM("Qwen/Qwen2.5-0.5B-Instruct"))

    Texts for language models: the first examples, what is learned of them marked; how much is
    learned, cut and left out; in which tokens turns end; lengths. Classifiers: examples with their
    labels, how often each class is there; of images, sizes, normalisation and augmentation. Of any
    other data: shapes, dtypes and values of the first batch, and its texts where it holds
    `input_ids` and a tokenizer is known. No weights are loaded and nothing is written; random
    numbers stay where they are.

    Args:
        data: A LightningDataModule or a DataLoader. Default: the loaders of `module`.
        module: The LightningModule that the data are for; nothing of it runs. It says which
            tokenizer or image processor, where the data do not.
        rows: Examples that are shown.
        tokens: The most tokens that are shown of one text.

    Returns:
        What prints as a text, and is a page in a notebook.

    Raises:
        ConfigError: If there are no data, or `rows` or `tokens` is not positive.
        RecordError: If a row cannot be used, as in training.
    """
    for name, number in (("rows", rows), ("tokens", tokens)):
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, found {number}. ({name})")
    ours = isinstance(data, (TextDataModule, LabelledDataModule))
    if ours and not data.given_splits():
        raise ConfigError("there are no data to preview: name a file. (data.train)")
    if data is None and module is None:
        raise ConfigError("there are no data to preview: give a data module. (data)")
    with random_state_kept(), _attached(data, module), notes_kept() as notes:
        if isinstance(data, TextDataModule):
            found = preview_texts(data, rows, tokens)
        elif isinstance(data, LabelledDataModule):
            found = preview_labelled(data, rows, tokens)
        else:
            found = preview_batches(data, module, rows, tokens)
    if not (found.texts or found.parts):
        raise ConfigError(
            "there are no data to preview: neither a data module nor the module has a "
            "`train_dataloader`. (data)"
        )
    # Such as the format that was recognised; the rest is in `told`.
    others = [note for note in dict.fromkeys(notes) if note not in found.told.values()]
    return replace(found, parts=(*found.parts, *others))


def idle_trainer(kind: type[Trainer] = Trainer) -> Trainer:
    """A Trainer that runs nothing, on the CPU, whatever devices there are or a run is for."""
    with notes_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of devices that are not used
        return kind(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip


@contextmanager
def _attached(data: Any, module: LightningModule | None) -> Iterator[None]:
    """A Trainer for data that ask one for the module, or how many processes there are."""
    trainer = idle_trainer()
    if module is not None:
        trainer.strategy.connect(module)
    kinds = (LightningDataModule, LightningModule)
    owners: list[Any] = [one for one in (data, module) if isinstance(one, kinds)]
    before = [trainer_of(one) if one is module else one.trainer for one in owners]
    try:
        for one in owners:
            one.trainer = trainer
        yield
    finally:
        for one, its_own in zip(owners, before, strict=True):
            one.trainer = its_own
