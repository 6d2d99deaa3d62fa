"""Random state as plain values, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch


def random_state(cuda: Literal["all", "own", "none"] = "all") -> dict[str, Any]:
    """State of Python's, NumPy's and PyTorch's generators; loads with `weights_only=True`.

    Of the CUDA devices too, if it uses any: of all, its current one, or none.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    # Nothing was drawn from a device that this process has not begun to use, and merely to ask it
    # takes its memory, or fails in a forked process.
    devices: Any = torch.cuda
    cuda = cuda if devices.is_initialized() else "none"
    return {
        "python": _python_state(random.getstate()),
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": {
            "all": devices.get_rng_state_all,
            "own": lambda: [devices.get_rng_state()],
            "none": list,
        }[cuda](),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Bring the generators into a state that `random_state` gave."""
    random.setstate(_python_tuple(state["python"]))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    devices = range(torch.cuda.device_count())
    if devices and len(state["cuda"]) == 1:  # of the one that the process uses
        torch.cuda.set_rng_state(state["cuda"][0])
    else:
        for device, own in zip(devices, state["cuda"], strict=False):
            torch.cuda.set_rng_state(own, device)


def seed_all(seed: int) -> None:
    """Start all generators of this process from `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of every device


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore, on leaving, the random state (of the CPU) that there was on entering."""
    state = random_state(cuda="none")
    try:
        yield
    finally:
        set_random_state(state)


# -- generators that belong to an object (a sampler, a dataset) ------------------------------------

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def generator_state(generator: Generator) -> Any:
    """State of one generator as plain values."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _python_state(generator.getstate())
    return _plain(_bit_generator(generator).state)


def set_generator_state(generator: Generator, state: Any) -> None:
    """Bring a generator of the same kind into a state that `generator_state` gave."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_python_tuple(state))
    else:
        _bit_generator(generator).state = _arrays(state)


def _bit_generator(generator: np.random.Generator | np.random.RandomState) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator
    return generator._bit_generator


def _python_state(state: tuple[Any, ...]) -> list[Any]:
    version, internal, gauss = state
    return [version, list(internal), gauss]


def _python_tuple(state: list[Any]) -> tuple[Any, ...]:
    version, internal, gauss = state
    return version, tuple(internal), gauss


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"array": state.tolist(), "dtype": str(state.dtype)}
    return state


def _arrays(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if state.keys() == {"array", "dtype"}:
        return np.array(state["array"], dtype=state["dtype"])
    return {key: _arrays(value) for key, value in state.items()}
