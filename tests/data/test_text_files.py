"""From a file to token ids: one conversation, however it is written, is the same example."""

from __future__ import annotations

import csv
import json

import pytest

from lora_lightning.data.encoding.causal_lm import Encoder
from lora_lightning.data.samples.formats import read_samples
from lora_lightning.data.sources.read_rows import read_rows
from lora_lightning.utilities.constants import IGNORE_INDEX
from tests.helpers.tiny_lm import CHATML, tiny_tokenizer

MESSAGES = [
    {"role": "user", "content": "What is two plus three?\n\nAnswer: "},
    {"role": "assistant", "content": "It is five."},
]
FORMATS = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": MESSAGES[0]["content"]},
            {"from": "gpt", "value": MESSAGES[1]["content"]},
        ]
    },
    "prompt-completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "alpaca": {
        "instruction": "What is two plus three?", "input": "Answer: ", "output": "It is five.",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(CHATML, special=("<|im_start|>", "<|im_end|>"))


def write_jsonl(path, row):
    path.write_text(json.dumps(row))


def write_csv(path, row):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})


def write_parquet(path, row):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow (extra `data`)")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([row]), path)


KINDS = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


def examples(path, tokenizer):
    samples = read_samples(read_rows(str(path), key="data.train"), chat=True)
    return list(Encoder(tokenizer, 64).encode_all(samples))


# A prompt in a CSV is text, never messages.
@pytest.mark.parametrize(
    ("kind", "form"),
    [(k, f) for k in KINDS for f in FORMATS if (k, f) != (".csv", "prompt-completion")],
)
def test_the_same_conversation_is_the_same_example(kind, form, tokenizer, tmp_path):
    path = tmp_path / f"a{kind}"
    KINDS[kind](path, FORMATS[form])
    (example,) = examples(path, tokenizer)

    # independently: the template's own text, cut where the answer begins
    prompt, whole = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        for messages, generate in ((MESSAGES[:1], True), (MESSAGES, False))
    )
    assert whole == prompt + "It is five.<|im_end|>\n"
    read, learned = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (prompt, "It is five.<|im_end|>")
    )
    assert example.input_ids == read + learned
    assert example.labels == [IGNORE_INDEX] * len(read) + learned


def test_turns_that_the_file_excludes_are_not_learned(tokenizer, tmp_path):
    again = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    texts = []
    for weight in (0, 1):
        write_jsonl(
            tmp_path / "a.jsonl",
            {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": weight}, *again]},
        )
        (example,) = examples(tmp_path / "a.jsonl", tokenizer)
        texts.append(tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]))
    assert texts == ["Hello<|im_end|>", "It is five.<|im_end|>Hello<|im_end|>"]
