"""Preview of texts for language models: what is read, what is learned, where turns end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rich.console import RenderableType

from lora_lightning.data.batches.example_store import BatchRows, ExampleStore, Tokens
from lora_lightning.data.encoding.sample_encoder import EncodingReport
from lora_lightning.data.samples.sample import Example
from lora_lightning.data.text import TextDataModule
from lora_lightning.utilities.constants import IGNORE_INDEX
from lora_lightning.verbs.preview.result import Preview, histogram
from lora_lightning.verbs.preview.tokens import Piece, TokenText, pieces_of

# Examples whose ends are looked at.
LOOKED_AT = 10_000


def preview_texts(data: TextDataModule, rows: int, tokens: int) -> Preview:
    """The first examples of the first split there is, and counts of all."""
    split = data.given_splits()[0]
    if split == "predict":
        return _prompts(data, rows, tokens)
    # Before the data are prepared, which lets them go.
    first = [] if data.packing else list(islice(_first(data, split), rows))
    data.setup()
    shown = [_packed(data, n, row, tokens) for n, row in _rows(data, split, rows)]
    shown += [_example(data, n, found, tokens) for n, found in enumerate(first, start=1)]
    store = _examples(data, split)
    of = "of the first rows " if data.streaming and split == "train" else ""
    parts = histogram(f"tokens of an example {of}({split})", store.lengths)
    if data.encoding.encoder_decoder:
        targets = [len(store[n].labels) for n in range(len(store))]
        parts += histogram(f"tokens of a target {of}({split})", targets)
    parts += _ends(data, store)
    return Preview(tuple(shown), tuple(parts), dict(data.told))


@dataclass(frozen=True)
class _Found:
    example: Example
    where: str
    cut: bool


def _first(data: TextDataModule, split: str) -> Iterator[_Found]:
    for sample in data.samples(split):
        report = EncodingReport()
        for example in data.encoder.encode(sample, report):
            yield _Found(example, sample.where, report.truncated > 0)


def _example(data: TextDataModule, number: int, found: _Found, most: int) -> TokenText:
    ids, labels = found.example.input_ids, found.example.labels
    learned = [label != IGNORE_INDEX for label in labels]
    title = f"example {number}: {found.where}: {len(ids):,} tokens"
    cut = f", cut to {data.encoder.limit} (data.max_length)" if found.cut else ""
    if data.encoding.encoder_decoder:
        read = tuple(pieces_of(data.tokenizer, ids, [False] * len(ids), most))
        target = tuple(pieces_of(data.tokenizer, labels, learned, most))
        title += f", and {len(labels):,} of the target, which is learned{cut}"
        return TokenText(title, (read, target), ("read", "learned"))
    title += f", {sum(learned):,} of them learned{cut}"
    return TokenText(title, (tuple(pieces_of(data.tokenizer, ids, learned, most)),))


def _rows(data: TextDataModule, split: str, count: int) -> Iterator[tuple[int, Sequence[Tokens]]]:
    """The first rows of packed examples."""
    if data.packing:
        served = data.prepared(split)
        # Past its end a row fills up what processes share out; a stream has no length.
        rows = islice(iter(served), len(served) if isinstance(served, BatchRows) else None)
        yield from enumerate(islice(rows, count), start=1)


def _packed(data: TextDataModule, number: int, row: Sequence[Tokens], most: int) -> TokenText:
    documents: list[tuple[Piece, ...]] = []
    learned = 0
    for ids, labels in row:
        # The first token of each is no label: it would be predicted from the one before.
        mask = [n > 0 and label != IGNORE_INDEX for n, label in enumerate(labels.tolist())]
        learned += sum(mask)
        documents.append(tuple(pieces_of(data.tokenizer, ids.tolist(), mask, most)))
    tokens = sum(len(example.input_ids) for example in row)
    title = (
        f"row {number}: {len(row)} packed, which do not see each other; {tokens:,} of "
        f"{data.encoder.max_length:,} tokens, {learned:,} of them learned"
    )
    return TokenText(title, tuple(documents))


def _examples(data: TextDataModule, split: str) -> ExampleStore:
    """All examples; of a stream, those of its first rows."""
    if data.streaming and split == "train":
        samples = islice(data.samples(split), data.shuffle_buffer)
        return ExampleStore(data.encoder.encode_all(samples))
    store: ExampleStore = data.prepared(split).store
    return store


def _prompts(data: TextDataModule, rows: int, most: int) -> Preview:
    """What the model is asked; nothing of it is learned."""
    data.setup("predict")
    prompts, shown = data.prepared("predict"), []
    pairs = zip(data.samples("predict"), prompts, strict=True)
    for number, (sample, ids) in enumerate(islice(pairs, rows), start=1):
        title = f"prompt {number}: {sample.where}: {len(ids):,} tokens"
        pieces = pieces_of(data.tokenizer, ids, [False] * len(ids), most)
        shown.append(TokenText(title, (tuple(pieces),)))
    parts = histogram("tokens of a prompt", [len(ids) for ids in prompts])
    return Preview(tuple(shown), tuple(parts), {"predict": f"predict: {len(prompts):,} prompts"})


# -- where turns end -------------------------------------------------------------------------------


@dataclass
class _Ends:
    """What is learned last of each part that is learned.

    Attributes:
        marked: By token, those that end in an added token, which can tell the model to stop.
        plain: Ends in ordinary text, by the added token behind it, which is not learned ("": none).
        cut: Ends where an example is as long as it may be.
    """

    marked: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    cut: int = 0


def _ends(data: TextDataModule, store: ExampleStore) -> list[RenderableType]:
    found, tokenizer = _Ends(), data.tokenizer
    added = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()}
    if tokenizer.eos_token_id is not None:
        added.setdefault(tokenizer.eos_token_id, tokenizer.eos_token)
    count = min(len(store), LOOKED_AT)
    for number in range(count):
        ids, labels = (part.tolist() for part in store[number])
        whole = labels if data.encoding.encoder_decoder else ids
        for place, label in enumerate(labels):
            after = labels[place + 1] if place + 1 < len(labels) else IGNORE_INDEX
            if label == IGNORE_INDEX or after != IGNORE_INDEX:
                continue
            if label in added:
                found.marked[added[label]] += 1
            elif place + 1 == len(whole) and len(whole) >= _limit(data):
                found.cut += 1
            else:
                behind = whole[place + 1] if place + 1 < len(whole) else IGNORE_INDEX
                found.plain[added.get(behind, "")] += 1
    of = f" (of the first {count:,} examples)" if count < len(store) else ""
    return [line + of for line in _lines_of(found)]


def _limit(data: TextDataModule) -> int:
    encoder: Any = data.encoder
    length: int = getattr(encoder, "max_target_length", encoder.max_length)
    return length


def _lines_of(found: _Ends) -> list[str]:
    total = found.marked.total() + found.plain.total() + found.cut
    lines = [
        f"{count:,} of {total:,} turns and answers end in {token!r}, which is learned"
        for token, count in found.marked.most_common(3)
    ]
    if found.cut:
        lines.append(f"{found.cut:,} of {total:,} are cut before they end (data.max_length)")
    for token, count in found.plain.most_common(3):
        why = f"{token!r}, which is not learned" if token else "no special token"
        lines.append(
            f"{count:,} of {total:,} turns and answers end in {why}: the model does not learn to "
            "stop there"
        )
    return lines
