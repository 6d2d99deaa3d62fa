"""Every config of the gallery, run as it is by the real command, on a tiny model."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lightning.cli.main
from tests.helpers.paths import ROOT
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import PLAIN_WORDS, tiny_llama, tiny_tokenizer
from tests.helpers.tiny_vision import COLOURS, image_of, save_tiny_vision

CONFIGS = ROOT / "configs"
THINGS = [f"{a} {b}" for a in ("red", "old", "small", "far") for b in ("house", "garden", "river")]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def words(dice: random.Random, most: int) -> str:
    return " ".join(dice.choices(PLAIN_WORDS, k=dice.randint(1, most)))


def causal(place: Path) -> list[str]:
    dice = random.Random(0)
    rows = [{"prompt": f"{thing}:", "completion": f" {words(dice, 9)}"} for thing in THINGS * 2]
    return ["--model.model", tiny_llama(place / "llama", max_position_embeddings=2048).name, "--data.train", jsonl(place / "my.jsonl", rows),
            "--data.val", "0.2"]  # fmt: skip


def chats(place: Path) -> list[str]:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Answer."},
                {"role": "user", "content": f"Where is the {thing}?"},
                {"role": "assistant", "content": f"The {thing} is near."},
                {"role": "user", "content": "And now?"},
                {"role": "assistant", "content": "Far behind."},
            ]
        }
        for thing in THINGS
    ]
    model = tiny_llama(place / "llama", template="chatml", max_position_embeddings=2048)
    return ["--model.model", model.name, "--data.train", jsonl(place / "chats.jsonl", rows), "--data.val", "0.3"]  # fmt: skip


def seq2seq(place: Path) -> list[str]:
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(place / "t5")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    ids = {"decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), **sizes, **ids)
    T5ForConditionalGeneration(config).save_pretrained(place / "t5")
    rows = [{"prompt": f"turn round: {thing}", "completion": thing[::-1]} for thing in THINGS * 2]
    rows = [{**row, "prompt": f"{row['prompt']} {n}"} for n, row in enumerate(rows)]
    return ["--model.model", "t5", "--data.train", jsonl(place / "my.jsonl", rows), "--data.val", "0.2"]  # fmt: skip


def labelled_texts(place: Path) -> list[str]:
    save_tiny_bert(place / "bert")
    with (place / "my.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows(
            (f"the {thing} was {very} {word}", label)
            for label, word in (("pos", "good"), ("neg", "bad"))
            for thing in ("film", "book", "red film", "red book", "green book", "green film")
            for very in ("very", "not", "a")
        )
    return ["--model.model", "bert", "--data.train", "my.csv", "--data.val", "0.2", "--data.max_length", "32"]  # fmt: skip


def labelled_words(place: Path) -> list[str]:
    save_tiny_bert(place / "bert")
    labels = {"good": "ADJ", "bad": "ADJ", "film": "NOUN", "book": "NOUN", "the": "O", "was": "O"}
    dice = random.Random(0)
    drawn = [dice.choices(list(labels), k=dice.randint(1, 9)) for _ in range(40)]
    rows = [{"tokens": tokens, "labels": [labels[t] for t in tokens]} for tokens in drawn]
    return ["--model.model", "bert", "--data.train", jsonl(place / "my.jsonl", rows), "--data.val", "0.2",
            "--data.max_length", "32"]  # fmt: skip


def images(place: Path) -> list[str]:
    save_tiny_vision("vit", place / "vit")
    for colour in COLOURS:
        (place / "photos" / colour).mkdir(parents=True)
        for number in range(12):
            image_of(colour, number).save(place / "photos" / colour / f"{number}.png")
    return ["--model.model", "vit", "--data.train", "photos", "--data.val", "0.2"]


OWN_MODULE = """
import torch
from lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class MyModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class MyData(LightningDataModule):
    def loader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.cumsum(dim=1)), batch_size=16)

    train_dataloader = val_dataloader = loader
"""


def own(place: Path) -> list[str]:
    (place / "my_module.py").write_text(OWN_MODULE)
    return []


# What makes each config small: nothing else in it is changed.
GALLERY: dict[str, Callable[[Path], list[str]]] = {
    "sft.yaml": causal,
    "qlora.yaml": causal,
    "chat.yaml": chats,
    "seq2seq.yaml": seq2seq,
    "classification.yaml": labelled_texts,
    "token_classification.yaml": labelled_words,
    "image_classification.yaml": images,
    "own_module.yaml": own,
}
# Run on two processes, each behind sft.yaml.
OVERLAYS = ["overlays/ddp.yaml", "overlays/fsdp.yaml", "overlays/multi_node.yaml"]
# Run, as it is, by test_cli.test_quickstart.
ELSEWHERE = ["quickstart.yaml"]
ON_CPU = ["--trainer.accelerator", "cpu"]


def test_every_config_is_run() -> None:
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert found == {*GALLERY, *OVERLAYS, *ELSEWHERE}


def checkpoints(place: Path) -> list[Path]:
    return sorted((place / "runs").rglob("*.ckpt"))


def only_what_trains(path: Path) -> bool:
    keys = torch.load(path, weights_only=True)["state_dict"]
    return bool(keys) and all(".adapters." in key for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", GALLERY)
def test_gallery(name: str, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--config", str(CONFIGS / name), *GALLERY[name](tmp_path), *ON_CPU]
    monkeypatch.setattr(sys, "argv", ["lora-lightning", "fit", *options])
    lora_lightning.cli.main.main()
    said = capfd.readouterr().out
    assert "LoRA adapter 'default'" in said
    assert "│ val_loss " in said, said  # the table of base and tuned
    saved = checkpoints(tmp_path)
    assert saved
    assert all(map(only_what_trains, saved))

    monkeypatch.setattr(
        sys, "argv", ["lora-lightning", "validate", *options, "--ckpt_path", "best"]
    )
    if name != "own_module.yaml":  # monitors nothing
        lora_lightning.cli.main.main()
        assert "val_loss" in capfd.readouterr().out


def command(place: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    installed = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(installed), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
        **variables,
    }
    return subprocess.Popen(arguments, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def said_by(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERLAYS[:2])
def test_overlay(name: str, tmp_path: Path) -> None:
    options = ["--config", str(CONFIGS / "sft.yaml"), "--config", str(CONFIGS / name), *causal(tmp_path)]  # fmt: skip
    two = ["--trainer.devices", "2", *ON_CPU]
    said = said_by(command(tmp_path, "lora-lightning", "fit", *options, *two))
    assert "x 2 devices" in said
    assert "│ val_loss " in said, said
    assert all(map(only_what_trains, checkpoints(tmp_path)))


@pytest.mark.slow
def test_multi_node(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{probe.getsockname()[1]}"
    configs = ["--config", str(CONFIGS / "sft.yaml"), "--config", str(CONFIGS / OVERLAYS[2])]
    call = [str(CONFIGS / "launch/torchrun.sh"), *configs, *causal(tmp_path), *ON_CPU]
    machines = [
        command(tmp_path, *call, HEAD=head, NODES="2", PROCESSES="1", ADDRESS="127.0.0.1")
        for _ in "01"
    ]
    said = "".join(map(said_by, machines))
    assert "x 2 devices" in said
    assert all(map(only_what_trains, checkpoints(tmp_path)))
