"""fit(n) equals fit(k) + a new process's resume(n - k), bit for bit, at epoch boundaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_avg_fn

import lora_lightning.training.resume.run_state
from lora_lightning import LoraCallback
from lora_lightning.errors import ConfigError
from tests.helpers.lightning_modules import (
    BuiltInConfigureModel,
    Data,
    Net,
    NetWithoutOptimizer,
    make_trainer,
)
from tests.helpers.tensors import assert_same_state, same_state


def fit(
    kind: type, folder: Path, epochs: int, ckpt_path: Any = None, **options: Any
) -> dict[str, Any]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)  # another process, other luck
    if ckpt_path is not None:
        torch.rand(5), np.random.rand(3)
    module = kind()
    callback = LoraCallback(
        r=2, lora_dropout=0.3, target_modules=["embed", "body.2"], modules_to_save=["head"]
    )
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    trainer = make_trainer(folder, callback, saver, max_epochs=epochs, **options)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    state = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{k}": v for i, s in state.items() for k, v in s.items() if torch.is_tensor(v)}
    return {**module.state_dict(), **moments}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "clip": {"gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("kind", [Net, NetWithoutOptimizer, BuiltInConfigureModel])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name == "plain" else pytest.mark.slow)
        for name, options in OPTIONS.items()
    ],
)
def test_resume_is_exact(tmp_path: Path, kind: type, options: dict[str, Any]) -> None:
    straight = fit(kind, tmp_path / "straight", 4, **options)
    fit(kind, tmp_path / "broken", 2, **options)
    assert_same_state(straight, fit(kind, tmp_path / "broken", 4, "last", **options))


def test_resume_from_any_epoch(tmp_path: Path) -> None:
    straight = fit(Net, tmp_path, 4)
    for epoch in range(3):
        assert_same_state(
            straight, fit(Net, tmp_path / "again", 4, tmp_path / f"epoch={epoch}.ckpt")
        )


def test_negative_control_without_the_random_state_differs(
    tmp_path: Path, monkeypatch: Any
) -> None:
    straight = fit(Net, tmp_path / "straight", 4)
    fit(Net, tmp_path / "broken", 2)
    monkeypatch.setattr(
        lora_lightning.training.resume.run_state, "set_random_state", lambda _: None
    )
    assert not same_state(straight, fit(Net, tmp_path / "broken", 4, "last"))


def test_evaluation_leaves_the_random_state_alone(tmp_path: Path) -> None:
    fit(Net, tmp_path, 1)
    before = torch.get_rng_state()
    callback = LoraCallback(
        r=2, lora_dropout=0.3, target_modules=["embed", "body.2"], modules_to_save=["head"]
    )
    torch.set_rng_state(before)
    make_trainer(tmp_path, callback).predict(Net(), Data(), ckpt_path=tmp_path / "last.ckpt")
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    Net()  # what a module's construction draws
    for _ in Data().val_dataloader():  # and what the loader draws
        pass
    assert torch.equal(drawn, torch.get_rng_state())


def test_weight_averaging(tmp_path: Path) -> None:
    """EMA of the adapters: only they are saved, and it resumes exactly."""

    def go(folder: Path, epochs: int, ckpt_path: Any = None, lora_first: bool = True) -> Any:
        seed_everything(7 if ckpt_path is None else 123, verbose=False)
        callbacks = [
            LoraCallback(r=2, target_modules=["embed", "body.2"], modules_to_save=["head"]),
            WeightAveraging(avg_fn=get_ema_avg_fn(0.9)),
        ]
        saver = ModelCheckpoint(folder, filename="{epoch}", save_last=True)
        module = Net()
        trainer = make_trainer(
            folder, *callbacks[:: 1 if lora_first else -1], saver, max_epochs=epochs
        )
        trainer.fit(module, Data(), ckpt_path=ckpt_path)
        base = Net().state_dict()  # of which d w + (1 - d) w would not be w again
        assert all(torch.equal(module.state_dict()[name], base[name]) for name in base)
        return module.state_dict()

    straight = go(tmp_path / "straight", 4)
    go(tmp_path / "broken", 2)
    saved = torch.load(tmp_path / "broken/last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert len(saved[part]) == 6
        assert all(".adapters." in key for key in saved[part])
    assert not same_state(saved["state_dict"], saved["current_model_state"])
    assert_same_state(straight, go(tmp_path / "broken", 4, "last"))
    with pytest.raises(ConfigError, match="List LoraCallback before it"):
        go(tmp_path / "wrong", 1, lora_first=False)


def test_other_callbacks_resume_too(tmp_path: Path) -> None:
    def go(folder: Path, epochs: int, ckpt_path: Any = None) -> int:
        seed_everything(3, verbose=False)
        stop = EarlyStopping(
            "val_loss", patience=2, min_delta=10.0
        )  # nothing ever counts as better
        trainer = make_trainer(
            folder,
            stop,
            LoraCallback(r=2),
            ModelCheckpoint(folder, save_last=True),
            max_epochs=epochs,
        )
        trainer.fit(Net(), Data(), ckpt_path=ckpt_path)
        return trainer.current_epoch

    assert go(tmp_path / "straight", 10) == 3
    go(tmp_path / "broken", 1)
    assert go(tmp_path / "broken", 10, "last") == 3
