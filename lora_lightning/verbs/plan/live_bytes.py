"""Bytes of the tensors that live while a step runs, by what they are for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lightning.utilities._torch import TorchDispatchMode, asks_for_values


class Answers(NamedTuple):
    """What is said where tensors without values are asked for them.

    Attributes:
        condition: Of a condition: False where a mask of attention is needed.
        tokens: Of a batch, by which a mask of learned ones is known.
        learned: How many of these are learned; None: all.

    """

    condition: bool = False
    tokens: int = 0
    learned: int | None = None


ALL_LEARNED = Answers()


class LiveBytes(TorchDispatchMode):
    """Counts each storage once, from the operation that makes it until nothing holds it.

    A storage counts for the `part` that is current when it is made. `peaks` has, for each phase,
    the bytes of all parts at the moment when they were most.

    Operations that ask tensors without values for their values are answered: a number is 0, a
    mask is true everywhere but for tokens that are not learned, and conditions are as `answers`
    has them.
    """

    def __init__(self, answers: Answers = ALL_LEARNED) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers = answers
        self.part = "other"
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._phase = ""
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    @contextmanager
    def phase(self, name: str, part: str) -> Iterator[None]:
        """Record the peak inside as that of `name`; what is made inside counts for `part`."""
        before = self._phase, self.part
        self.enter(name, part)
        try:
            yield
        finally:
            self._phase, self.part = before

    def enter(self, phase: str, part: str) -> None:
        """Go over to another phase inside of one."""
        self._phase, self.part = phase, part
        self._note_peak()

    def count(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that were there before, if they are not counted yet."""
        for tensor in tensors:
            self._count(tensor, part)

    def _count(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.live[part] += size
        self._known[key] = weakref.finalize(storage, self._forget, key, part, size)
        self._known[key].atexit = False
        self._note_peak()

    def _forget(self, key: int, part: str, size: int) -> None:
        self._known.pop(key, None)
        self.live[part] -= size

    def _note_peak(self) -> None:
        before = self.peaks.get(self._phase)
        if before is None or self.live.total() > before.total():
            self.peaks[self._phase] = self.live.copy()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it makes."""
        try:
            made = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if not asks_for_values(error):
                raise
            made = self._answer(func, args, error)
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor, self.part)
        return made

    def _answer(self, func: Any, args: Any, error: RuntimeError) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            if dtype == torch.bool:
                return self.answers.condition
            return 0.0 if dtype.is_floating_point else 0
        if func is aten.index.Tensor:
            indices: list[Tensor | None] = []
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    count = self._true(index)
                    indices += [index.new_empty(count, dtype=torch.long)] * index.dim()
                else:
                    indices.append(index)
            return func(args[0], indices)
        raise error

    def _true(self, mask: Tensor) -> int:
        """How much of a mask is taken for true."""
        _, tokens, learned = self.answers
        count = mask.numel()
        return count if learned is None or count != tokens else learned
