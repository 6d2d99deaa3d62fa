"""The options of tasks as their users give them: `lora-lightning fit` on a file of prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import lora_lightning.cli.main
from lora_lightning.checkpoint.sharded_folder import read_checkpoint_folder
from tests.helpers.processes import on_processes
from tests.helpers.tensors import assert_same_state, same_state
from tests.helpers.tiny_lm import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # bitsandbytes
    pytest.mark.filterwarnings("ignore:.set_vital. is deprecated"),  # torchdata
]

CONFIG: dict[str, Any] = {
    "lora": {"r": 2, "lora_dropout": 0.2},
    "model": {
        "class_path": "lora_lightning.CausalLM",
        "init_args": {"model": "llama", "learning_rate": 1e-2},
    },
    "data": {
        "class_path": "lora_lightning.TextDataModule",
        "init_args": {"train": "my.jsonl", "val": "my.jsonl", "batch_size": 4},
    },
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}
# Checkpoints of the validation after an epoch's last batch, not of the epoch's end.
IN_VALIDATION = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val_loss"]
IN_VALIDATION.append("--trainer.callbacks.save_on_train_epoch_end=false")
SHARED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, a file, a config."""
    place = tmp_path_factory.mktemp("user")
    tiny_llama(place / "llama")
    (place / "only_config").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (place / "only_config" / name).write_bytes((place / "llama" / name).read_bytes())
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"{a} {b}", "completion": f" {b} {a}"[: 4 + i]}
        for i, a in enumerate(words)
        for b in words[:2]
    ]
    (place / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "my.yaml").write_text(yaml.safe_dump(CONFIG))
    sharded = {"trainer": {"strategy": SHARED, "devices": 2}}
    (place / "sharded.yaml").write_text(yaml.safe_dump(sharded))
    return place


def fit(folder: Path, monkeypatch: Any, run: str, *arguments: str) -> dict[str, Tensor]:
    """What the run's checkpoint holds."""
    monkeypatch.chdir(folder)
    options = ["fit", "--config", "my.yaml", f"--trainer.default_root_dir=runs/{run}", *arguments]
    monkeypatch.setattr(sys, "argv", ["lora-lightning", *options])
    torch._dynamo.reset()
    lora_lightning.cli.main.main()
    path = max(
        (folder / "runs" / run / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime
    )
    if path.is_dir():
        return read_checkpoint_folder(path)["state_dict"]
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return fit(folder, monkeypatch, "plain")


@pytest.mark.slow
def test_compile_and_its_options(folder: Path, monkeypatch: Any) -> None:
    # Without dropout, of which a graph draws other numbers.
    options = ["--lora.lora_dropout=0", "--model.warmup_steps=2", "--data.packing=true"]
    options += [
        "--data.max_length=24",
        "--data.batch_size=1",
        "--trainer.limit_val_batches=0",
    ]  # one graph
    options.append("--trainer.accumulate_grad_batches=2")
    wanted = fit(folder, monkeypatch, "not compiled", *options)
    options.append("--model.compile={backend: eager, fullgraph: true}")
    found = fit(folder, monkeypatch, "compiled", *options)
    assert all(torch.allclose(found[key], tensor, atol=1e-6) for key, tensor in wanted.items())


def test_pretraining(folder: Path, monkeypatch: Any) -> None:
    """The whole network from random weights, without adapters."""
    options = ["--lora.enabled=false", "--model.pretrained=false", "--model.model=only_config"]
    found = fit(folder, monkeypatch, "pretrained", *options, "--model.weight_decay=0.1")
    assert len(found) == 21


CONSTANT = ["--model.lr_schedule=constant", "--model.warmup_steps=0", "--data.batch_size=2"]


def fit_here(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Straight, and in two parts, with adapters and in full; a quantised base under DDP."""
    found = {}
    two, again = "--trainer.max_epochs=2", ["--trainer.max_epochs=2", "--ckpt_path=last"]
    with pytest.MonkeyPatch.context() as patched:
        for name, options in {"lora": [], "full": ["--lora.enabled=false"]}.items():
            shared = ["--config=sharded.yaml", *CONSTANT, *options]
            found[name] = fit(folder, patched, f"{name} straight", *shared, two)
            fit(folder, patched, f"{name} parts", *shared)
            found[f"{name} parts"] = fit(folder, patched, f"{name} parts", *shared, *again)
        ddp = ["--trainer.strategy=ddp", "--trainer.devices=2", "--model.quantize=nf4"]
        found["ddp"] = fit(folder, patched, "ddp", *ddp)
    return found


@pytest.fixture(scope="module")
def shared_out(folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    return on_processes(2, fit_here, folder)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [[], IN_VALIDATION], ids=["after the epoch", "in validation"])
def test_resumed_without_adapters(folder: Path, saved: list[str], monkeypatch: Any) -> None:
    """The order of the second epoch is its own, not the first's again."""
    run, options = f"alone {len(saved)}", [*CONSTANT, "--lora.enabled=false", *saved]
    straight = fit(folder, monkeypatch, f"{run} straight", *options, "--trainer.max_epochs=2")
    fit(folder, monkeypatch, run, *options)
    options += ["--trainer.max_epochs=2", "--ckpt_path=last"]
    assert_same_state(straight, fit(folder, monkeypatch, run, *options))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tensors"), [("lora", 28), ("full", 21)])
def test_shared_out_by_yaml_alone(shared_out: Any, name: str, tensors: int) -> None:
    for found in shared_out:
        assert len(found[name]) == tensors
        assert_same_state(found[name], found[f"{name} parts"])


@pytest.mark.slow
def test_negative_control_of_the_resumed_run(
    shared_out: Any, folder: Path, monkeypatch: Any
) -> None:
    once = fit(folder, monkeypatch, "once", *CONSTANT)
    assert once.keys() == shared_out[0]["lora"].keys()
    assert not same_state(once, shared_out[0]["lora"])


@pytest.mark.slow
def test_each_process_has_the_whole_quantised_base(shared_out: Any, plain: Any) -> None:
    first, second = (found["ddp"] for found in shared_out)
    assert first.keys() == plain.keys()
    assert_same_state(first, second)
