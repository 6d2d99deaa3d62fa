"""Rows become samples: which format they have, what they say, and what is wrong with them."""

from __future__ import annotations

import pytest

from lora_lightning.data.formats import read_samples
from lora_lightning.data.row import Row
from lora_lightning.data.samples import Chat, Document, PromptCompletion
from lora_lightning.errors import RecordError

PLACE = "my.jsonl, line 3"
ASKED = {"role": "user", "content": "2+2?"}
ANSWERED = {"role": "assistant", "content": "4"}
SPOKEN = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]


def sample(values, **options):
    (only,) = read_samples([Row(values, PLACE)], **options)
    return only


def message(values, error_type=RecordError, **options):
    with pytest.raises(error_type) as error:
        sample(values, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": "one\n", "id": 7}, Document("one\n", PLACE)),
        ({"prompt": "2+2=", "completion": "4"}, PromptCompletion("2+2=", "4", PLACE)),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, Chat((ASKED, ANSWERED), PLACE)),
        ({"messages": [ASKED, ANSWERED]}, Chat((ASKED, ANSWERED), PLACE)),
        ({"conversations": SPOKEN}, Chat((ASKED, ANSWERED), PLACE)),
        ({"conversations": [ASKED, ANSWERED]}, Chat((ASKED, ANSWERED), PLACE)),
    ],
)
def test_the_format_is_recognised(values, expected):
    assert sample(values) == expected
