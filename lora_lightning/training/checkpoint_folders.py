"""Sharded checkpoints: folders in which every process has written its part.

`ModelParallelStrategy` writes them by `torch.distributed.checkpoint`, beside what is not split
(`meta.pt`). As ours hold adapters only, any process may read a whole one, whatever strategy it
runs under and however many processes wrote it.
"""

from __future__ import annotations

import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

_REST = "meta.pt"  # Lightning's name for it


def is_checkpoint_folder(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that `ModelParallelStrategy` wrote, with all its parts' index."""
    return Path(path, _REST).is_file() and Path(path, ".metadata").is_file()


def read_checkpoint_folder(
    path: str | os.PathLike[str], weights_only: bool | None = None
) -> dict[str, Any]:
    """The checkpoint as a single file would hold it: whole tensors, on the CPU."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class PlainPlanner(DefaultLoadPlanner):
        """Reads what is no tensor (learning rates) as `weights_only` does: no code is run."""

        def load_bytes(self, read_item: Any, value: Any) -> None:
            key = read_item.dest_index.fqn
            self.original_state_dict[key] = torch.load(value, weights_only=True)

    reader = FileSystemReader(path)
    index = reader.read_metadata()
    flat: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in index.state_dict_metadata.items()
    }
    with warnings.catch_warnings():  # that one process reads alone is what is wanted
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(flat, storage_reader=reader, planner=PlainPlanner(), no_dist=True)
    parts: dict[str, Any] = {}
    for key, place in index.planner_data.items():
        _put(parts, place, flat[key])
    checkpoint = torch.load(Path(path, _REST), map_location="cpu", weights_only=weights_only)
    checkpoint["state_dict"] = parts.get("state_dict", {})
    optimizers = [parts[name] for name in sorted(parts) if name.startswith("optimizer_")]
    if optimizers:
        checkpoint["optimizer_states"] = [{"state": {}, **state} for state in optimizers]
    return checkpoint


def _put(tree: Any, place: tuple[str | int, ...], value: Any) -> None:
    """Set tree[place[0]][place[1]]... = value; integers are positions in lists."""
    for here, below in pairwise(place):
        empty: Any = [] if isinstance(below, int) else {}
        if isinstance(tree, list):
            tree += [None] * (int(here) + 1 - len(tree))
            tree[int(here)] = empty if tree[int(here)] is None else tree[int(here)]
        else:
            tree.setdefault(here, empty)
        tree = tree[here]
    if isinstance(tree, list):
        tree += [None] * (int(place[-1]) + 1 - len(tree))
    tree[place[-1]] = value
