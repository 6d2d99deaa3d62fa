"""What a file or folder holds, read as the untrusted input that it is."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lightning.checkpoint.integrity import why_unreadable
from lora_lightning.checkpoint.peft.config import (
    CONFIG,
    MIX,
    OWN,
    TENSORS,
    adds_twice,
    is_folder_name,
)
from lora_lightning.checkpoint.peft.keys import OUT_PROJ_B, PREFIX
from lora_lightning.checkpoint.peft.reading import read_config
from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder, read_checkpoint_folder
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import KEY, OPTIONS, TASK
from lora_lightning.errors import CheckpointError, nearest_file
from lora_lightning.runs.run import find_run
from lora_lightning.verbs.inspect.updates import Update, measured

DIFFUSERS = "pytorch_lora_weights.safetensors"
_COMPONENTS = ("unet.", "transformer", "text_encoder", "prior.", "controlnet.")
# Ends of the names of adapters' tensors, in PEFT's files and in ours.
_STARTS = ("lora_", "hada_", "lokr_", "oft_", "ia3_", "vera_", "shira_", "trainable_tokens_",
           "token_adapter.")  # fmt: skip


@dataclass(frozen=True)
class AdapterContents:
    """One adapter.

    Attributes:
        kind: PEFT's name of its type.
        options: Its config.
        tensors: All of its tensors, by path and name as in the base.
        updates: What it adds to each weight.

    """

    kind: str
    options: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    updates: list[Update] = field(repr=False)


@dataclass(frozen=True)
class Contents:
    """What a file or folder holds.

    Attributes:
        path: The file or folder that was read.
        kind: "checkpoint", "full checkpoint", "PEFT folder", "diffusers file" or "safetensors".
        asked: What was asked for: a run directory, where that is not `path`.
        adapters: By name.
        base: The base's name, where one is said.
        fingerprint: Shape, dtype and digest of each of the base's tensors; empty if not said.
        task: The class of this library that it was trained by.
        metrics, step, epoch, versions: Of the run, where they are said.
        missing: What is not in there, and what cannot be done without it.
        not_finite: Names of tensors with NaN or infinity.
        others: Tensors that belong to no adapter, by name.
        size: Bytes on disk.

    """

    path: Path
    kind: str
    asked: Path
    adapters: dict[str, AdapterContents] = field(default_factory=dict)
    base: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict, repr=False)
    task: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    step: int | None = None
    epoch: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict, repr=False)
    size: int = 0

    @property
    def base_digest(self) -> str | None:
        """One digest of the whole fingerprint: the same for the same base."""
        if not self.fingerprint:
            return None
        entries = sorted((name, entry[0], entry[2]) for name, entry in self.fingerprint.items())
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def read_contents(asked: Path) -> Contents:
    """Read what is at a path: a run directory, a checkpoint, a folder or a safetensors file.

    Raises:
        CheckpointError: If nothing is there, or it is damaged or of no kind that is known.

    """
    if not asked.exists():
        raise CheckpointError(
            f"There is no file or folder {str(asked)!r}.{nearest_file(asked)} (path)"
        )
    if asked.name in (CONFIG, TENSORS) and (asked.parent / CONFIG).is_file():
        return _peft_folder(asked.parent, asked)
    if asked.is_dir() and (asked / CONFIG).is_file():
        return _peft_folder(asked, asked)
    if asked.is_dir() and (asked / DIFFUSERS).is_file():
        return _safetensors(asked / DIFFUSERS, asked)
    if asked.suffix == ".safetensors":
        return _safetensors(asked, asked)
    if asked.is_dir() and not is_checkpoint_folder(asked):
        return _checkpoint(find_run(asked).checkpoint, asked)
    return _checkpoint(asked, asked)


def _checkpoint(path: Path, asked: Path) -> Contents:
    content = _loaded(path)
    common: dict[str, Any] = {
        "path": path,
        "asked": asked,
        "step": content.get("global_step"),
        "epoch": content.get("epoch"),
        "size": _size(path),
        "missing": _missing(content),
    }
    lightning = content.get("pytorch-lightning_version")
    versions = {"lightning": str(lightning)} if lightning else {}
    state = {k: v for k, v in (content.get("state_dict") or {}).items() if isinstance(v, Tensor)}
    if KEY not in content:
        return Contents(
            kind="full checkpoint",
            versions=versions,
            others=state,
            not_finite=_not_finite(state),
            **common,
        )
    content = read_adapter_checkpoint(path)  # which checks that it is whole
    said, options = content[KEY], content.get(OPTIONS) or {}
    adapters, owned = {}, set()
    for name, entry in said["adapters"].items():
        owned |= {*entry["tensors"]}
        marker = f".adapters.{name}."
        tensors = {key.replace(marker, ".", 1): state[key] for key in entry["tensors"]}
        kind = entry.get("peft_type", "LORA")
        prefix = f"{entry['module']}." if entry["module"] else ""
        adapters[name] = _adapter(kind, entry["config"], tensors, prefix)
    metrics = (said.get("metrics") or {}).items()
    return Contents(
        kind="checkpoint",
        adapters=adapters,
        base=options.get("model") if isinstance(options.get("model"), str) else None,
        fingerprint=said["base"],
        task=content.get(TASK),
        metrics={k: float(v) for k, v in metrics if isinstance(v, (Tensor, int, float))},
        versions={"lora_lightning": str(said["version"]), **versions},
        others={key: tensor for key, tensor in state.items() if key not in owned},
        not_finite=_not_finite(state),
        **common,
    )


def _loaded(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of any kind, plain values and tensors only."""
    try:
        if is_checkpoint_folder(path):
            return read_checkpoint_folder(path, weights_only=True)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise almost anything
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a checkpoint: {why_unreadable(error)}. (path)"
        ) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of Lightning: it has no entry 'state_dict'. (path)"
        )
    return content


def _missing(content: Mapping[str, Any]) -> list[str]:
    missing = []
    if not content.get("optimizer_states"):
        missing.append("optimizer state: a run can start from it (lora.init_from), not go on")
    if KEY in content and not isinstance(content.get(TASK), str):
        missing.append("how its module is made: the run's config or --module says it")
    return missing


def _peft_folder(folder: Path, asked: Path) -> Contents:
    options = read_config(folder)
    folders = {"default": folder}
    if options.get("peft_type") == MIX:
        names = [str(name) for name in options.get("adapters") or []]
        if not all(map(is_folder_name, names)):
            raise CheckpointError(
                f"{str(folder / CONFIG)!r} names {names} as its adapters, not folders beside it. "
                "(path)"
            )
        folders = {name: folder / name for name in names}
    adapters: dict[str, AdapterContents] = {}
    missing = ["step, metrics and optimizer state: a PEFT folder has none"]
    others: dict[str, Tensor] = {}
    base = None
    for name, inner in folders.items():
        options = read_config(inner)
        twice = adds_twice(options)  # what PEFT adds of an attention's out_proj
        tensors = {
            key.removeprefix(PREFIX): 2 * tensor if twice and key.endswith(OUT_PROJ_B) else tensor
            for key, tensor in _tensors(inner / TENSORS).items()
        }
        kind = str(options.get("peft_type")).removeprefix(OWN)
        adapters[name] = _adapter(kind, options, tensors, "")
        missing += _without_partner(tensors)
        base = options.get("base_model_name_or_path") or base
    if base is None:
        missing.append("the base's name")
    everything = {k: t for adapter in adapters.values() for k, t in adapter.tensors.items()}
    return Contents(
        path=folder,
        kind="PEFT folder",
        asked=asked,
        adapters=adapters,
        base=base if isinstance(base, str) else None,
        versions={"peft": str(v)} if (v := options.get("peft_version")) else {},
        missing=missing,
        not_finite=_not_finite(everything),
        others=others,
        size=sum(_size(inner / TENSORS) for inner in folders.values()),
    )


def _safetensors(file: Path, asked: Path) -> Contents:
    tensors = _tensors(file)
    plain = bool(tensors) and all(_tensor_name(key)[1].startswith("lora_") for key in tensors)
    if not (plain and all(key.startswith(_COMPONENTS) for key in tensors)):
        return Contents(
            file, "safetensors", asked, others=tensors, not_finite=_not_finite(tensors),
            missing=[f"what its tensors are for: an adapter's lie beside {CONFIG}"],
            size=_size(file),
        )  # fmt: skip
    ranks = {key: t.shape[1] for key, t in tensors.items() if ".lora_B" in key}
    # Nothing is said of alpha: it is the rank.
    options = {"lora_alpha": 1, "alpha_pattern": {}, "use_rslora": False}
    of_module: dict[str, dict[str, Tensor]] = _by_module(tensors)
    updates = []
    for path, own in of_module.items():
        r = next((r for key, r in ranks.items() if key.startswith(f"{path}.lora_B")), 1)
        updates.append(measured(path, "LORA", own, {**options, "lora_alpha": r}))
    adapter = AdapterContents("LORA", {}, tensors, updates)
    return Contents(
        file, "diffusers file", asked, {"default": adapter},
        missing=["the base's name", *_without_partner(tensors)],
        not_finite=_not_finite(tensors), size=_size(file),
    )  # fmt: skip


def _adapter(
    kind: str, options: dict[str, Any], tensors: dict[str, Tensor], prefix: str
) -> AdapterContents:
    """`prefix`: what stands before the names that the options mean."""
    updates = []
    for path, own in _by_module(tensors).items():
        update = measured(path.removeprefix(prefix), kind, own, options)
        updates.append(Update(**{**vars(update), "module": path}))
    return AdapterContents(kind, options, tensors, updates)


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        path, name = _tensor_name(key)
        found[path][name] = tensor
    return dict(found)


def _tensor_name(key: str) -> tuple[str, str]:
    """(path of the module, tensor) of a key; what is no adapter's is trained in full."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        if f"{part}.".startswith(_STARTS) and place:
            return ".".join(parts[:place]), ".".join(parts[place:])
    if "module" in parts[1:]:  # a trained copy, in our checkpoints
        place = parts.index("module", 1)
        return ".".join(parts[:place]), ".".join(parts[place:])
    return ".".join(parts[:-1]), f"module.{parts[-1]}"


def _without_partner(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for key in tensors:
        for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            for here, there in ((one, other), (other, one)):
                partner = key.replace(f".{here}", f".{there}")
                if f".{here}" in key and partner not in tensors:
                    yield f"{partner}: {key} is alone"


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{str(file)!r} is missing. (path)")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged or no safetensors file: {error} (path)"
        ) from None


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
