"""CONTRIBUTING's new data format is recognised, renamed and learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_lightning import TextDataModule
from lora_lightning.data.samples.formats import FORMATS
from lora_lightning.errors import RecordError
from lora_lightning.utilities.constants import IGNORE_INDEX
from tests.helpers.markdown import recipe
from tests.helpers.tiny_lm import tiny_llama


@pytest.fixture(autouse=True)
def example() -> Iterator[None]:
    before = dict(FORMATS)
    exec(recipe("## A new data format"), {})
    yield
    FORMATS.clear()
    FORMATS.update(before)


def module(folder: Path, rows: list[dict[str, str]], **options: object) -> TextDataModule:
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = str(tiny_llama(folder / "llama"))
    return TextDataModule(
        str(folder / "my.jsonl"), val=0.0, tokenizer=tokenizer, max_length=64, **options
    )  # type: ignore[arg-type]


ROWS = [{"question": "What is two plus three?", "answer": "It is five."}]


@pytest.mark.parametrize("columns", [None, {"question": "q"}])
def test_the_answer_is_learned(tmp_path: Path, columns: dict[str, str] | None) -> None:
    rows = [{"q": row["question"], "answer": row["answer"]} for row in ROWS] if columns else ROWS
    data = module(tmp_path, rows, columns=columns)
    (batch,) = data.train_dataloader()
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learned = labels != IGNORE_INDEX
    assert data.tokenizer.decode(ids[~learned]) == "What is two plus three?\n"
    assert data.tokenizer.decode(ids[learned]) == "It is five.</s>"


def test_a_missing_answer_is_named(tmp_path: Path) -> None:
    data = module(tmp_path, [*ROWS, {"question": "And four?", "answr": "?"}])
    with pytest.raises(RecordError, match=r"line 2: no key 'answer'.*question-answer"):
        data.train_dataloader()
