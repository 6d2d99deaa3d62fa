"""Optimizer state stands under the names of parameters, and finds them again in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lora_lightning.training.strategies.state_overrides
from lora_lightning import LoraCallback
from lora_lightning.errors import CheckpointError, OptimizerError
from lora_lightning.training.strategies.optimizer_names import with_names, with_numbers
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.tensors import assert_same_state


class Reversed(Net):
    """Hands its parameters to the optimizer in the opposite order."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(list(self.parameters())[::-1], lr=1e-2)


class Straight(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Grouped(Net):
    """A group for each child, two of them empty once the base is frozen."""

    def configure_optimizers(self) -> Any:
        children = [self.norm, self.embed, self.body[0], self.body[2], self.head]
        groups = [{"params": list(c.parameters()), "lr": 0.01 * i} for i, c in enumerate(children)]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 0.9**e] * 5)]


def fit(kind: type, folder: Path, epochs: int, ckpt_path: Any = None) -> dict[str, Any]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    module = kind()
    callback = LoraCallback(r=2, target_modules=["embed", "body.2"], modules_to_save=["head"])
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    make_trainer(folder, callback, saver, max_epochs=epochs).fit(
        module, Data(), ckpt_path=ckpt_path
    )
    return {k: v for k, v in module.state_dict().items() if ".adapters." in k}


def test_files_name_parameters(tmp_path: Path) -> None:
    trained = fit(Straight, tmp_path, 1)
    (state,) = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["optimizer_states"]
    assert state["state"].keys() == trained.keys()
    assert state["param_groups"][0]["params"] == list(trained)


def test_another_order_resumes_exactly(tmp_path: Path) -> None:
    straight = fit(Straight, tmp_path, 4)
    assert_same_state(straight, fit(Reversed, tmp_path / "other", 4, tmp_path / "epoch=1.ckpt"))


def test_negative_control_with_numbers_gets_others_moments(
    tmp_path: Path, monkeypatch: Any
) -> None:
    room = lora_lightning.training.strategies.state_overrides
    monkeypatch.setattr(room, "with_names", lambda state, *_: state)
    fit(Straight, tmp_path, 4)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fit(Reversed, tmp_path / "other", 4, tmp_path / "epoch=1.ckpt")


def test_empty_groups_stay(tmp_path: Path) -> None:
    straight = fit(Grouped, tmp_path, 4)
    (state,) = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["optimizer_states"]
    assert [len(group["params"]) for group in state["param_groups"]] == [0, 2, 0, 2, 2]
    assert_same_state(straight, fit(Grouped, tmp_path / "again", 4, tmp_path / "epoch=1.ckpt"))


def test_checkpoints_with_numbers_still_resume(tmp_path: Path) -> None:
    """Those that were written before states had names."""
    straight = fit(Straight, tmp_path, 4)
    old = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    state = old["optimizer_states"][0]
    names = state["param_groups"][0]["params"]
    state["state"] = {names.index(name): own for name, own in state["state"].items()}
    state["param_groups"][0]["params"] = list(range(len(names)))
    old["lora_lightning"].pop("content")
    torch.save(old, tmp_path / "old.ckpt")
    assert_same_state(straight, fit(Straight, tmp_path / "again", 4, tmp_path / "old.ckpt"))


def test_other_groups_are_refused(tmp_path: Path) -> None:
    fit(Straight, tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        fit(Grouped, tmp_path / "other", 2, tmp_path / "epoch=0.ckpt")
    text = str(caught.value)
    assert "has other parameter groups" in text
    assert "1 groups in the checkpoint, 5 here" in text
    assert "group 0, only in the checkpoint's: body.2.adapters.default.lora_A" in text


def test_a_strange_tensor_is_refused() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(OptimizerError, match="no parameter of the module"):
        with_names(optimizer.state_dict(), optimizer, module)


def test_round_trip() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(
        [{"params": module[1].parameters(), "lr": 1.0}, {"params": module[0].parameters()}], lr=2.0
    )
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    named = with_names(state, optimizer, module)
    assert named["param_groups"][0]["params"] == ["1.weight", "1.bias"]
    back = with_numbers(named, optimizer, module)
    assert back["param_groups"] == state["param_groups"]
    for number, own in state["state"].items():
        assert all(torch.equal(back["state"][number][key], value) for key, value in own.items())
