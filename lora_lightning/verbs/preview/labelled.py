"""Preview of what has classes: texts, words and images with their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from rich.console import RenderableType

from lora_lightning.data.images import ImageDataModule
from lora_lightning.data.labelled_data_module import LabelledDataModule
from lora_lightning.data.labelled_text_data_module import LabelledTextDataModule
from lora_lightning.data.sources.image_record import image_size
from lora_lightning.data.sources.labelled_words import Sentence, first_subtokens
from lora_lightning.data.token_classification import TokenClassificationDataModule
from lora_lightning.utilities.constants import IGNORE_INDEX
from lora_lightning.verbs.preview.result import Preview, histogram, table
from lora_lightning.verbs.preview.tokens import CLOSE, OPEN, Piece, TokenText, pieces_of

# Images whose sizes are looked at, from all over the split.
LOOKED_AT = 500


def preview_labelled(data: LabelledDataModule, rows: int, tokens: int) -> Preview:
    """The first examples of the first split there is, its classes, and counts."""
    data.setup()
    split = data.given_splits()[0]
    examples = data.prepared(split)
    texts: list[TokenText] = []
    parts: list[RenderableType] = []
    if isinstance(data, LabelledTextDataModule):
        pairs = enumerate(zip(data.records(split), examples, strict=True), start=1)
        for number, (record, example) in islice(pairs, rows):
            texts.append(_text(data, number, record, example, tokens))
        parts += histogram(f"tokens of an example ({split})", data.lengths(examples))
    if isinstance(data, ImageDataModule):
        parts += _images(data, split, rows)
    return Preview(tuple(texts), (*parts, *_classes(data)), dict(data.told))


def _classes(data: LabelledDataModule) -> list[RenderableType]:
    """How often each class is there, in each split that has labels."""
    splits = [split for split in data.given_splits() if split != "predict"]
    if not splits:
        return []
    names = data.label_names
    counts = {
        split: Counter(label for record in data.records(split) for label in data.class_ids(record))
        for split in splits
    }
    held_out = data.paths["val"] is None
    header = [f"{split} (held out)" if split == "val" and held_out else split for split in splits]
    rows = [
        [name, *(f"{counts[split][number]:,}" for split in splits)]
        for number, name in enumerate(names)
    ]
    return [table(f"{len(names)} classes, by {data.labelled}", ["class", *header], rows)]


def _text(
    data: LabelledTextDataModule, number: int, record: Any, example: dict[str, Any], most: int
) -> TokenText:
    ids = example["input_ids"]
    title = f"example {number}: {record.where}: {len(ids):,} tokens"
    if isinstance(data, TokenClassificationDataModule):
        return TokenText(title, (tuple(_words(data, record, example)),))
    if "labels" in example:
        title += f", {data.label_names[example['labels']]!r}"
    return TokenText(title, (tuple(pieces_of(data.tokenizer, ids, [False] * len(ids), most)),))


def _words(
    data: TokenClassificationDataModule, sentence: Sentence, example: dict[str, Any]
) -> list[Piece]:
    """Each word with its label; without, where no token of its own carries it."""
    whole = data.tokenizer(sentence.text, return_offsets_mapping=True, verbose=False)
    places = first_subtokens(sentence.words, whole["offset_mapping"])
    carried = example["labels"] if "labels" in example else example["words"]
    left = sum(number != IGNORE_INDEX for number in carried)  # what is cut off are the last
    labels = [data.label_names[n] for n in data.class_ids(sentence)] or [""] * len(places)
    pieces = []
    for word, label, place in zip(sentence.words, labels, places, strict=True):
        said = "no token" if place is None else label if left > 0 else "cut off"
        left -= place is not None
        pieces.append(Piece(word, False, 0, label=f"{OPEN}{said}{CLOSE} " if said else " "))
    return pieces


# -- images ----------------------------------------------------------------------------------------


def _images(data: ImageDataModule, split: str, rows: int) -> list[RenderableType]:
    records, images = data.records(split), data.prepared(split)
    lines = []
    for number in range(min(rows, len(images))):
        pixels = images[number]["pixel_values"]
        width, height = image_size(records[number])
        label = "" if images.labels is None else data.label_names[images.labels[number]]
        size = " x ".join(map(str, pixels.shape))
        low, high, mean = (f"{float(v):.3g}" for v in (pixels.min(), pixels.max(), pixels.mean()))
        lines.append(
            [records[number].where, label, f"{width} x {height}", size, f"{low} to {high}, {mean}"]
        )
    header = ["image", "class", "width x height", "the model sees", "its range, mean"]
    return [table(f"images ({split})", header, lines), *_sizes(records), *_processing(data)]


def _sizes(records: Sequence[Any]) -> list[str]:
    step = -(-len(records) // LOOKED_AT)
    sizes = Counter(image_size(record) for record in records[::step])
    some = f"{sizes.total():,} of {len(records):,} looked at: " if step > 1 else ""
    if len(sizes) == 1:
        width, height = next(iter(sizes))
        return [f"sizes: {some}all are {width:,} x {height:,}"]
    widths, heights = zip(*sizes, strict=True)
    return [
        f"sizes: {some}{len(sizes):,} different ones, {min(widths):,} to {max(widths):,} wide and "
        f"{min(heights):,} to {max(heights):,} high"
    ]


def _processing(data: ImageDataModule) -> list[str]:
    """What the image processor does, and what chance does before it while training."""
    processor, steps = data.image_processor, []
    for switch, said, names in (
        ("do_resize", "resized to", ("size",)),
        ("do_center_crop", "cropped to", ("crop_size",)),
        ("do_rescale", "times", ("rescale_factor",)),
        ("do_normalize", "normalised:", ("image_mean", "image_std")),
    ):
        if getattr(processor, switch, False):
            values = (_in_words(getattr(processor, name, None)) for name in names)
            steps.append(f"{said} {', '.join(values)}")
    how = data.augmentation
    flip = f"mirrored with probability {how.random_horizontal_flip:g} (data.random_horizontal_flip)"
    crop = f"a part of {how.random_crop:g} to 1 of the area (data.random_crop)"
    changes = [flip] * (how.random_horizontal_flip > 0) + [crop] * (how.random_crop < 1)
    return [
        f"{type(processor).__name__}: {'; '.join(steps) or 'leaves pixels as they are'}",
        f"augmentation of training images: {'; '.join(changes) or 'none'}",
    ]


def _in_words(value: Any) -> str:
    """A size, a factor, or a number for each channel."""
    named = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if named:
        return " x ".join(f"{key} {number}" for key, number in named.items() if number is not None)
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(f"{number:.4g}" for number in value) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
