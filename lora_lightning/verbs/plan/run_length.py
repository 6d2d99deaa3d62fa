"""How long a run is: rows, the longest of them, steps, tokens; as far as its data can be read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lora_lightning.data.batches.example_store import BatchRows
from lora_lightning.data.split_data_module import SplitDataModule
from lora_lightning.errors import LoraError
from lora_lightning.examination.recipe import quiet
from lora_lightning.utilities.constants import IGNORE_INDEX


@dataclass(frozen=True)
class RunLength:
    """What the training data say; None where they do not.

    Attributes:
        rows: Of training data.
        longest: Tokens of the longest row.
        equal: How many rows are as long.
        longest_target: Learned or target tokens of the longest one.
        learned: Learned tokens of each row, most first.
        tokens: Of one epoch.
        batches: Of one epoch and process.
        first_batch: Of data that are not this library's.
        reason: Why data were not read.

    """

    rows: int | None = None
    longest: int | None = None
    longest_target: int | None = None
    equal: int = 0
    learned: tuple[int, ...] = ()
    tokens: int | None = None
    batches: int | None = None
    first_batch: Any = None
    reason: str = ""

    def most_learned(self, rows: int) -> int | None:
        """Learned tokens that a batch of so many rows can have; None where that is not known."""
        if not self.learned:
            return None
        most = self.learned[:rows]
        return sum(most) + (rows - len(most)) * most[0]


def read_length(data: LightningDataModule | None, module: LightningModule) -> RunLength:
    """Read the training data as a run would; nothing is written."""
    if data is None:
        return RunLength(reason="no data are given")
    try:
        with quiet():
            trainer = Trainer(accelerator="cpu", devices=1, logger=False, barebones=False,
                              enable_checkpointing=False, enable_progress_bar=False,
                              enable_model_summary=False)  # fmt: skip
            trainer.strategy.connect(module)
            data.trainer = trainer
            data.prepare_data()
            data.setup("fit")
            return _of_rows(data) if isinstance(data, SplitDataModule) else _of_loader(data)
    except (LoraError, OSError) as error:
        return RunLength(reason=str(error).split("\n")[0])
    except Exception as error:  # of data that anybody may have written
        return RunLength(reason=f"{type(error).__name__}: {str(error).splitlines()[0:1]}")
    finally:
        data.trainer = None


def _of_rows(data: Any) -> RunLength:
    rows = data.prepared("train")
    try:
        count = len(rows)
    except TypeError:
        return RunLength(reason="the data are a stream")
    lengths = getattr(rows, "lengths", None)
    if not lengths:
        return RunLength(count)
    target, learned = None, []
    if isinstance(rows, BatchRows):
        for i in range(count):
            labels = [example.labels for example in rows[i]]
            target = max(target or 0, *map(len, labels))
            learned.append(sum(int((each != IGNORE_INDEX).sum()) for each in labels))
    longest, most_first = max(lengths), tuple(sorted(learned, reverse=True))
    return RunLength(count, longest, target, lengths.count(longest), most_first, sum(lengths))


def _of_loader(data: Any) -> RunLength:
    loader = data.train_dataloader()
    try:
        batches = len(loader)
    except TypeError:
        batches = None
    return RunLength(batches=batches, first_batch=next(iter(loader), None))


def optimizer_steps(batches: int | None, options: dict[str, Any]) -> int | None:
    """Steps of the whole run, of `batches` an epoch; None where that is not known.

    An epoch's last, partial window of accumulation is a step.
    """
    limit = options.get("limit_train_batches")
    if batches is not None and limit is not None:
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    by_steps = options.get("max_steps", -1)
    epochs = options.get("max_epochs")
    if epochs is None:
        epochs = 1000 if by_steps == -1 else -1  # Lightning's
    windows = options.get("accumulate_grad_batches") or 1
    by_epochs = None
    if batches is not None and epochs != -1:
        by_epochs = math.ceil(batches / windows) * epochs
    known = [n for n in (by_epochs, None if by_steps == -1 else by_steps) if n is not None]
    return min(known, default=None)
