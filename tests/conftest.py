"""What every test starts from: no hub, fixed seeds, few threads."""

import os

# Before torch is imported anywhere: two processes with two OpenMP threads each on two cores spin
# in each other's way and slow down twenty-fold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)  # seed_everything's, which processes started here obey


_PATCHED = ("__setattr__", "__delattr__", "__init__")
_ORIGINALS = {
    kind: {name: vars(kind)[name] for name in _PATCHED if name in vars(kind)}
    for kind in (DataLoader, BatchSampler)
}


@pytest.fixture(autouse=True)
def _data_loaders_as_torch_has_them() -> Iterator[None]:
    """Take back what Lightning leaves patched for the whole process where a loader's hook raises.

    Its `_replace_dunder_methods` restores the methods of DataLoader and BatchSampler only where
    nothing goes wrong in between; where that happens twice, what it keeps is patched itself.
    """
    yield
    for kind, methods in _ORIGINALS.items():
        for name in _PATCHED:
            if f"__old{name}" in vars(kind):
                delattr(kind, f"__old{name}")
            if vars(kind).get(name) is not methods.get(name):
                delattr(kind, name)
                if name in methods:
                    setattr(kind, name, methods[name])


@pytest.fixture(scope="session")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a module of one's own, made once a process."""
    from tests.helpers.trained_runs import own_module_run

    return own_module_run(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def lm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a tiny language model, made once a process."""
    from tests.helpers.trained_runs import language_model_run

    return language_model_run(tmp_path_factory.mktemp("lm"))
