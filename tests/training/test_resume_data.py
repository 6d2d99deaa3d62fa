"""Whatever loader a run has, it gives the rest of the epoch's data, bit for bit, or says why not."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lora_lightning.errors import CheckpointError
from lora_lightning.training.resume.resumable_loader import Pass, resumable
from tests.helpers.lightning_modules import Data, Net
from tests.helpers.resumable_run import ResumableRun, differences

pytestmark = [
    pytest.mark.filterwarnings("ignore:.set_vital. is deprecated"),  # torchdata's
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling"),
]

BASE = Data().dataset


class Augmented(Dataset):
    """Noise from the global random numbers of the process that loads."""

    def __len__(self) -> int:
        return len(BASE)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = BASE[index]
        return x + torch.randn(8) + random.random() + float(np.random.rand()), y


class OwnGenerators(Augmented):
    """Noise from generators of its own, of every kind."""

    def __init__(self) -> None:
        self.new, self.old = np.random.default_rng(0), np.random.RandomState(0)
        self.python, self.torch = random.Random(0), torch.Generator()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = BASE[index]
        noise = self.new.random() + float(self.old.rand()) + self.python.random()
        return x + noise + torch.randn(8, generator=self.torch), y


class Stream(IterableDataset):
    """Of unknown length, shared out over workers; with noise where asked for."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        for index in range(info.id if info else 0, 64, info.num_workers if info else 1):
            x, y = BASE[index]
            yield x + self.noise * torch.randn(8) if self.noise else x, y


class SizedStream(Stream):
    def __len__(self) -> int:
        return 64


class StatefulStream(IterableDataset):
    """Knows where it is, as torchdata asks for."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.position < 64:
            self.position += 1
            yield BASE[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class ShufflesOnTheWay(Sampler[int]):
    """Without repetition, but drawn from the global random numbers index by index."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Iterator[int]:
        left = list(range(64))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class OwnLoader(DataLoader):
    """A user's class that changes what a loader gives."""

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield [-x, y]


class TwoLoaders(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [part for part in batch.values() if part is not None]
        return sum(super(TwoLoaders, self).training_step(part, batch_idx) for part in parts)


class Loaders(Data):
    """A data module with the given training loader."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> Any:
        return self.make()


class OneForAll(Data):
    """The very same loader trains and validates."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = DataLoader(self.dataset, 16, shuffle=True)

    def train_dataloader(self) -> DataLoader:
        return self.loader

    val_dataloader = train_dataloader


class ValidatesInWorkers(Data):
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, 16, num_workers=1, persistent_workers=True)


def loading(kind: Any = DataLoader, dataset: Callable[[], Any] = lambda: BASE, **how: Any) -> Any:
    return lambda: Loaders(lambda: kind(dataset(), **{"batch_size": 16, **how}))


def pair() -> dict[str, DataLoader]:
    return {
        "long": DataLoader(BASE, 16, shuffle=True),
        "short": DataLoader(BASE, 32, shuffle=True),
    }


def replacing() -> Loaders:
    sampler = RandomSampler(BASE, replacement=True, generator=torch.Generator())
    return Loaders(lambda: DataLoader(BASE, 16, sampler=sampler))


IN_PROCESS = {
    "augmented": loading(dataset=Augmented, shuffle=True),
    "own generators": loading(dataset=OwnGenerators, shuffle=True),
    "nested": loading(dataset=lambda: ConcatDataset([OwnGenerators(), BASE]), shuffle=True),
    "generator of the loader": lambda: Loaders(
        lambda: DataLoader(BASE, 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    ),
    "weighted": loading(sampler=WeightedRandomSampler(torch.arange(1.0, 65), 64)),
    "with replacement": replacing,
    "batch sampler": lambda: Loaders(
        lambda: DataLoader(BASE, batch_sampler=BatchSampler(RandomSampler(BASE), 16, True))
    ),
    "own __iter__": loading(OwnLoader, shuffle=True),
    "for validation too": OneForAll,
    "stateful": loading(StatefulDataLoader, shuffle=True),
    "stateful, augmented": loading(StatefulDataLoader, Augmented, shuffle=True),
    "stateful stream": loading(StatefulDataLoader, StatefulStream),
}


FAST = ("augmented", "own __iter__", "stateful", "stateful stream")  # the others are slow in sum


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in IN_PROCESS]
)
def test_in_the_main_process(tmp_path: Path, name: str) -> None:
    ResumableRun(data=IN_PROCESS[name]).check(tmp_path)


@pytest.mark.parametrize(
    "mode", ["max_size_cycle", pytest.param("max_size", marks=pytest.mark.slow)]
)
def test_two_loaders(tmp_path: Path, mode: Any) -> None:
    """The shorter one begins again in the middle of an epoch."""
    data = lambda: Loaders(lambda: CombinedLoader(pair(), mode))  # noqa: E731
    ResumableRun(module=TwoLoaders, data=data).check(tmp_path)


WORKERS = {
    "augmented": loading(dataset=Augmented, shuffle=True, num_workers=2),
    "persistent": loading(shuffle=True, num_workers=2, persistent_workers=True),
    "stateful": loading(StatefulDataLoader, shuffle=True, num_workers=2),
    "validation": ValidatesInWorkers,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The data loader has persistent_workers=True")
@pytest.mark.parametrize("name", WORKERS)
def test_in_workers(tmp_path: Path, name: str) -> None:
    """Their random numbers are those that they would have drawn."""
    two_epochs = {"max_epochs": 2}
    spots = ("batch2", "validated4", "end4", "batch5")
    ResumableRun(data=WORKERS[name], options=lambda: two_epochs, spots=spots).check(tmp_path)


@pytest.mark.slow
def test_persistent_workers_keep_random_numbers_of_their_own(tmp_path: Path) -> None:
    """The one thing that is lost, and a warning says so."""
    data = loading(dataset=Augmented, shuffle=True, num_workers=1, persistent_workers=True)
    run = ResumableRun(data=data, options=lambda: {"max_epochs": 2}, spots=("batch2", "end4"))
    straight = run.fit(tmp_path)
    resumed = run.fit(tmp_path / "batch2", tmp_path / "batch2.ckpt")  # in the first epoch it is not
    assert differences(straight, resumed) == []
    with pytest.warns(UserWarning, match=r"persistent_workers=True.*Set persistent_workers=False"):
        resumed = run.fit(tmp_path / "end4", tmp_path / "end4.ckpt")
    assert differences(straight, resumed) != []


@pytest.mark.parametrize(
    "dataset",
    [
        Stream,
        pytest.param(SizedStream, marks=pytest.mark.slow),
        pytest.param(lambda: Stream(noise=0.5), marks=pytest.mark.slow),
    ],
)
def test_streams_are_read_again(tmp_path: Path, dataset: Any) -> None:
    run = ResumableRun(data=loading(dataset=dataset))
    straight = run.fit(tmp_path)
    for spot in run.spots:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            resumed = run.fit(tmp_path / spot, tmp_path / f"{spot}.ckpt")
        assert differences(straight, resumed) == []
        again = [w for w in said if "loaded again and dropped" in str(w.message)]
        assert len(again) == (spot in ("batch2", "batch9")), spot


def test_a_sampler_that_cannot_be_found_again_is_named(tmp_path: Path) -> None:
    run = ResumableRun(data=loading(sampler=ShufflesOnTheWay()))
    straight = run.fit(tmp_path)
    with pytest.warns(UserWarning, match=r"Resume may not be exact.*torch\.Generator of its own"):
        resumed = run.fit(tmp_path / "batch2", tmp_path / "batch2.ckpt")
    assert differences(straight, resumed) != []
    resumed = run.fit(tmp_path / "end8", tmp_path / "end8.ckpt")
    assert differences(straight, resumed) == []


def test_other_data_are_noticed(tmp_path: Path) -> None:
    ResumableRun(spots=("batch3",)).fit(tmp_path)
    shorter = ResumableRun(data=loading(batch_size=24, shuffle=True), spots=())
    with pytest.warns(UserWarning, match="gives 3 batches an epoch, and gave 4 when"):
        shorter.fit(tmp_path / "shorter", tmp_path / "batch3.ckpt")
    position = {"batches": 3, "next": None, "length": 4}
    loader = resumable(DataLoader(BASE, 32))
    loader.load_state_dict({**position, "start": _start(loader)})
    with (
        pytest.warns(UserWarning, match="gives 2 batches"),
        pytest.raises(CheckpointError, match=r"after batch 3 of an epoch, .* ends after 2"),
    ):
        next(iter(loader))


def _start(loader: Any) -> Any:
    begun = iter(loader)
    next(begun)
    return begun.state()["start"]


@pytest.mark.parametrize("kind", [DataLoader, OwnLoader])
def test_a_loader_stays_itself(kind: Any) -> None:
    torch.manual_seed(0)
    before = list(kind(BASE, 16, shuffle=True))
    loader = kind(BASE, 16, shuffle=True)
    torch.manual_seed(0)
    assert resumable(loader) is loader is resumable(loader)
    assert isinstance(loader, kind)
    assert differences(before, list(loader)) == []
    for copied in (copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert type(copied) is kind
    assert resumable([1, 2]) == [1, 2]


def test_a_pass_begins_with_its_first_batch() -> None:
    loader = resumable(DataLoader(BASE, 16, shuffle=True))
    before = torch.get_rng_state()
    begun = iter(loader)
    assert isinstance(begun, Pass)
    assert torch.equal(before, torch.get_rng_state())
    next(begun)
    assert not torch.equal(before, torch.get_rng_state())
