"""Activation checkpointing runs a layer again in backward, where it must find the same adapters.

Torch keeps no intermediate results of a checkpointed part; it calls the part's code once more when
backward needs them. Adapters that were switched meanwhile would give the gradients of another
function, without a word. So each layer notes its switches beside the running number that autograd
gives to the next operation that it records. While backward runs, the operation that it is at tells
by its own number when forward was, and so which adapters acted then.
"""

from __future__ import annotations

from typing import NamedTuple

from lora_lightning.errors import AdapterStateError
from lora_lightning.utilities._torch import next_operation_number, number_of_running_backward

_REMEMBERED = 64  # switches of one layer; whoever waits longer with backward is not checked


class Acting(NamedTuple):
    """Which adapters of a layer act, and how."""

    applied: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None

    def __str__(self) -> str:
        if self.rows is not None:
            return f"{[*self.rows]} by row"
        merged = f" and {[*self.merged]} merged" if self.merged else ""
        return f"{[*self.applied] or 'none'}{merged}"


class SwitchLog:
    """The switches of one layer, each with the number of the first operation after it."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, Acting]] = [(-1, Acting())]  # at first it was no layer

    def add(self, acting: Acting) -> None:
        """Note what acts from now on."""
        now = next_operation_number()
        entries = self._entries
        while entries and entries[-1][0] >= now:  # nothing ran between; or of another process
            entries.pop()
        if not entries or entries[-1][1] != acting:
            entries.append((now, acting))
            del entries[:-_REMEMBERED]

    def check(self, layer_name: str) -> None:
        """Raise AdapterStateError if backward runs, and its forward had other adapters than now."""
        number = number_of_running_backward()
        if number is None:
            return
        now = self._entries[-1][1]
        then = next((acting for n, acting in reversed(self._entries) if n <= number), now)
        if then != now:
            raise AdapterStateError(
                f"Adapters were switched between forward and backward: a {layer_name} under "
                f"activation checkpointing is computed again with {now} where forward had {then}, "
                "which would give wrong gradients. Call backward before you switch, or switch back "
                "(leave `disable_adapter`, enter `adapters_per_row`) before you call it."
            )
