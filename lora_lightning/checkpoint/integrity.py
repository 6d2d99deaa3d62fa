"""A hash of every part of a checkpoint, so that a damaged one is noticed, and where.

Hashed are the values as they are loaded again, not the bytes of the file: SHA-256 over each value's
type and content, containers in their own order, tensors by dtype, shape and bytes. The device, and
whether a tensor is a view, do not matter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lightning.checkpoint.state_dict import KEY

HASHES = "content"  # key of the hashes in a checkpoint's "lora_lightning" entry
_BY_TENSOR = ("state_dict", "current_model_state")  # where a difference is told tensor by tensor


def with_hashes(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """`checkpoint` with the hashes of its content in its "lora_lightning" entry; a shallow copy."""
    return {**checkpoint, KEY: {**checkpoint[KEY], HASHES: content_hashes(checkpoint)}}


def content_hashes(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Hash (32 hexadecimal digits) of every entry, in the state dicts of every tensor."""
    parts: dict[str, Any] = {}
    for key, value in checkpoint.items():
        if key in _BY_TENSOR and isinstance(value, Mapping):
            parts |= {f"{key}/{name}": tensor for name, tensor in value.items()}
        elif key == KEY and isinstance(value, Mapping):
            parts[key] = {k: v for k, v in value.items() if k != HASHES}
        else:
            parts[str(key)] = value
    return {name: content_hash(value) for name, value in parts.items()}


def damaged_parts(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """The parts that are not what was written, empty for a whole checkpoint.

    None where it cannot be told: the checkpoint carries no hashes (an older version wrote it).
    """
    metadata = checkpoint.get(KEY)
    hashes = metadata.get(HASHES) if isinstance(metadata, Mapping) else None
    if not isinstance(hashes, Mapping):
        return None
    found = content_hashes(checkpoint)
    return [str(n) for n in {**hashes, **found} if hashes.get(n) != found.get(n)]


def content_hash(value: object) -> str:
    """32 hexadecimal digits of SHA-256 over a value of plain types and tensors.

    Of objects of any other type (they do not load with `weights_only=True`) only the type counts.
    """
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()[:32]


def _feed(sha: hashlib._Hash, value: object) -> None:
    if isinstance(value, Tensor):
        _feed_tensor(sha, value)
    elif isinstance(value, Mapping):
        _put(sha, "mapping", len(value))
        for key, item in value.items():
            _feed(sha, key)
            _feed(sha, item)
    elif isinstance(value, (list, tuple)):
        _put(sha, "tuple" if isinstance(value, tuple) else "list", len(value))
        for item in value:
            _feed(sha, item)
    elif isinstance(value, (set, frozenset)):
        _put(sha, "set", *sorted(content_hash(item) for item in value))
    elif isinstance(value, str):
        _put(sha, "str", str.__str__(value))
    elif isinstance(value, (bytes, bytearray)):
        _put(sha, "bytes", value.hex())
    elif value is None or isinstance(value, (bool, complex, torch.dtype, torch.device)):
        _put(sha, type(value).__name__, value)
    elif isinstance(value, int):
        _put(sha, "int", int.__repr__(value))
    elif isinstance(value, float):
        _put(sha, "float", float.__repr__(value))
    else:
        _put(sha, "object", type(value).__module__, type(value).__qualname__)


def _feed_tensor(sha: hashlib._Hash, tensor: Tensor) -> None:
    _put(sha, "tensor", tensor.dtype, list(tensor.shape))
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized:
        _put(sha, "of a type without plain bytes", type(tensor).__qualname__)
    elif not tensor.is_meta:
        flat = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)


def _put(sha: hashlib._Hash, *words: object) -> None:
    # A text's length in front of it: "ab", "c" is not "a", "bc".
    for word in words:
        encoded = str(word).encode("utf-8", "surrogatepass")
        sha.update(b"%d:" % len(encoded))
        sha.update(encoded)


def why_unreadable(error: Exception) -> str:
    """What an error of `torch.load` says, in a line; what to do about objects of classes."""
    text = str(error)
    named = re.search(r"Unsupported (?:global|class)[^:]*:? (?:GLOBAL )?([\w.]+)", text)
    if named is None and isinstance(error, (KeyError, IndexError)):
        return "it is no file of torch.save"  # bytes taken for instructions of pickle
    if named is None:
        return (text.splitlines() or [type(error).__name__])[0].partition(". ")[0]
    return (
        f"beside tensors and plain values it holds {named.group(1)}, which torch does not load "
        "with weights_only=True. If you trust the file, give weights_only=False to "
        "load_from_checkpoint, load_adapter or Trainer.fit; save_adapter then writes a folder that "
        "anyone can load"
    )
