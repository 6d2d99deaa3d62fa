"""Predictions as files: what is returned comes back, rows are lines, each beside what it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from lora_lightning.cli.predictions import PredictionFiles, lines_of, save_predictions
from lora_lightning.data.text import TextDataModule
from lora_lightning.data.text_classification import TextClassificationDataModule
from lora_lightning.tasks.sequence_classification import SequenceClassification
from lora_lightning.tasks.token_classification import TokenClassification
from tests.helpers.command import run_command
from tests.helpers.processes import on_processes
from tests.helpers.tiny_bert import WORDS, save_tiny_bert
from tests.helpers.tiny_lm import tiny_llama
from tests.helpers.trained_runs import language_model_run

ANY = LightningModule()


def lines(predictions: list[Any], module: LightningModule = ANY) -> Any:
    trainer: Any = SimpleNamespace(datamodule=None, predict_dataloaders=None, world_size=1)
    return lines_of(trainer, module, predictions, [])


def written(predictions: list[Any], folder: Path) -> str:
    jsonl, whole = save_predictions(predictions, folder / "new" / "p_0", lines(predictions))
    assert (jsonl.name, whole.name) == ("p_0.jsonl", "p_0.pt")
    assert len(torch.load(whole)) == len(predictions)
    return jsonl.read_text(encoding="utf-8")


def test_texts(tmp_path: Path) -> None:
    texts = [["one\nline", "zwei: \u00e4"], ["\u2028"]]
    found = [json.loads(line) for line in written(texts, tmp_path).split("\n")[:-1]]
    assert found == [{"prediction": text} for batch in texts for text in batch]


def test_columns(tmp_path: Path) -> None:
    batch = {"labels": ["a", "b"], "probabilities": torch.tensor([[0.25, 0.75], [1.0, torch.nan]])}
    found = [json.loads(line) for line in written([batch, batch], tmp_path).splitlines()]
    assert found == 2 * [
        {"labels": "a", "probabilities": [0.25, 0.75]},
        {"labels": "b", "probabilities": [1.0, None]},
    ]


def test_classes_are_named() -> None:
    batch = {"labels": ["a", "b"], "probabilities": torch.tensor([[0.75, 0.25], [0.0, 1.0]])}
    module = SequenceClassification("none", label_names=["a", "b"])
    assert lines([batch], module) == [
        {"label": "a", "probabilities": {"a": 0.75, "b": 0.25}},
        {"label": "b", "probabilities": {"a": 0.0, "b": 1.0}},
    ]


def test_classes_of_words_are_named() -> None:
    nothing = torch.tensor([[0.25, 0.75], [torch.nan, torch.nan]])
    batch = {"labels": [["O"], ["B", None]], "probabilities": [torch.ones(1, 2), nothing]}
    module = TokenClassification("none", label_names=["O", "B"])
    assert lines([batch], module) == [
        {"labels": ["O"], "probabilities": [{"O": 1.0, "B": 1.0}]},
        {"labels": ["B", None], "probabilities": [{"O": 0.25, "B": 0.75}, None]},
    ]
    assert [row["labels"] for row in lines([batch])] == [["O"], ["B", None]]


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
    assert lines([["a text"], batch]) is None
    (whole,) = save_predictions([batch], tmp_path / "predictions", None)
    assert whole.name == "predictions.pt"
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.pt"]


def test_nothing_is_half_written(tmp_path: Path) -> None:
    save_predictions([["old"]], tmp_path / "predictions", [{"prediction": "old"}])
    with pytest.raises((AttributeError, TypeError, RuntimeError)):  # pickle's
        save_predictions([lambda: None], tmp_path / "predictions", [{"prediction": "new"}])
    assert "old" in (tmp_path / "predictions.jsonl").read_text()


# -- the row that a prediction is of ---------------------------------------------------------------


class Reads(LightningModule):
    """Predicts what it was given to read, in words: the truth that each line is held against."""

    answers = 1

    def predict_step(self, batch: Any, batch_idx: int) -> list[str]:
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        return [text for text in texts for _ in range(self.answers)]


class Shuffled(TextClassificationDataModule):
    def predict_dataloader(self) -> DataLoader[Any]:
        rows = self.prepared("predict")
        return DataLoader(
            rows, batch_size=self.batch_size, shuffle=True, collate_fn=self.collator()
        )


class Padded(TextClassificationDataModule):
    """A sampler for several processes that gives rows twice, so that all have as many."""

    def predict_dataloader(self) -> DataLoader[Any]:
        rows = self.prepared("predict")
        sampler = DistributedSampler(rows)
        return DataLoader(
            rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collator()
        )


class OfOtherRows(TextClassificationDataModule):
    def predict_dataloader(self) -> DataLoader[Any]:
        rows = self.prepared("predict")[::-1]
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self.collator())


TEXTS = [f"{a} {b}" for a in WORDS for b in WORDS[:3]]  # 39


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    save_tiny_bert(folder / "bert")
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder


def predicted(folder: Path, data: Any, where: Path, **options: Any) -> list[Any]:
    """The lines of this process, where `data` are predicted by what reads them."""
    module = Reads()
    module.answers = options.pop("answers", 1)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=where,
        callbacks=[PredictionFiles()], **options,
    )  # fmt: skip
    trainer.predict(module, data)
    number = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
    return [json.loads(x) for x in (where / f"predictions{number}.jsonl").read_text().splitlines()]


def of_texts(folder: Path, kind: type = TextClassificationDataModule, **options: Any) -> Any:
    (path, bert) = (str(folder / name) for name in ("t.jsonl", "bert"))
    names = ["a", "b"]
    return kind(
        predict=path, tokenizer=bert, label_names=names, batch_size=4, max_length=16, **options
    )


@pytest.mark.filterwarnings("ignore:.*shuffling enabled")
@pytest.mark.parametrize("kind", [TextClassificationDataModule, Shuffled])
def test_each_prediction_stands_beside_its_row(folder: Path, tmp_path: Path, kind: Any) -> None:
    rows = predicted(folder, of_texts(folder, kind), tmp_path)
    assert sorted(row["text"] for row in rows) == sorted(TEXTS)
    assert all(row["text"] == row["prediction"] for row in rows)
    assert (rows != sorted(rows, key=lambda row: TEXTS.index(row["text"]))) == (kind is Shuffled)


@pytest.mark.slow
def test_so_it_does_with_workers(folder: Path, tmp_path: Path) -> None:
    rows = predicted(folder, of_texts(folder, num_workers=2), tmp_path)
    assert [row["prediction"] for row in rows] == [row["text"] for row in rows] == TEXTS


def test_several_answers_to_a_row(folder: Path, tmp_path: Path) -> None:
    rows = predicted(folder, of_texts(folder), tmp_path, answers=3, limit_predict_batches=2)
    assert [row["text"] for row in rows] == [text for text in TEXTS[:8] for _ in range(3)]
    assert all(row["text"] == row["prediction"] for row in rows)


def test_rows_that_are_not_known_are_not_guessed(folder: Path, tmp_path: Path) -> None:
    rows = predicted(folder, of_texts(folder, OfOtherRows), tmp_path)
    assert rows == [{"prediction": text} for text in TEXTS[::-1]]


@pytest.mark.filterwarnings("ignore:.*shuffling enabled")
def test_the_check_can_fail(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Were rows counted instead of asked for, those of a shuffled loader would be others."""
    from lora_lightning.cli import predictions

    inputs = predictions._inputs

    def counted(trainer: Any, lengths: list[int], batch_indices: Any) -> Iterator[Any]:
        rows = iter(range(sum(lengths)))
        return inputs(trainer, lengths, [[[next(rows) for _ in range(n)] for n in lengths]])

    monkeypatch.setattr(predictions, "_inputs", counted)
    rows = predicted(folder, of_texts(folder, Shuffled), tmp_path)
    assert not all(row["text"] == row["prediction"] for row in rows)


def of_rank(folder: Path, kind: type) -> list[Any]:
    return predicted(folder, of_texts(folder, kind), folder, devices=2, strategy="ddp")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TextClassificationDataModule, Padded])
def test_two_processes(folder: Path, kind: Any) -> None:
    ranks = on_processes(2, of_rank, folder, kind)
    rows = [row for rank in ranks for row in rank]
    assert len(ranks[0]) == 20
    assert sorted(row["row"] for row in rows) == list(range(39))  # each once
    assert all(row["text"] == row["prediction"] == TEXTS[row["row"]] for row in rows)


def test_prompts_and_chats_are_as_they_were_written(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "chatml", "chatml")
    messages = [{"role": "user", "content": "How are\nyou?"}]
    answered = [*messages, {"role": "assistant", "content": "fine"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = {
        "a.jsonl": [{"prompt": "Hello \x1b[31m"}, {"prompt": "world!"}],
        "b.jsonl": [{"messages": answered, "tools": tools}, {"messages": messages}],
        "c.txt": ["The quick", "brown fox"],
    }
    for name, content in rows.items():
        texts = (row if isinstance(row, str) else json.dumps(row) for row in content)
        (tmp_path / name).write_text("\n".join(texts))
        data = TextDataModule(predict=str(tmp_path / name), tokenizer=str(tmp_path / "chatml"))
        found = predicted(tmp_path, data, tmp_path)
        given = [{k: v for k, v in row.items() if k != "prediction"} for row in found]
        assert (
            given
            == {
                "a.jsonl": rows["a.jsonl"],
                "b.jsonl": [{"messages": messages, "tools": tools}, {"messages": messages}],
                "c.txt": [{"prompt": "The quick"}, {"prompt": "brown fox"}],
            }[name]
        )
        assert all(row["prediction"] for row in found)


@pytest.mark.slow
def test_a_run_answers_prompts(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    language_model_run(tmp_path)
    chats = [[{"role": "user", "content": f"After {word}"}] for word in ("one", "two", "three")]
    rows = "\n".join(json.dumps({"messages": messages}) for messages in chats)
    (tmp_path / "prompts.jsonl").write_text(rows)
    command = (tmp_path, monkeypatch, capfd, "predict", "runs/lm", "--data.predict")
    shown = run_command(*command, "prompts.jsonl")
    (path,) = tmp_path.rglob("predictions.jsonl")
    assert f"predictions: {path.relative_to(tmp_path)}, a line for each row" in shown
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [[*row] for row in found] == [["messages", "prediction"]] * 3
    assert [row["messages"] for row in found] == chats
    (batch,) = torch.load(path.with_suffix(".pt"), weights_only=True)
    assert [row["prediction"] for row in found] == batch
    shown = run_command(*command, "What is 2+2?", fails=1)
    assert "RecordError: 'What is 2+2?' is no file" in shown
    assert "lora-lightning generate RUN --prompt" in shown
