"""Preview of any batch: what can be said of tensors that nobody has described."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.console import RenderableType
from torch import Tensor
from torch.utils.data import DataLoader

from lora_lightning.errors import ConfigError, LoraError
from lora_lightning.utilities.constants import IGNORE_INDEX
from lora_lightning.utilities.hub import load_pretrained
from lora_lightning.verbs.preview.result import Preview, table
from lora_lightning.verbs.preview.tokens import Piece, TokenText, pieces_of

_ENTRIES = 4  # of a list that are described one by one
_VALUES = 10  # of whole numbers that are listed


def preview_batches(data: Any, module: Any, rows: int, tokens: int) -> Preview:
    """The first training batch, and the first of validation where there is one."""
    texts: list[TokenText] = []
    parts: list[RenderableType] = []
    told: dict[str, str] = {}
    tokenizer = None
    for split, loader in _loaders(data, module):
        batch = next(iter(loader), None)
        if batch is None:
            raise ConfigError(f"the {split} data loader gives no batch: it is empty. (data)")
        told[split] = f"{split}: {_amount(loader)}"
        header = ["", "shape", "dtype", "values"]
        parts.append(table(f"first batch ({split})", header, list(_leaves(batch, "batch"))))
        if not texts and _has_tokens(batch):
            tokenizer = tokenizer or _tokenizer(data, module)
            if tokenizer is not None:
                texts += _texts(tokenizer, batch, rows, tokens)
    return Preview(tuple(texts), tuple(parts), told)


def _loaders(data: Any, module: Any) -> Iterator[tuple[str, Any]]:
    """Each loader by the name of its split."""
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("fit")
    elif data is not None:
        yield from _each("train", data)
        return
    source = module if data is None else data
    for split, hook in (("train", "train_dataloader"), ("val", "val_dataloader")):
        # Lightning's own, of what defines none, only raises.
        defined = getattr(type(source), hook, None)
        if getattr(defined, "__module__", "").startswith(("lightning.", "pytorch_lightning.")):
            continue
        if hook in vars(source) and split == "val":  # taken off, as ours do without data for it
            continue
        if defined is not None:
            yield from _each(split, getattr(source, hook)())


def _each(split: str, loaders: Any) -> Iterator[tuple[str, Any]]:
    """One loader, or several in a list or a dict, or one within the other."""
    if _holds_loaders(loaders):
        named = isinstance(loaders, Mapping)
        for name, loader in loaders.items() if named else enumerate(loaders):
            yield from _each(f"{split}[{name!r}]", loader)
    elif not hasattr(loaders, "__iter__") or isinstance(loaders, (Mapping, Tensor, str)):
        raise ConfigError(
            f"the {split} data are of the type {type(loaders).__name__}, which gives no batches; "
            "give a LightningDataModule or a DataLoader. (data)"
        )
    else:
        yield split, loaders


def _holds_loaders(value: Any) -> bool:
    """Tell loaders in a list or a dict from a list of batches."""
    if not isinstance(value, (Mapping, list, tuple)):
        return False
    parts = list(value.values() if isinstance(value, Mapping) else value)
    return any(isinstance(part, DataLoader) or _holds_loaders(part) for part in parts)


def _amount(loader: Any) -> str:
    try:
        count = f"{len(loader):,} batches"
    except (TypeError, NotImplementedError):
        count = "batches without a known end"
    size = getattr(loader, "batch_size", None)
    return f"{count} of {size} rows" if isinstance(size, int) else count


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str, str, str]]:
    """A line for each tensor or other value of a batch."""
    if hasattr(value, "__array__") and not isinstance(value, Tensor) and hasattr(value, "dtype"):
        value = torch.as_tensor(value) if str(value.dtype)[:1] in "fiub" else value
    if isinstance(value, Tensor):
        shape = " x ".join(map(str, value.shape)) or "one number"
        yield name, shape, str(value.dtype).removeprefix("torch."), _range(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, part in zip(value._fields, value, strict=True):
            yield from _leaves(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (str, bytes)) for v in value):
        yield name, f"{len(value)} texts", "str", f"{value[0]!r:.80}"
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value[:_ENTRIES]):
            yield from _leaves(part, f"{name}[{number}]")
        if len(value) > _ENTRIES:
            yield f"{name}[...]", f"{len(value)} entries", type(value).__name__, ""
    else:
        yield name, "", type(value).__name__, f"{value!r:.80}"


def _range(tensor: Tensor) -> str:
    """Least and greatest value, and what is no number."""
    if not tensor.numel():
        return "empty"
    if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
        return ""
    if tensor.dtype == torch.bool:
        return f"{100 * float(tensor.float().mean()):.0f} % True"
    if not tensor.is_floating_point():
        values, counts = tensor.unique(return_counts=True)
        if len(values) > _VALUES:
            return f"{int(values[0]):,} to {int(values[-1]):,}"
        pairs = zip(values.tolist(), counts.tolist(), strict=True)
        return ", ".join(f"{value} ({count:,} times)" for value, count in pairs)
    finite = tensor[tensor.isfinite()].double()
    odd = tensor.numel() - finite.numel()
    notes = f"; {odd:,} are NaN or infinite" if odd else ""
    if not finite.numel():
        return f"none is finite{notes}"
    low, high, mean = finite.min(), finite.max(), finite.mean()
    return f"{low:.4g} to {high:.4g}, mean {mean:.4g}{notes}"


# -- token ids -------------------------------------------------------------------------------------


def _has_tokens(batch: Any) -> bool:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()


def _tokenizer(data: Any, module: Any) -> Any:
    """That of data or module, or the one of the model it names; None where there is none."""
    for owner in (data, module):
        try:
            found = getattr(owner, "tokenizer", None)
        except LoraError:
            continue
        if hasattr(found, "decode"):
            return found
    name = getattr(module, "model_name", None)
    return load_pretrained("AutoTokenizer", name) if isinstance(name, str) else None


def _texts(tokenizer: Any, batch: Mapping[str, Any], rows: int, most: int) -> Iterator[TokenText]:
    """The first rows without their padding, cut where positions begin anew."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels, positions = batch.get("labels"), batch.get("position_ids")
    for number in range(min(rows, len(ids))):
        kept = torch.ones_like(ids[number], dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            kept = mask[number].bool()
        tokens = ids[number][kept].tolist()
        learned = [False] * len(tokens)
        title = f"row {number + 1} of the first batch: {len(tokens):,} tokens"
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            learned = (labels[number][kept] != IGNORE_INDEX).tolist()
            title += f", {sum(learned):,} of them learned"
        starts = [0]
        if isinstance(positions, Tensor) and positions.shape == ids.shape:
            places = positions[number][kept].tolist()
            starts += [n for n, place in enumerate(places) if n and place == 0]
        documents: list[tuple[Piece, ...]] = []
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            part = pieces_of(tokenizer, tokens[start:end], learned[start:end], most)
            documents.append(tuple(part))
        yield TokenText(title, tuple(documents))
