"""CONTRIBUTING's new task trains, accumulates exactly and validates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, adapter_state_dict
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.markdown import recipe
from tests.helpers.tiny_bert import save_tiny_bert


def batches(size: int) -> list[dict[str, Tensor]]:
    """Twelve rows of words, whose number is that of a word among them."""
    ids = torch.randint(4, 12, (12, 5), generator=torch.Generator().manual_seed(0))
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole["labels"] = (ids == 7).sum(dim=1).float()
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 12, size)]


@pytest.fixture
def task(tmp_path: Path) -> Any:
    names: dict[str, Any] = {}
    exec(recipe("## A new task"), names)
    folder = save_tiny_bert(tmp_path / "bert")

    def make() -> Any:
        seed_everything(0, verbose=False)  # the head is new
        return names["TextRegression"](str(folder), learning_rate=1e-2, lr_schedule="constant")

    return make


def fit(folder: Path, module: Any, size: int, accumulate: int, epochs: int = 1) -> Any:
    lora = LoraCallback(r=2, modules_to_save=["classifier"])
    trainer = make_trainer(folder, lora, max_epochs=epochs, accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(batches(size), None), DataLoader(batches(5), None))
    return trainer


def test_it_learns(task: Any, tmp_path: Path) -> None:
    losses = [
        fit(tmp_path / str(epochs), task(), 4, 1, epochs).callback_metrics["val_loss"]
        for epochs in (1, 20)
    ]
    assert losses[1] < losses[0] / 2


def test_validation_is_the_mean_of_all_rows(task: Any, tmp_path: Path) -> None:
    module = task()
    trainer = fit(tmp_path, module, 4, 1)
    module.eval()
    (whole,) = batches(12)
    with torch.no_grad():
        expected = (module(whole) - whole["labels"]).square().mean()
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], expected)


def test_accumulation_is_exact(task: Any, tmp_path: Path) -> None:
    found = []
    for size, accumulate in ((12, 1), (5, 3)):  # of five, five and two rows
        module = task()
        module.configure_model()
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        fit(tmp_path / str(size), module, size, accumulate)
        found.append(adapter_state_dict(module))
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-5, atol=1e-6)
