"""Entities: what tags say, and F1 over whole ones."""

import itertools
import random

import pytest
import torch

from lora_lightning.tasks.entity_f1 import EntityF1, entities, writes_entities


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-B", {(0, 2, "A"), (3, 4, "B")}),
        ("B-A B-A I-A", {(0, 1, "A"), (1, 3, "A")}),
        ("I-A I-A O I-A", {(0, 2, "A"), (3, 4, "A")}),  # IOB1
        ("I-A B-A", {(0, 1, "A"), (1, 2, "A")}),
        ("B-A I-B I-B", {(0, 1, "A"), (1, 3, "B")}),
        ("O I-B B-A", {(1, 2, "B"), (2, 3, "A")}),
        ("B-A I-A E-A S-A S-A", {(0, 3, "A"), (3, 4, "A"), (4, 5, "A")}),  # IOBES
        ("B-A L-A U-B I-B", {(0, 2, "A"), (2, 3, "B"), (3, 4, "B")}),  # BILOU
        ("B-A E-A I-A", {(0, 2, "A"), (2, 3, "A")}),
        ("E-A O", {(0, 1, "A")}),
        ("B-x-y I-x-y", {(0, 2, "x-y")}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities(tags, found):
    assert entities(tags.split()) == found


def written(length, spans):
    """The IOB2 tags of spans."""
    tags = ["O"] * length
    for start, end, kind in spans:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tags


def random_spans(rng, length):
    cuts = sorted(rng.sample(range(length + 1), rng.randint(2, 6)))
    spans = itertools.pairwise(cuts)
    return {(a, b, rng.choice(["PER", "LOC"])) for a, b in spans if rng.random() < 0.6}


def test_spans_that_are_written_are_read_again():
    rng = random.Random(0)
    for _ in range(200):
        spans = random_spans(rng, 12)
        assert entities(written(12, spans)) == spans


NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_f1_counts_whole_entities_of_all_batches():
    rng = random.Random(1)
    metric, right, said, true = EntityF1(NAMES), 0, 0, 0
    words_right = words = 0
    for _ in range(20):
        truths = [random_spans(rng, 9) for _ in range(3)]
        guesses = [{s for s in t if rng.random() < 0.7} | {(0, 1, "PER")} - t for t in truths]
        guesses = [{s for s in g if s[0] or s == (0, 1, "PER")} for g in guesses]
        rows = []
        for spans in (guesses, truths):
            tags = [[NAMES.index(tag) for tag in written(9, row)] for row in spans]
            # As behind a special token, with a second sub-token for each word.
            row = torch.full((3, 20), -100)
            row[:, 1:19:2] = torch.tensor(tags)
            rows.append(row)
        predicted, labels = rows
        words_right += int((predicted == labels)[:, 1:19:2].sum())
        words += 27
        predicted = predicted.where(predicted != -100, 1)  # what is said there counts for nothing
        metric.update(predicted, labels)
        for guess, truth in zip(guesses, truths, strict=True):
            guess = entities(written(9, guess))
            right, said, true = right + len(guess & truth), said + len(guess), true + len(truth)
    assert metric.compute().item() == pytest.approx(2 * right / (said + true))
    assert metric.compute().item() != pytest.approx(words_right / words, abs=0.05)


def test_nothing_to_find():
    metric = EntityF1(NAMES)
    metric.update(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[-100, 0, 0]]))
    assert metric.compute() == 0


def test_which_classes_write_entities():
    assert writes_entities(NAMES)
    assert writes_entities(["B-A", "I-A"])
    assert not writes_entities(["NOUN", "O"])
    assert not writes_entities(["O"])
    assert not writes_entities(["B-A", "I-A", "X"])
