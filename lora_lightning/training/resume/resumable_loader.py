"""Data loaders whose position in an epoch can be saved, and found again.

The loader stays the same object, and only its class is swapped for a subclass of it, as that of
a layer to which an adapter is attached. Two things change:

* The iterator of a pass (one epoch) is made when its first batch is asked for. Lightning makes it
  earlier, in a resumed run too early: before random states are restored, and before the sampler
  is told the epoch.
* A pass remembers the random states at its start and how many batches it has given. From these
  another process finds the same position: it starts a pass in those states and leaves out as many
  batches. Without workers their indices are drawn, but nothing is loaded; with workers they are
  loaded and dropped, so that the workers' random numbers are the same afterwards as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice
from types import MethodType
from typing import Any, SupportsIndex

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.strategies import Strategy
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lora_lightning.errors import CheckpointError
from lora_lightning.training._lightning import WRAPPED_SAMPLER, trainer_of
from lora_lightning.training.messages import rank_zero_info, rank_zero_warn
from lora_lightning.utilities import rng
from lora_lightning.utilities._torch import has_workers, index_iterator

_PARTS = (
    "sampler", "batch_sampler", WRAPPED_SAMPLER, "dataset", "datasets", "collate_fn",
    "transform", "transforms",
)  # fmt: skip
_OURS = ("_position", "_loaded", "_next_goes_on")


class LazyLoader(DataLoader[Any]):
    """A data loader that keeps its own state (torchdata's StatefulDataLoader), made resumable."""

    base_type: type  # its own class

    def __iter__(self) -> Any:  # torch says: its own kind of iterator
        """Begin a pass with the first batch that is asked for."""
        return Pass(self)

    def new_iterator(self, goes_on: bool = False) -> Iterator[Any]:
        """The iterator that the loader's own class makes.

        With `goes_on` from a state that was loaded, else from the head of the epoch after it.
        """
        stateless = isinstance(self, ResumableLoader)
        if stateless and self.persistent_workers and not has_workers(self):
            # Workers are made once in a run, passes begun many times: what making them draws must
            # not depend on whether the run was interrupted.
            with rng.random_state_kept():
                torch.rand(1)
                super().__iter__()
        if self.__dict__.pop("_loaded", None) is not None:
            with rng.random_state_kept():  # the uninterrupted run had made that iterator before
                self.state_dict() if goes_on else super().__iter__()
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """The loader's own state; what was loaded, where no pass has begun since."""
        if "_loaded" in self.__dict__:
            return self._loaded
        with rng.random_state_kept():
            state: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the loader's own state."""
        super().load_state_dict(state)  # type: ignore[misc]
        self._loaded, self._next_goes_on = state, True

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key not in _OURS}
        return _plain_loader, (self.base_type, state)


class ResumableLoader(LazyLoader):
    """A stateless data loader with a position that can be resumed."""

    def state_dict(self) -> dict[str, Any]:
        """An empty state: the position is that of a `Pass`, of which a loader can have several."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `Pass.state` in the next pass; called by Lightning to resume an epoch."""
        self._position = state


def _plain_loader(kind: Any, state: dict[str, Any]) -> Any:
    loader = kind.__new__(kind)
    loader.__dict__.update(state)
    return loader


@cache
def _resumable(kind: type) -> type:
    stateful = hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict")
    base = LazyLoader if stateful else ResumableLoader
    name = f"Resumable{kind.__name__}"
    return type(name, (base, kind), {"__module__": __name__, "base_type": kind})


def resumable(loader: object) -> object:
    """Swap the class of a torch `DataLoader`; any other iterable is returned as it is."""
    if isinstance(loader, DataLoader) and not isinstance(loader, LazyLoader):
        kind: Any = type(loader)
        loader.__class__ = _resumable(kind)
    return loader


def make_loaders_resumable(strategy: Strategy) -> None:
    """Override `process_dataloader` on this strategy; doing it again changes nothing."""
    strategy.process_dataloader = MethodType(_process_dataloader, strategy)  # type: ignore[method-assign]


def _process_dataloader(self: Strategy, dataloader: object) -> object:
    dataloader = type(self).process_dataloader(self, dataloader)
    trainer = trainer_of(self.lightning_module)
    fits = trainer is not None and trainer.state.fn == "fit"
    return resumable(dataloader) if fits else dataloader


class Pass(Iterator[Any]):
    """One pass over a loader."""

    def __init__(self, loader: LazyLoader) -> None:
        self.loader = loader
        self.batches = 0  # given so far
        self.start: dict[str, Any] | None = None  # the random states when it began
        # The loader's own state before the last batch, where it is fetched ahead
        self.loader_before: dict[str, Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._position = loader.__dict__.pop("_position", None) or None
        # Lightning fetches one batch ahead of loaders whose length is not known. In the main
        # process that batch took random numbers, earlier than a checkpoint would say.
        self._streams = isinstance(loader.dataset, IterableDataset)
        unsized = self._streams and sized_len(loader) is None
        self._fetched_ahead = unsized and loader.num_workers == 0
        self._keep_state = unsized and not isinstance(loader, ResumableLoader)
        self._before: dict[str, Any] | None = None
        self._waiting: list[Any] = []
        # True where a loader goes on from its own state, in the same epoch
        self.goes_on = loader.__dict__.pop("_next_goes_on", False)

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._begin()
        if self._waiting:
            return self._waiting.pop()
        if self._fetched_ahead:
            self._before = randomness(self.loader)
        if self._keep_state:
            self.loader_before = self.loader.state_dict()
        batch = next(self._iterator)
        self.batches += 1
        return batch

    def state(self, ahead: int = 0) -> dict[str, Any]:
        """The position as plain values, `ahead` batches before what was given."""
        if self.start is None:
            return self._position or {}
        return {
            "batches": self.batches - ahead,
            "start": self.start,
            "next": self._before if ahead == 1 else None,
            "length": None if self._streams else len(self.loader),
        }

    def _begin(self) -> Iterator[Any]:
        if self._position is None:
            self.start = randomness(self.loader)
            return self.loader.new_iterator(self.goes_on)
        now = randomness(self.loader)
        self.start = self._position["start"]
        set_randomness(self.loader, self._position["start"])
        iterator: Iterator[Any] = self.loader.new_iterator()
        self._leave_out(iterator, self._position)
        if self._position["next"] is not None:
            self._before = self._position["next"]
            set_randomness(self.loader, self._before)
            self._waiting = list(islice(iterator, 1))
            self.batches += len(self._waiting)
        set_randomness(self.loader, now)
        return iterator

    def _leave_out(self, iterator: Iterator[Any], position: dict[str, Any]) -> None:
        loader, count, length = self.loader, position["batches"], position["length"]
        if length is not None and length != len(loader):
            rank_zero_warn(
                f"The data loader gives {len(loader)} batches an epoch, and gave {length} when the "
                "checkpoint was written in the middle of one: from here on the data are not those "
                "of the uninterrupted run. Use the same data and batch size. (data)"
            )
        # A class with an __iter__ of its own gives another iterator than torch's.
        indices = index_iterator(iterator)
        by_index = loader.num_workers == 0 and indices is not None and not self._streams
        if self._streams:
            rank_zero_warn(
                f"Resuming in the middle of an epoch of an IterableDataset: {count} batches are "
                "loaded again and dropped, which is exact only if it gives the same data again. "
                "Else use torchdata's StatefulDataLoader, with state_dict and load_state_dict on "
                "the dataset. (data)"
            )
        elif not by_index:
            seen = f"{count} batches already seen are loaded again and left out"
            rank_zero_info(f"Resuming in the middle of an epoch: {seen}.")
        source = indices if by_index and indices is not None else iterator
        after_first = None
        for batch in range(count):
            if next(source, self) is self:  # any object that no loader gives
                raise CheckpointError(
                    f"The checkpoint was written after batch {count} of an epoch, but the data "
                    f"loader ends after {batch}: it is not the same data. (data)"
                )
            self.batches += 1
            if batch == 0:
                after_first = rng.random_state(cuda="none")
        if after_first is not None and not _same(after_first, rng.random_state(cuda="none")):
            rank_zero_warn(
                "Resume may not be exact: the data loader draws from the global random numbers "
                "with every batch, which the model uses as well, so the order of the data may not "
                "be found again. Give its sampler or dataset a torch.Generator of its own. (data)"
            )


def warn_of_workers(loader: object) -> None:
    """Say what cannot be found again of workers that were at work in an earlier epoch."""
    if isinstance(loader, ResumableLoader) and loader.persistent_workers:
        rank_zero_warn(
            "The data loader has persistent_workers=True: if its dataset draws random numbers in "
            "its workers (augmentation), they are not those of the uninterrupted run, because "
            "workers keep their random state from epoch to epoch. Set persistent_workers=False "
            "for an exact resume. (data)"
        )


def randomness(loader: Any) -> dict[str, Any]:
    """State of the process's generators (CPU) and of those that belong to the loader."""
    return {"process": rng.random_state(cuda="none"), "generators": generator_states(loader)}


def set_randomness(loader: Any, state: dict[str, Any]) -> None:
    """Bring them into a state that `randomness` gave."""
    rng.set_random_state(state["process"])
    set_generator_states(loader, state["generators"])


def generator_states(loader: Any) -> dict[str, Any]:
    """State of the generators that the loader, its samplers or its dataset have, by path.

    A DistributedSampler draws from its seed and the epoch.
    """
    return {
        path: g.seed if isinstance(g, DistributedSampler) else rng.generator_state(g)
        for path, g in _generators(loader).items()
    }


def set_generator_states(loader: Any, states: dict[str, Any]) -> None:
    """Bring them into states that `generator_states` gave."""
    for path, generator in _generators(loader).items():
        if path in states and isinstance(generator, DistributedSampler):
            generator.seed = states[path]
        elif path in states:
            rng.set_generator_state(generator, states[path])


def _generators(loader: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(owner: object, path: str) -> None:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        if isinstance(owner, rng.Generator | DistributedSampler):
            found[path] = owner
        if isinstance(owner, (list, tuple)):
            for index, item in enumerate(owner[:100]):  # parts, not the data themselves
                visit(item, f"{path}.{index}")
        else:
            for name, value in getattr(owner, "__dict__", {}).items():
                if name in _PARTS or isinstance(value, rng.Generator):
                    visit(value, f"{path}.{name}".lstrip("."))

    visit(loader, "")
    return found


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return torch.equal(first["torch"], second["torch"]) and all(
        first[key] == second[key] for key in ("python", "numpy")
    )
