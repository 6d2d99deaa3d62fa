"""Let a module's own forward read other tensors than its parameters, for the time of a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lora_lightning.errors import AdapterStateError

_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def covered(module: nn.Module, covers: Mapping[str, Any]) -> Iterator[None]:
    """Inside, attributes of these names stand before the module's own, which are never touched.

    Raises:
        AdapterStateError: If a parametrization hides one of them.

    """
    attributes = module.__dict__
    with _alone(module):
        before = {name: attributes[name] for name in covers if name in attributes}
        try:
            attributes.update(covers)
            for name, cover in covers.items():
                if getattr(module, name) is not cover:
                    raise AdapterStateError(
                        f"The parameter {name!r} of a {type(module).__name__} is parametrized, and "
                        "the parametrization hides the adapter on it. Take it off."
                    )
            yield
        finally:
            for name in covers:
                del attributes[name]
            attributes.update(before)


def _alone(module: nn.Module) -> AbstractContextManager[Any]:
    # What is covered is covered for all threads, so they take turns.
    if torch.compiler.is_compiling():
        return nullcontext()
    return cast(AbstractContextManager[Any], _locks.setdefault(module, threading.RLock()))
