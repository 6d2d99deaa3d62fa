"""Token and image classification from a config and a file, without a line of Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.command import run_command
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_vision import save_images, save_tiny_vision

IMAGES = {
    "model": {"class_path": "lora_lightning.ImageClassification", "init_args": {"model": "vit"}},
    "data": {
        "class_path": "lora_lightning.ImageDataModule",
        "init_args": {"train": "images", "val": 0.3, "predict": "images", "random_crop": 0.5},
    },
}
WORDS = {
    "model": {"class_path": "lora_lightning.TokenClassification", "init_args": {"model": "bert"}},
    "data": {
        "class_path": "lora_lightning.TokenClassificationDataModule",
        "init_args": {"train": "a.jsonl", "val": "a.jsonl", "predict": "a.jsonl", "max_length": 16},
    },
}
RUN = {
    "lora": {"r": 2, "modules_to_save": ["classifier"]},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": "runs/a"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_images(tmp_path / "images")
    save_tiny_vision("vit", tmp_path / "vit")
    save_tiny_bert(tmp_path / "bert")
    rows = [
        {"tokens": ["good", "film"], "labels": ["O", "B-WORK"]},
        {"tokens": ["the", "book", "was", "bad"], "labels": ["O", "B-WORK", "O", "O"]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def cli(folder: Path, monkeypatch: Any, capfd: Any) -> Any:
    """Run the command in this process; returns what it prints."""

    def run(config: dict[str, Any], *arguments: str, fails: int = 0) -> str:
        (folder / "my.yaml").write_text(yaml.safe_dump({**RUN, **config}))
        command, *rest = arguments
        words = [command, "--config", "my.yaml", *rest]
        return run_command(folder, monkeypatch, capfd, *words, fails=fails)

    return run


def predictions(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("predictions.pt")
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_images(cli: Any, folder: Path) -> None:
    out = cli(IMAGES, "fit")
    assert "val_accuracy" in out
    cli(IMAGES, "fit", "--ckpt_path", "last", "--trainer.max_epochs", "3")
    cli(IMAGES, "predict", "--ckpt_path", "last")
    (batch, _) = predictions(folder)  # 36 images
    assert batch["where"][0] == str(Path("images", "blue", "000.png"))
    assert set(batch["labels"]) <= {"blue", "green", "red"}
    assert batch["probabilities"].shape == (32, 3)
    (path,) = folder.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 36
    assert [row["label"] for row in rows[:32]] == batch["labels"]
    assert [row["image"] for row in rows[:32]] == batch["where"]
    last = batch["probabilities"][31].tolist()
    names = ["blue", "green", "red"]
    assert rows[31]["probabilities"] == dict(zip(names, last, strict=True))
    assert [*rows[0]] == ["image", "label", "probabilities"]


@pytest.mark.slow
def test_words(cli: Any, folder: Path) -> None:
    out = cli(WORDS, "fit")
    assert "val_entity_f1" in out
    cli(WORDS, "predict", "--ckpt_path", "best")
    (batch,) = predictions(folder)
    assert [len(labels) for labels in batch["labels"]] == [2, 4]
    (path,) = folder.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [["good", "film"], ["the", "book", "was", "bad"]]
    assert [row["labels"] for row in rows] == batch["labels"]
    assert [[*word] for word in rows[0]["probabilities"]] == [["B-WORK", "O"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "option", "problem"),
    [
        (IMAGES, "--data.train=imges", "Did you mean 'images'?"),
        (IMAGES, "--data.random_crop=2", "(data.random_crop)"),
        (IMAGES, "--data.image_collumn=x", "(data). Did you mean 'image_column'?"),
        (IMAGES, "--model.lable_names=[a,b]", "(model). Did you mean 'label_names'?"),
        (IMAGES, "--model.weight_decai=1", "(model). Did you mean 'weight_decay'?"),
        (IMAGES, "--model.class_weights={rde: 2}", "Did you mean 'red'? (model.class_weights)"),
        (WORDS, "--data.label_column=label", "Did you mean 'labels'? (data.label_column)"),
        (WORDS, "--model.label_smoothing=1", "(model.label_smoothing)"),
    ],
)
def test_mistakes_are_told_in_one_piece(cli: Any, config: Any, option: str, problem: str) -> None:
    out = cli(config, "fit", option, fails=2 if problem.startswith(("(data).", "(model).")) else 1)
    assert problem in out
    assert "Traceback" not in out
