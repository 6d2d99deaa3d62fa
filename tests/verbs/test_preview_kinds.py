"""`preview` of classes, words, images and batches of one's own; and as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lora_lightning.data.images import ImageDataModule
from lora_lightning.data.text_classification import TextClassificationDataModule
from lora_lightning.data.token_classification import TokenClassificationDataModule
from lora_lightning.errors import ConfigError
from lora_lightning.verbs.preview.preview import preview
from tests.helpers.command import run_command
from tests.helpers.lightning_modules import Data, Net
from tests.helpers.messages import message_of
from tests.helpers.paths import child_environment
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_vision import save_images, save_tiny_vision
from tests.helpers.trained_runs import language_model_run, own_module_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    save_tiny_bert(folder / "bert")
    return folder


def in_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with `first`."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_classes(folder: Path) -> None:
    rows = [{"text": f"good film {'a ' * i}", "label": "neg" if i % 3 else "pos\x1b[1m"} for i in range(20)]  # fmt: skip
    path = in_lines(folder / "t.jsonl", rows)
    test = in_lines(folder / "test.jsonl", rows[:4])
    data = TextClassificationDataModule(
        path, val=0.4, test=test, tokenizer=str(folder / "bert"), max_length=16
    )
    found = preview(data, rows=2)
    text = str(found)
    train, val = (Counter(record.label for record in data.records(s)) for s in ("train", "val"))
    assert train.total() + val.total() == 20
    assert cells(text, "class") if "│ class " in text else "┃ class " in text
    assert cells(text, "neg") == ["neg", str(train["neg"]), str(val["neg"]), "2"]
    shown = r"pos\x1b[1m"
    assert cells(text, shown) == [shown, str(train["pos\x1b[1m"]), str(val["pos\x1b[1m"]), "2"]
    assert "val (held out)" in text
    record = data.records("train")[0]
    assert found.texts[0].title.startswith(f"example 1: {record.where}: ")
    assert found.texts[0].title.endswith(repr(record.label))
    (piece,) = found.texts[0].documents[0]
    assert piece.text == f"[CLS] {record.text.strip()} [SEP]".replace("film  ", "film ")
    assert "\x1b" not in text
    cut = sum(len(record.text.split()) > 14 for record in data.records("train"))
    assert found.told["train"] == (
        f"train: {train.total()} texts, {cut} of them cut to 16 tokens (data.max_length)"
    )


def test_words_stand_beside_their_labels(folder: Path) -> None:
    rows = [
        {"tokens": ["good", "film"], "labels": ["O", "B-WORK"]},
        {"tokens": ["the", "\x1b[31m", "\t", *["was"] * 9], "labels": ["O", "B-WORK", *["O"] * 10]},
    ]  # fmt: skip
    path = in_lines(folder / "w.jsonl", rows)
    options: Any = {"tokenizer": str(folder / "bert"), "max_length": 7}
    found = preview(TokenClassificationDataModule(path, val=path, **options))
    text = str(found)
    assert "good⟦O⟧ film⟦B-WORK⟧" in text
    assert r"the⟦O⟧ \x1b[31m⟦B-WORK⟧" in text
    assert "was⟦O⟧ was⟦cut off⟧" in text
    lost = int(found.told["train"].partition("(data.max_length), ")[2].split()[0])
    assert text.count("⟦cut off⟧") + text.count("⟦no token⟧") == lost > 1
    assert "\t⟦no token⟧" in text or "⟦no token⟧ was" in text
    assert cells(text, "B-WORK") == ["B-WORK", "2", "2"]
    predict = preview(
        TokenClassificationDataModule(predict=path, label_names=["a", "b"], **options)
    )
    assert "good film" in str(predict)


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, processor = "images", "net"
    save_images(tmp_path / folder)
    save_tiny_vision("convnext", tmp_path / processor)
    options: Any = {"image_processor": processor, "val": 0.3}
    data = ImageDataModule(folder, random_crop=0.5, random_horizontal_flip=0.25, **options)
    text = str(preview(data, rows=1))
    first = data.records("train")[0]
    shown = [line for line in text.splitlines() if f"│ {first.where} " in line]
    assert len(shown) == 1
    assert "│ blue " in shown[0]
    assert "│ 20 x 14 " in shown[0]
    assert "│ 3 x 16 x 16 " in shown[0]
    assert "sizes: all are 20 x 14" in text
    assert "resized to shortest_edge 16; times 0.003922; normalised: (0.5, 0.5, 0.5)" in text
    assert (
        "mirrored with probability 0.25 (data.random_horizontal_flip); a part of 0.5 to 1" in text
    )
    assert "augmentation of training images: none" in str(
        preview(ImageDataModule(folder, **options))
    )
    labels = Counter(record.label for record in data.records("train"))
    assert cells(text, "blue")[1] == str(labels["blue"])


class Pair(NamedTuple):
    first: torch.Tensor
    second: Any


def test_batches_of_ones_own() -> None:
    mixed = {
        "x": torch.tensor([[0.5, -1.5], [float("nan"), float("inf")]]),
        "y": Pair(torch.tensor([1, 1, 2]), [torch.zeros(2, dtype=torch.bool), np.arange(30)]),
        "name": ["\x1b[31m", "b"],
        "none": None,
        "empty": torch.zeros(0, 3),
    }
    text = str(preview([mixed]))
    assert cells(text, "batch['x']") == [
        "batch['x']", "2 x 2", "float32", "-1.5 to 0.5, mean -0.5; 2 are NaN or infinite",
    ]  # fmt: skip
    assert cells(text, "batch['y'].first")[1:] == ["3", "int64", "1 (2 times), 2 (1 times)"]
    assert cells(text, "batch['y'].second[0]")[1:] == ["2", "bool", "0 % True"]
    assert cells(text, "batch['y'].second[1]")[1:] == ["30", "int64", "0 to 29"]
    assert cells(text, "batch['name']")[1:] == ["2 texts", "str", r"'\x1b[31m'"]
    assert cells(text, "batch['empty']")[1:] == ["0 x 3", "float32", "empty"]
    assert "train: 1 batches" in text


def test_a_module_of_ones_own_and_its_data() -> None:
    class Owner(Net):
        def train_dataloader(self) -> Any:
            assert self.trainer.world_size == 1  # as it may ask for
            return {"a": Data().train_dataloader(), "b": [DataLoader(list(torch.ones(6, 2)), 3)]}

    found = preview(Data(), Net())
    x, y = next(iter(Data().val_dataloader()))
    counts = ", ".join(f"{c} ({n} times)" for c, n in sorted(Counter(y.tolist()).items()))
    assert counts in str(found)
    assert f"{x.min():.4g} to {x.max():.4g}, mean {x.double().mean():.4g}" in str(found)
    assert found.told == dict.fromkeys(("train", "val"), "") | {
        "train": "train: 4 batches of 16 rows",
        "val": "val: 4 batches of 16 rows",
    }
    own = preview(module=Owner())
    assert [*own.told] == ["train['a']", "train['b'][0]"]
    assert message_of(ConfigError, preview, 5) == (
        "the train data are of the type int, which gives no batches; give a LightningDataModule or "
        "a DataLoader. (data)"
    )
    assert "gives no batch" in message_of(ConfigError, preview, DataLoader([]))


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_of_the_command(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    language_model_run(tmp_path)
    own_module_run(tmp_path)
    capfd.readouterr()
    before = sorted(tmp_path.rglob("*"))

    def run(*arguments: str, fails: int = 0) -> str:
        return run_command(tmp_path, monkeypatch, capfd, "preview", *arguments, fails=fails)

    shown = run("runs/lm", "--rows", "1")
    assert "⟦two<|im_end|>⟧" in shown
    assert "16 of 16 turns and answers end in '<|im_end|>', which is learned" in shown
    assert shown.count("train: 16 examples") == 1
    assert "example 2" not in shown
    # Whatever devices the run is for, and whether or not there is one.
    there = ("--trainer.accelerator=gpu", "--trainer.devices=8", "--trainer.strategy=fsdp")
    assert "batch[0]" in run("--config", "own.yaml", *there)
    assert "RecordError" in run("runs/lm", "--data.train", "chats.json", fails=1)
    assert "reads like a text" in run("runs/lm", "--data.train", "some text", fails=1)
    assert "(rows)" in run("runs/lm", "--rows", "0", fails=1)
    assert "Did you mean" in run("runs/lm", "--row", "1", fails=2)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_it_is_a_command(tmp_path: Path) -> None:
    from tests.helpers.tiny_lm import tiny_llama

    tiny_llama(tmp_path / "base", "chatml")
    rows = [{"prompt": f"What is {n}?", "completion": f"\x1b[31m{n}"} for n in range(9)]
    in_lines(tmp_path / "my.jsonl", rows)
    config = Path(__file__).parents[2] / "configs" / "sft.yaml"
    words = ["preview", "--config", str(config), "--model.model", "base", "--data.train", "my.jsonl", "--data.max_length", "64", "--data.val", "0", "--rows", "2"]  # fmt: skip
    code = "from lora_lightning.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=child_environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert r"What is 0?⟦\x1b[31m0<|im_end|>⟧" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path)) == ["base", "my.jsonl"]  # no run directory
