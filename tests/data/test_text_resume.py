"""From a checkpoint in the middle of an epoch the next batch is the one that would have come."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything

from lora_lightning import LoraCallback, TextDataModule
from lora_lightning.data.batches.stream import StreamPass
from lora_lightning.utilities.hub import load_pretrained
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.tiny_lm import tiny_llama

# Epoch and batch after which checkpoints are written.
SPOTS = ((0, 1), (1, 2))


class Spots(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        spot = trainer.current_epoch, trainer.fit_loop.batch_idx
        if spot in SPOTS:
            trainer.save_checkpoint(self.folder / f"{spot}.ckpt")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("model"), hidden_size=16, num_hidden_layers=1))


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"What is {n}? " * (1 + n % 4), "completion": f"{n}."} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Reader(LightningModule):
    """Trains, and keeps what it has read, by its place in the run."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model_name = model
        self.network = load_pretrained("AutoModelForCausalLM", model)
        self.read: dict[tuple[int, int], list[list[int]]] = {}

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.read[self.current_epoch, batch_idx] = batch["input_ids"].tolist()
        return self.network(**batch, use_cache=False).loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.network(**batch, use_cache=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def fit(folder: Path, model: str, train: str, lora: bool, checkpoint: Path | None = None, **how):
    """What was read, and the weights in the end."""
    seed_everything(7 if checkpoint is None else 123, verbose=False)
    if checkpoint is not None:
        torch.rand(5)  # another process, with luck of its own
    options = {"max_length": 64, "batch_size": 3, "shuffle_buffer": 8, **how}
    callbacks = [LoraCallback(r=2)] if lora else []
    trainer = make_trainer(folder, *callbacks, Spots(folder), max_epochs=2)
    module = Reader(model)
    trainer.fit(module, TextDataModule(train=train, **options), ckpt_path=checkpoint)
    return module.read, torch.cat([p.detach().flatten() for p in module.parameters()])


MODES = {
    "map": {"batch_size": 16},
    "map, packed": {"packing": True, "batch_size": 4},
    "streaming": {"streaming": True, "batch_size": 16, "shuffle_buffer": 20},
    "streaming, packed": {"streaming": True, "packing": True, "batch_size": 4},
}


# Those with workers take longer to start than to train.
FAST = ("map", 0, True), ("streaming, packed", 0, True), ("streaming, packed", 2, True)


@pytest.mark.parametrize(
    ("mode", "workers", "lora"),
    [
        pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow])
        for case in itertools.product(MODES, (0, 2), (True, False))
    ],
)
def test_the_next_batch_is_the_one_that_would_have_come(
    mode, workers, lora, model, train, tmp_path
):
    how = {"num_workers": workers, **MODES[mode]}
    straight, weights = fit(tmp_path, model, train, lora, **how)
    check_epochs(straight)
    for spot in SPOTS:
        checkpoint = tmp_path / f"{spot}.ckpt"
        resumed, theirs = fit(tmp_path / "resumed", model, train, lora, checkpoint, **how)
        assert resumed == {place: batch for place, batch in straight.items() if place > spot}
        assert torch.equal(theirs, weights)


def check_epochs(read: dict[tuple[int, int], Any]) -> None:
    """Two epochs of several batches, in different orders, so that the comparison says something."""
    epochs = [[b for (epoch, _), b in read.items() if epoch == n] for n in (0, 1)]
    assert all(len(epoch) > 4 for epoch in epochs)
    assert sorted(map(str, epochs[0])) != sorted(map(str, epochs[1]))


def forget(monkeypatch, mode):
    """A negative control: the position is lost."""
    if "streaming" in mode:
        monkeypatch.setattr(StreamPass, "load_state_dict", lambda self, state: None)
    else:
        monkeypatch.setattr(TextDataModule, "load_state_dict", lambda self, state: None)


@pytest.mark.parametrize("mode", ["map", "streaming, packed"])
def test_the_comparison_can_fail(mode, model, train, tmp_path, monkeypatch):
    straight, weights = fit(tmp_path, model, train, False, **MODES[mode])
    forget(monkeypatch, mode)
    checkpoint = tmp_path / f"{SPOTS[0]}.ckpt"
    resumed, theirs = fit(tmp_path / "resumed", model, train, False, checkpoint, **MODES[mode])
    assert resumed != {place: batch for place, batch in straight.items() if place in resumed}
    assert not torch.equal(theirs, weights)
