"""What is held out for validation is decided by what a record says, and by nothing else."""

from __future__ import annotations

import dataclasses
import random

import pytest

from lora_lightning.data.samples.sample import Chat, Document, PromptCompletion
from lora_lightning.data.validation_split import is_held_out, sample_content, split_records


def samples(number, where):
    turns = ({"role": "user", "content": f"Ask {number}"}, {"role": "assistant", "content": "A"})
    return [
        Document(f"Text {number}", where),
        PromptCompletion("Asked", f"Text {number}", where),
        Chat(turns, where),
    ]


ALL = [sample for number in range(200) for sample in samples(number, f"line {number}")]


def held_out(records, fraction):
    return [record for record in records if is_held_out(sample_content(record), fraction)]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_about_the_share_that_is_asked_for(fraction):
    # binomial, n = 600: five standard deviations
    width = 5 * (fraction * (1 - fraction) / len(ALL)) ** 0.5
    assert abs(len(held_out(ALL, fraction)) / len(ALL) - fraction) <= width


def test_row_by_row_is_as_all_at_once():
    train, val = split_records(ALL, 0.2, sample_content)
    assert val == held_out(ALL, 0.2)
    assert len(train) + len(val) == len(ALL)


def test_neither_place_nor_order_nor_neighbours_matter():
    others = [dataclasses.replace(sample, where="elsewhere") for sample in ALL]
    random.Random(0).shuffle(others)
    some = others[:400]
    expected = {sample_content(sample) for sample in held_out(ALL, 0.2)}
    assert {sample_content(s) for s in held_out(some, 0.2)} == expected & {
        sample_content(s) for s in some
    }


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    assert set(map(sample_content, held_out(ALL, 0.1))) < set(
        map(sample_content, held_out(ALL, 0.3))
    )


def leaked(train, val):
    return set(map(sample_content, train)) & set(map(sample_content, val))


def test_equal_samples_are_on_one_side():
    train, val = split_records(ALL + ALL[::-1], 0.2, sample_content)
    assert leaked(train, val) == set()
    assert leaked(ALL[::2], ALL[::2])  # the check can fail


def test_all_of_a_sample_counts():
    first, second, third = samples(0, "")
    contents = [sample_content(each) for each in (first, second, third)]
    contents += [
        sample_content(dataclasses.replace(second, prompt="Other")),
        sample_content(dataclasses.replace(third, tools=({"name": "add"},))),
        sample_content(dataclasses.replace(third, messages=third.messages[:1])),
        sample_content(PromptCompletion("AskedT", "ext 0", "")),
    ]
    assert len(set(contents)) == len(contents)


def test_the_side_of_a_text_is_fixed():
    """Written down: a new version must not move texts from training into validation."""
    sides = "".join("tv"[is_held_out(f"Text {number}", 0.3)] for number in range(24))
    assert sides == "ttttttvvtttvvvvttvtvvvtt"


def test_the_order_of_keys_does_not_count():
    chat = samples(0, "")[2]
    turned = tuple(dict(reversed(message.items())) for message in chat.messages)
    assert list(turned[0]) != list(chat.messages[0])
    assert sample_content(Chat(turned, "")) == sample_content(chat)
