"""What must come to the same comes to the same through the command, and a broken one does not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import lora_lightning.cli.main
from lora_lightning.tasks.lm_loss import LMLoss, TokenLoss
from tests.helpers.causal_lm_with_sgd import MeanOfMeans, WithSGD
from tests.helpers.processes import on_processes
from tests.helpers.tiny_lm import tiny_llama

pytestmark = pytest.mark.slow
WORDS = [
    "Hello",
    "world!",
    "How",
    "are",
    "you",
    "today?",
    "I",
    "am",
    "fine,",
    "thank",
    "you.",
    "The",
    "quick",
    "brown",
    "fox",
    "jumps",
]
MEANS = {"model.class_path": f"{MeanOfMeans.__module__}.{MeanOfMeans.__name__}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama(folder / "llama")
    rows = [
        {"prompt": "What is it?", "completion": " ".join(WORDS[: 1 + 5 * i % 13])} for i in range(8)
    ]
    (folder / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def fit(folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Tensor]:
    """What B is in the checkpoint at the end of an epoch of 8 examples."""
    config: dict[str, Any] = {
        "seed_everything": 3,
        "model": {
            "class_path": f"{WithSGD.__module__}.{WithSGD.__name__}",
            "init_args": {"model": "llama"},
        },
        "data": {
            "class_path": "lora_lightning.data.TextDataModule",
            "init_args": {"train": "my.jsonl", "val": "my.jsonl", "max_length": 64},
        },
        "lora": {"r": 4},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": name},
    }
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    os.chdir(folder)
    rank = os.environ.get("RANK", "0")
    Path(f"{name}{rank}.yaml").write_text(yaml.safe_dump(config))
    sys.argv = ["lora-lightning", "fit", "--config", f"{name}{rank}.yaml"]
    lora_lightning.cli.main.main()
    [path] = Path(name).rglob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if "lora_B" in key}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Relative."""
    a, b = (torch.cat([x.flatten() for x in state.values()]) for state in (first, second))
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Tensor]:
    """One step on one batch of 8."""
    here = os.getcwd()
    try:
        return fit(folder, "whole", {"data.init_args.batch_size": 8})
    finally:
        os.chdir(here)


@pytest.fixture(autouse=True)
def _where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.getcwd())
    monkeypatch.setattr(sys, "argv", sys.argv)


ONE_BY_ONE = {"data.init_args.batch_size": 1, "trainer.accumulate_grad_batches": 8}


def test_accumulation(folder: Path, whole: dict[str, Tensor]) -> None:
    assert difference(fit(folder, "accumulated", ONE_BY_ONE), whole) < 1e-5
    assert difference(fit(folder, "broken1", {**ONE_BY_ONE, **MEANS}), whole) > 1e-2


def test_packing(folder: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {"data.init_args.packing": True, "data.init_args.batch_size": 8}
    assert difference(fit(folder, "packed", packed), whole) < 1e-5
    # Were the positions kept from the network, the examples of a row would see each other.
    monkeypatch.setattr(
        WithSGD,
        "inputs",
        lambda self, batch: {k: v for k, v in batch.items() if k not in ("labels", "position_ids")},
    )
    assert difference(fit(folder, "broken2", packed), whole) > 1e-2


def test_chunks(folder: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    in_one = {"data.init_args.batch_size": 8}
    monkeypatch.setattr("lora_lightning.tasks.chunked_cross_entropy.CHUNK", 3000)
    assert difference(fit(folder, "chunks", in_one), whole) < 1e-5
    monkeypatch.setattr(LMLoss, "_by_chunks", lambda *args: None)
    assert difference(fit(folder, "plain", in_one), whole) < 1e-5
    plainly = LMLoss.__call__

    def without_the_last(self: Any, network: Any, inputs: Any, targets: Tensor) -> TokenLoss:
        return plainly(self, network, inputs, targets.index_fill(0, torch.tensor([7]), -100))

    monkeypatch.setattr(LMLoss, "__call__", without_the_last)
    assert difference(fit(folder, "broken3", in_one), whole) > 1e-2


def on_rank(folder: Path) -> None:
    halves = {"data.init_args.batch_size": 2, "trainer.accumulate_grad_batches": 2, "trainer.devices": 2, "trainer.strategy": "ddp"}  # fmt: skip
    fit(folder, "ddp", halves)
    fit(folder, "broken4", {**halves, **MEANS})


def test_two_processes(folder: Path, whole: dict[str, Tensor]) -> None:
    on_processes(2, on_rank, folder)
    states = []
    for name in ("ddp", "broken4"):
        [path] = (folder / name).rglob("*.ckpt")
        state = torch.load(path, weights_only=True)["state_dict"]
        states.append({key: value for key, value in state.items() if "lora_B" in key})
    assert difference(states[0], whole) < 1e-5
    assert difference(states[1], whole) > 1e-2
