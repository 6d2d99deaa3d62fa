"""Activation checkpointing runs a layer again in backward, where it must find the same adapters.

Torch keeps no intermediate results of a checkpointed part; it calls the part's code once more when
backward needs them. Adapters that were switched meanwhile would give the gradients of another
function, without a word. So each layer notes its switches beside the running number that autograd
gives to the next operation that it records. While backward runs, the operation that it is at tells
by its own number when forward was, and so which adapters acted then. Every thread has numbers of
its own: a switch in another thread than that of forward counts as one before it.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import torch
from torch import nn

from lora_lightning.errors import AdapterStateError
from lora_lightning.utilities._torch import next_operation_number, number_of_running_backward

_REMEMBERED = 64  # switches of one layer; whoever waits longer with backward is not checked


class Acting(NamedTuple):
    """Which adapters of a layer act, and how."""

    applied: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    scalings: tuple[float, ...] = ()  # those of `scale_adapter`

    def __str__(self) -> str:
        if self.rows is not None:
            return f"{[*self.rows]} by row"
        merged = f" and {[*self.merged]} merged" if self.merged else ""
        scaled = f" with scaling {[*self.scalings]}" if self.scalings else ""
        return f"{[*self.applied] or 'none'}{merged}{scaled}"


class _Switch(NamedTuple):
    acting: Acting
    thread: tuple[int, int] | None = None  # process and thread that it was in
    number: int = -1  # of the first operation after it, in that thread


class SwitchLog:
    """The switches of one layer, each with the number of the first operation after it."""

    def __init__(self) -> None:
        self._entries = [_Switch(Acting())]  # at first it was no layer
        self._forward_in: tuple[int, int] | None = None  # the thread of the last one

    def add(self, acting: Acting) -> None:
        """Note what acts from now on."""
        now = _Switch(acting, _thread(), next_operation_number())
        entries = self._entries
        while entries and entries[-1][1:] == now[1:]:  # nothing ran between
            entries.pop()
        if not entries or entries[-1].acting != acting:
            entries.append(now)
            del entries[:-_REMEMBERED]

    def check(self, layer_name: str) -> None:
        """Raise AdapterStateError if backward runs, and its forward had other adapters than now."""
        number = number_of_running_backward()
        if number is None:
            self._forward_in = _thread()
            return
        now = self._entries[-1].acting
        before = (
            switch.acting
            for switch in reversed(self._entries)
            if switch.number <= number or self._forward_in not in (None, switch.thread)
        )
        then = next(before, now)
        if then != now:
            raise AdapterStateError(
                f"Adapters were switched between forward and backward: a {layer_name} under "
                f"activation checkpointing is computed again with {now} where forward had {then}, "
                "which would give wrong gradients. Call backward before you switch, or switch back "
                "(leave `disable_adapter`, enter `adapters_per_row`) before you call it."
            )


class RecomputationCheck:
    """Before the forward of a module that is no adapted layer, but shows tensors of an adapter."""

    def __init__(self, switches: SwitchLog, name: str) -> None:
        self.switches, self.name = switches, name

    def __call__(self, module: nn.Module, args: object) -> None:
        """Refuse to be computed again with the tensors of another adapter."""
        if not torch.compiler.is_compiling():
            self.switches.check(self.name)


def watch(module: nn.Module, switches: SwitchLog) -> None:
    """Check the module each time that it is called, until `unwatch`.

    Not what torch's own Transformer layers run: a hook there keeps them from their fused kernels,
    and the base would compute with other bits.
    """
    module.register_forward_pre_hook(RecomputationCheck(switches, type(module).__name__))


def unwatch(module: nn.Module, switches: SwitchLog) -> None:
    """Undo `watch`; a part of what trains in full may have a bias of another adapter."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, RecomputationCheck) and hook.switches is switches:
            del module._forward_pre_hooks[key]


def _thread() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()
