"""Two gloo processes on the CPU: same adapters on both, adapter-only files, exact resume."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.processes import on_processes


def train(
    folder: Path, epochs: int, *, resume: bool = False, devices: int = 2, batch: int = 8
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = Net().eval()
    module.body[1].p = 0.0  # dropout draws differ with the batch's shape
    torch.rand(1)
    callback = LoraCallback(r=2, target_modules=["embed", "body.2"], modules_to_save=["head"])
    saver = ModelCheckpoint(folder, save_last=True, filename="{epoch}")
    strategy = "ddp" if devices > 1 else "auto"
    options = {"max_epochs": epochs, "devices": devices, "strategy": strategy}
    trainer = make_trainer(folder, callback, saver, **options, use_distributed_sampler=False)
    every_other = list(range(int(os.environ.get("LOCAL_RANK", 0)), 64, devices))
    loader = DataLoader(Data().dataset, batch_size=batch, sampler=every_other)
    trainer.fit(module, loader, ckpt_path="last" if resume else None)
    return {k: v for k, v in module.state_dict().items() if ".adapters." in k}


def on_two(*args: object, **kwargs: object) -> dict[str, Tensor]:
    states = on_processes(2, train, *args, **kwargs)
    assert all(torch.equal(states[1][key], states[0][key]) for key in states[0])
    return states[0]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    straight = on_two(tmp_path / "straight", 4)
    on_two(tmp_path / "broken", 2)
    resumed = on_two(tmp_path / "broken", 4, resume=True)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    saved = torch.load(tmp_path / "straight/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == straight.keys()
    # One process with the doubled batch: the same samples in another order of summation.
    alone = train(tmp_path / "alone", 4, devices=1, batch=16)
    for key, value in straight.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)


def unseeded(folder: Path) -> dict[str, Tensor]:
    """A head that each process has drawn for itself, of which DDP takes the first one's."""
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
    module = Net()
    callback = LoraCallback(r=2, target_modules=["embed"], modules_to_save=["head"])
    options = {"max_steps": 2, "devices": 2, "strategy": "ddp"}
    make_trainer(folder, callback, **options).fit(module, Data())
    return dict(module.state_dict())  # with the base's own tensors under their names


@pytest.mark.slow
def test_the_base_of_a_head_is_the_same_everywhere(tmp_path: Path) -> None:
    first, second = on_processes(2, unseeded, tmp_path)
    assert {"head.weight", "head.adapters.default.module.weight"} <= first.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class Reducer(Callback):
    """How many bytes DDP's reducer holds."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.held = trainer.model._get_ddp_logging_data()["total_parameter_size_bytes"]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
}


def variants(folder: Path) -> dict[str, Any]:
    """Adapters under DDP's options, and how much of the model its reducer holds."""
    found: dict[str, Any] = {}
    for name, options in VARIANTS.items():
        torch.manual_seed(0)
        callback, reducer = LoraCallback(r=2, target_modules=["embed", "body.2"]), Reducer()
        trainer = make_trainer(
            folder, callback, reducer, devices=2, max_epochs=2,
            strategy=DDPStrategy(**options), use_distributed_sampler=False,
        )  # fmt: skip
        module = Net()
        trainer.fit(module, DataLoader(Data().dataset, 8))
        own = {key: value for key, value in module.state_dict().items() if ".adapters." in key}
        found[name] = {**own, "held": torch.tensor(reducer.held)}
    return found


@pytest.mark.slow
def test_options_of_ddp(tmp_path: Path) -> None:
    first, second = on_processes(2, variants, tmp_path)
    for name in VARIANTS:
        assert all(torch.equal(first[name][k], second[name][k]) for k in first[name]), name
        assert all(torch.equal(first[name][k], first["plain"][k]) for k in first[name]), name
    adapters = [value for key, value in first["plain"].items() if key != "held"]
    assert any(value.any() for value in adapters)
    # Nothing of the base is in the reducer.
    assert first["plain"]["held"] == 4 * sum(value.numel() for value in adapters)


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is gone")
    torch.distributed.init_process_group("gloo")  # waits for the other


@pytest.mark.slow
def test_a_failing_rank_ends_the_test() -> None:
    with pytest.raises(AssertionError, match="rank one is gone"):
        on_processes(2, fail_on_rank_one)
