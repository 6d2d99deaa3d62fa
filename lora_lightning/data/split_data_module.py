"""Base of all data modules: which splits there are, when each is read, what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lora_lightning.data.batches.epoch_sampler import EpochSampler
from lora_lightning.data.validation_split import split_records
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.training.messages import rank_zero_info
from lora_lightning.utilities.hub import load_pretrained

# The splits that each Trainer stage reads.
STAGE_SPLITS = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


@dataclass(frozen=True)
class SplitOptions:
    """Options of every data module, which each documents, checked when they are given."""

    train: str | None
    val: float | str
    test: str | None
    predict: str | None
    batch_size: int
    num_workers: int

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"val must be a file, or the share of the training data held out, at least 0 and "
                f"below 1; found {self.val}. (data.val)"
            )
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            number = getattr(self, name)
            if number < least:
                raise ConfigError(f"{name} must be at least {least}, found {number}. (data.{name})")

    @property
    def val_fraction(self) -> float:
        """Share of the training data held out for validation."""
        return 0.0 if isinstance(self.val, str) else float(self.val)

    @property
    def paths(self) -> dict[str, str | None]:
        """Source of each split; None where no source is named."""
        val = self.val if isinstance(self.val, str) else None
        return {"train": self.train, "val": val, "test": self.test, "predict": self.predict}


class SplitDataModule(LightningDataModule):
    """Reads, checks and prepares the data of each split once, when a stage needs it.

    A subclass says how to `read` a split's records and how to `prepare` them for its loaders.
    """

    def __init__(self, options: SplitOptions) -> None:
        super().__init__()
        self.val_fraction = options.val_fraction
        self.paths = options.paths
        if self.paths["val"] is None and not self.val_fraction:
            # As if it were not defined: Lightning then leaves validation out. Of an empty loader
            # it would make a validation of nothing, whose mean is no number.
            self.val_dataloader = MethodType(LightningDataModule.val_dataloader, self)  # type: ignore[method-assign]
        self.batch_size = options.batch_size
        self.num_workers = options.num_workers
        # What was said of each split that is prepared: how much there is, and what became of it.
        self.told: dict[str, str] = {}
        self._records: dict[str, Sequence[Any]] = {}
        self._prepared: dict[str, Any] = {}
        self._seed: int | None = None  # of the order, once training has begun

    def read(self, split: str, path: str) -> Sequence[Any]:
        """The records of one split."""
        raise NotImplementedError

    def prepare(self, split: str, records: Sequence[Any]) -> Any:
        """Make what the loaders of `split` serve; a split without records is not prepared."""
        raise NotImplementedError

    def input_of(self, record: Any) -> dict[str, Any]:
        """What a record of `predict` says, to stand beside what is predicted; nothing by default.

        It holds for loaders that serve `prepared("predict")`.
        """
        return {}

    def hold_out(self, records: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Training and validation records of those of `train`."""
        return split_records(records, self.val_fraction)

    def tell(self, split: str, line: str) -> None:
        """Say what there is in a split, and what was cut or left out; `told` keeps it."""
        self.told[split] = line
        rank_zero_info(line)

    def setup(self, stage: str | None = None) -> None:
        """Read, check and prepare what `stage` needs and no earlier stage has prepared."""
        # The Trainer may be given other loaders; a split that is missed is found in `records`.
        for split in self.given_splits():
            if stage is None or split in STAGE_SPLITS[stage]:
                self.prepared(split)

    def given_splits(self) -> list[str]:
        """The splits there are data for."""
        held_out = self.paths["train"] is not None
        return [s for s, p in self.paths.items() if p is not None or (s == "val" and held_out)]

    def records(self, split: str) -> Sequence[Any]:
        """The records of `split`, read at the first call."""
        if split not in self._records:
            held_out = self.paths["val"] is None and split in ("train", "val")
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

    def prepared(self, split: str) -> Any:
        """Prepare the records of `split`, once; an empty list where there are none."""
        if split not in self._prepared:
            records = self.records(split)
            self._prepared[split] = self.prepare(split, records) if records else []
        return self._prepared[split]

    @property
    def order_seed(self) -> int:
        """The seed of the random order, the same on all processes, and in a run that is resumed."""
        if self._seed is None:
            seed = torch.initial_seed() % 2**63
            self._seed = self.trainer.strategy.broadcast(seed) if self.trainer else seed
        return self._seed

    def order(self, lengths: list[int], *, shuffle: bool, group: bool) -> EpochSampler:
        """This process's share of the rows, in the order in which they are served.

        `lengths`, `shuffle` and `group` as for `EpochSampler`.
        """
        seed = self.order_seed if shuffle else 0
        return EpochSampler(
            lengths, self.batch_size, shuffle=shuffle, group=group, seed=seed, **self.shares()
        )

    def shares(self) -> dict[str, int]:
        """Return `rank` and `num_replicas` of this process; nothing of a single one."""
        return (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}

    def state_dict(self) -> dict[str, Any]:
        """The seed of the order."""
        return {} if self._seed is None else {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the order of the run that goes on."""
        self._seed = state_dict["seed"]

    def load_processor(self, auto_class: str, name: str | None, key: str) -> tuple[Any, str, str]:
        """A tokenizer or image processor, by default that of the Trainer's LightningModule.

        Args:
            auto_class: Its class in transformers, such as `AutoTokenizer`.
            name: The model it belongs to; None is the LightningModule's `model_name`.
            key: The config key of `name`.

        Returns:
            The processor, the model's name, and the config key that this name came from.
        """
        options: dict[str, Any] = {}
        source = key
        if name is None:
            module = self.trainer.lightning_module if self.trainer else None
            name, source = getattr(module, "model_name", None), "model.model"
            if isinstance(module, PretrainedTask):
                options = module.options.hub()
        if name is None:
            raise ConfigError(
                f"no {key.rpartition('.')[2]} is named, and there is no LightningModule with a "
                f"`model_name` to take it from. ({key})"
            )
        return load_pretrained(auto_class, name, source, **options), name, source

    def _hold_out(self, records: Sequence[Any]) -> None:
        train, val = self.hold_out(records)
        if not train or (self.val_fraction and not val):
            raise ConfigError(
                f"val={self.val_fraction} splits the {len(records)} training records into "
                f"{len(train)} for training and {len(val)} for validation. Change it, or name a "
                "file. (data.val)"
            )
        self._records.update(train=train, val=val)
