"""Sharded checkpoints: folders in which every process has written its part.

`ModelParallelStrategy` and `FSDPStrategy` write them by `torch.distributed.checkpoint`, beside what
is not split (`meta.pt`). As ours hold adapters only, any process may read a whole one, whatever
strategy it runs under and however many processes wrote it.
"""

from __future__ import annotations

import os
import pickle
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lora_lightning.checkpoint.integrity import why_unreadable
from lora_lightning.errors import CheckpointError

_REST, _INDEX = "meta.pt", ".metadata"  # Lightning's name and torch's
_PLAIN = (torch.dtype, torch.layout, torch.memory_format)
_ENTRIES = {
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
    "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
}  # fmt: skip


def is_checkpoint_folder(path: str | os.PathLike[str]) -> bool:
    """True for a folder that one of them wrote, with all its parts' index."""
    return Path(path, _REST).is_file() and Path(path, _INDEX).is_file()


def read_checkpoint_folder(
    path: str | os.PathLike[str], weights_only: bool | None = None
) -> dict[str, Any]:
    """The checkpoint as a single file would hold it: whole tensors, on the CPU.

    Raises:
        CheckpointError: If a part is missing, damaged or of another kind.

    """
    try:
        parts = _read_parts(Path(path))
        checkpoint: dict[str, Any] = torch.load(
            Path(path, _REST), map_location="cpu", weights_only=weights_only
        )
    except Exception as error:  # damaged files raise almost anything
        reason = why_unreadable(error)[:400]
        raise CheckpointError(
            f"The sharded checkpoint {str(path)!r} cannot be read: {reason}. Resume from another "
            "one. (ckpt_path)"
        ) from error
    checkpoint["state_dict"] = parts.get("state_dict", parts.get("model", {}))  # FSDP1's name
    optimizers = [parts[name] for name in sorted(parts) if name.startswith("optimizer_")]
    if optimizers:
        checkpoint["optimizer_states"] = [{"state": {}, **state} for state in optimizers]
    return checkpoint


def _read_parts(path: Path) -> dict[str, Any]:
    """Model and optimizer states, nested as they were when they were written."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    class Planner(DefaultLoadPlanner):
        """Reads what is no tensor (learning rates) as `weights_only` does: no code is run."""

        def load_bytes(self, read_item: Any, value: Any) -> None:
            key = read_item.dest_index.fqn
            self.original_state_dict[key] = torch.load(value, weights_only=True)

    class Reader(FileSystemReader):
        """Reads the index, a pickle, likewise."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(path / _INDEX, "rb") as file:
                return _IndexUnpickler(file).load()

    reader = Reader(path)
    index = reader.read_metadata()
    flat: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in index.state_dict_metadata.items()
    }
    with warnings.catch_warnings():  # that one process reads alone is what is wanted
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(flat, storage_reader=reader, planner=Planner(), no_dist=True)
    parts: dict[str, Any] = {}
    for key, place in index.planner_data.items():
        _put(parts, place, flat[key])
    return parts


class _IndexUnpickler(pickle.Unpickler):
    """Knows what an index is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if it is one of an index; every other one is refused."""
        known = (
            (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, 0), _PLAIN)))
            or (module == "torch.serialization" and name == "_get_layout")
            or (module.split(".")[0] == "pathlib" and name.endswith("Path") and "." not in name)
            or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            or (module == "torch.distributed.checkpoint.metadata" and name in _ENTRIES)
        )
        if not known:
            raise pickle.UnpicklingError(f"its index asks for {module}.{name}")
        return super().find_class(module, name)


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
