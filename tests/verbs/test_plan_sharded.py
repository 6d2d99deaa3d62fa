"""`plan`: bytes on each of two devices are those that two real processes hold."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_lightning import CausalLM, LoraCallback, TextDataModule, plan
from lora_lightning.layers.traversal import named_adapted_layers
from tests.helpers.memory import optimizer_tensors, storages
from tests.helpers.processes import on_processes
from tests.helpers.tiny_lm import tiny_llama

STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "fsdp": partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1),
}


class Held(Callback):
    """What a process holds after a step."""

    bytes: dict[str, int]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        layers = [layer.adapters for _, layer in named_adapted_layers(pl_module)]
        own = [t for adapters in layers for t in (*adapters.parameters(), *adapters.buffers())]
        ids = {id(t) for t in own}
        everything = (*pl_module.parameters(), *pl_module.buffers())
        state = optimizer_tensors(trainer.optimizers[0])
        parts = {
            "base": [t for t in everything if id(t) not in ids],
            "adapters": own,
            "gradients": [p.grad for p in pl_module.parameters() if p.grad is not None],
            "optimizer": state,
        }
        self.bytes = {name: sum(storages(map(local, t)).values()) for name, t in parts.items()}
        self.bytes["steps"] = sum(t.nbytes for t in state if not t.ndim)
        outer: Any = trainer.strategy.model
        if hasattr(outer, "_get_ddp_logging_data"):
            buckets = outer._get_ddp_logging_data()["bucket_sizes"]
            self.bytes["gradient buckets"] = sum(map(int, buckets.split(",")))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def task_and_data(folder: Path) -> tuple[CausalLM, TextDataModule]:
    data = TextDataModule(str(folder / "rows.jsonl"), val=0, batch_size=2, max_length=64)
    return CausalLM(folder / "model"), data


def held(folder: Path, way: str) -> dict[str, int]:
    found = Held()
    task, data = task_and_data(folder)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[way](),
        max_steps=1,
        default_root_dir=folder / way,
        callbacks=[LoraCallback(r=4), found],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(task, data)
    return found.bytes


@pytest.mark.slow
@pytest.mark.parametrize("way", STRATEGIES)
def test_each_process_holds_what_is_planned(way: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", hidden_size=64, num_hidden_layers=4)
    rows = [{"prompt": "the cat", "completion": " sat on the mat"}] * 16
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, data = task_and_data(tmp_path)
    planned = plan(
        task, LoraCallback(r=4), data, devices=2, strategy=way, accelerator="cpu", max_steps=1
    )
    parts = planned.placement.parts
    first = on_processes(2, held, tmp_path, way)[0]
    steps = first.pop("steps")
    for name, count in first.items():
        # A step is a number for each tensor, which is not shared out, but counted as if it were.
        assert parts[name] == pytest.approx(count, abs=steps if name == "optimizer" else 0), name
    assert torch.tensor([*first.values()]).min() > 0
    one = planned.placements[0].parts
    halves = [parts[name] / one[name] for name in ("base", "adapters", "gradients", "optimizer")]
    assert all(share == 1 if way == "ddp" else 0.5 <= share < 0.7 for share in halves)
