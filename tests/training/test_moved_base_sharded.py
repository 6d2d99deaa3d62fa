"""What a module moves of its base where processes share it out: saved whole under FSDP2, refused in
words under FSDP1."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import LoraCallback
from lora_lightning.errors import CheckpointError
from tests.helpers.fsdp1_on_cpu import on_cpu
from tests.helpers.fsdp2_modules import BuiltAndSharded, Quiet, ShardedLater, strategy
from tests.helpers.lightning_modules import Data
from tests.helpers.processes import on_processes


class Decays(LightningModule):
    """The frozen body shrinks before each batch, and a buffer counts."""

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.body[2].weight.data.mul_(0.9)
        self.norm.seen += 1


class Later(Decays, ShardedLater):
    def __init__(self) -> None:
        super().__init__()
        self.norm.register_buffer("seen", torch.zeros(()))


class AtOnce(Decays, BuiltAndSharded):
    def configure_model(self) -> None:
        built = hasattr(self, "norm")
        super().configure_model()
        if not built:
            self.norm.register_buffer("seen", torch.zeros(()))


class Whole(Decays, Quiet):
    def __init__(self) -> None:
        super().__init__()
        self.norm.register_buffer("seen", torch.zeros(()))


def run(make: Any, folder: Path, how: Any, ckpt: Path | None = None, seed: int = 0) -> Any:
    seed_everything(seed, verbose=False)
    module = make()
    lora = LoraCallback(r=2, target_modules=["embed", "head"])
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        max_epochs=2, limit_train_batches=2, limit_val_batches=0, logger=False, devices=2,
        accelerator="cpu", strategy=how(), callbacks=[lora, saver], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Data(), ckpt_path=ckpt)
    return module


def whole(module: Any) -> dict[str, torch.Tensor]:
    state = nn.Module.state_dict(module)
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def sharded(folder: Path, folders: bool) -> list[str]:
    found = []
    for make in (Later, AtOnce):
        here = folder / make.__name__
        straight = whole(run(make, here, lambda: strategy(folders)))
        again = run(make, here / "again", lambda: strategy(folders), here / "step=1.ckpt", seed=5)
        found += [n for n, t in whole(again).items() if not torch.equal(t, straight[n])]
        assert straight["norm.seen"] == 4
    return found


@pytest.mark.slow
@pytest.mark.parametrize("folders", [False, True], ids=["file", "folder"])
def test_fsdp2(folders: bool, tmp_path: Path) -> None:
    assert on_processes(2, sharded, tmp_path, folders) == [[], []]
    if not folders:
        state = torch.load(tmp_path / "Later/step=1.ckpt", weights_only=True)["state_dict"]
        moved = {name: t for name, t in state.items() if "adapters" not in name}
        assert moved.keys() == {"body.2.weight", "norm.seen"}
        torch.testing.assert_close(moved["body.2.weight"], 0.9 * Quiet().body[2].weight.detach())


def flattened(folder: Path) -> str:
    try:
        run(Whole, folder, on_cpu)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_fsdp1(tmp_path: Path) -> None:
    for message in on_processes(2, flattened, tmp_path):
        assert re.search(r"moves parameters of its base \((some|body\.2\.weight)\)", message)
        assert "strategy='ddp'" in message
    assert list(tmp_path.glob("*.ckpt")) == []
