"""Predictions as files: what is returned comes back, rows are lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning.cli.predictions import save_predictions


def lines(predictions: list[Any], folder: Path) -> list[Any]:
    jsonl, whole = save_predictions(predictions, folder / "new" / "predictions_0")
    assert (jsonl.name, whole.name) == ("predictions_0.jsonl", "predictions_0.pt")
    assert len(torch.load(whole)) == len(predictions)
    return [json.loads(line) for line in jsonl.read_text().splitlines()]


def test_texts(tmp_path: Path) -> None:
    texts = [["one\nline", "zwei: \u00e4"], ["\u2028"]]
    found = [json.loads(line) for line in _raw(texts, tmp_path).split("\n")[:-1]]
    assert found == [{"prediction": text} for batch in texts for text in batch]


def _raw(predictions: list[Any], folder: Path) -> str:
    jsonl, _ = save_predictions(predictions, folder / "predictions")
    return jsonl.read_text(encoding="utf-8")


def test_columns(tmp_path: Path) -> None:
    batch = {"labels": ["a", "b"], "probabilities": torch.tensor([[0.25, 0.75], [1.0, torch.nan]])}
    assert lines([batch, batch], tmp_path) == 2 * [
        {"labels": "a", "probabilities": [0.25, 0.75]},
        {"labels": "b", "probabilities": [1.0, None]},
    ]


def test_columns_of_sentences(tmp_path: Path) -> None:
    batch = {"labels": [["O"], ["O", None]], "probabilities": [torch.ones(1, 2), torch.ones(2, 2)]}
    found = lines([batch], tmp_path)
    assert [row["labels"] for row in found] == [["O"], ["O", None]]
    assert found[1]["probabilities"] == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 3),
        {"scores": torch.ones(2), "mean": torch.tensor(1.0)},
        {"scores": torch.ones(2), "others": [1]},
        {"scores": [{1, 2}]},
        ["text", 1],
        None,
    ],
    ids=["tensor", "scalar", "uneven", "object", "mixed", "none"],
)
def test_what_has_no_rows(batch: Any, tmp_path: Path) -> None:
    (whole,) = save_predictions([batch], tmp_path / "predictions")
    assert whole.name == "predictions.pt"
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.pt"]


def test_nothing_is_half_written(tmp_path: Path) -> None:
    save_predictions([["old"]], tmp_path / "predictions")
    with pytest.raises((AttributeError, TypeError, RuntimeError)):  # pickle's
        save_predictions([lambda: None], tmp_path / "predictions")
    assert "old" in (tmp_path / "predictions.jsonl").read_text()
