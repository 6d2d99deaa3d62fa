"""`merge` of an own LightningModule: a checkpoint that its own class loads, without this library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lightning
from lora_lightning.errors import AdapterStateError, ConfigError
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import find_run
from tests.helpers.command import run_command
from tests.helpers.markdown import blocks
from tests.helpers.trained_runs import own_module_run

merge = lora_lightning.merge
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own_merged")
    own_module_run(folder)
    return folder


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend(str(trained))
    return trained


def answers(module: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = module.eval()(X)
    return found


def test_what_is_in_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    from own_modules import Net

    result = merge("runs/own", tmp_path / "merged.ckpt")
    content = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert content["state_dict"].keys() == Net().state_dict().keys()
    assert "pytorch-lightning_version" in content
    assert "optimizer_states" not in content
    assert not [key for key in content if "lora" in key]
    wanted = trained_module(find_run("runs/own"))
    merged = Net.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert (answers(merged) - answers(wanted)).abs().max() < 1e-6
    assert (answers(Net()) - answers(wanted)).abs().max() > 1e-3  # the test can fail
    assert result.merged is not None
    assert result.saved is not None
    assert result.saved.largest < 1e-6
    assert result.rows >= 8


WITHOUT = """
import sys
sys.modules["lora_lightning"] = None
import torch
source = open("own_modules.py").read().replace("from lora_lightning import", "from math import")
source = source.replace("LoraCallback", "pi as LoraCallback", 1)
module = type(sys)("own_modules")
exec(source, module.__dict__)
net = module.Net.load_from_checkpoint(sys.argv[1])
with torch.no_grad():
    torch.save(net.eval()(torch.load(sys.argv[2])), sys.argv[3])
assert not any(name.startswith("lora_lightning.") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_process_in_which_this_library_cannot_be_imported(folder: Path, tmp_path: Path) -> None:
    merge("runs/own", tmp_path / "merged.ckpt")
    torch.save(X, tmp_path / "x.pt")
    command = [sys.executable, "-c", WITHOUT]
    names = [str(tmp_path / name) for name in ("merged.ckpt", "x.pt", "y.pt")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*command, *names], check=True, env=environment)
    wanted = answers(trained_module(find_run("runs/own")))
    assert (torch.load(tmp_path / "y.pt") - wanted).abs().max() < 1e-6


def test_another_dtype(folder: Path, tmp_path: Path) -> None:
    from own_modules import Net

    result = merge("runs/own", tmp_path / "merged.ckpt", dtype="bfloat16")
    state = torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    assert kinds == {torch.bfloat16}
    wanted = lora_lightning.merge_and_unload(trained_module(find_run("runs/own"))).state_dict()
    assert all(torch.equal(state[key], wanted[key].to(state[key].dtype)) for key in state)
    assert result.merged is not None
    assert result.saved is not None
    assert result.merged.largest < 1e-6 < result.saved.largest
    Net.load_from_checkpoint(tmp_path / "merged.ckpt")


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    out = str(tmp_path / "merged.ckpt")
    shown = run_command(folder, monkeypatch, capfd, "merge", "runs/own", out)
    assert "the whole module, under its own names" in shown
    assert f"Net.load_from_checkpoint('{out}')" in shown
    shown = run_command(folder, monkeypatch, capfd, "merge", "runs/own", out, fails=1)
    assert "is there already" in shown
    alone = str(folder / "runs/own/checkpoints/last.ckpt")
    shown = run_command(
        folder, monkeypatch, capfd, "merge", alone, out, "--module", "own_modules.Net", "--force"
    )
    assert "last.ckpt" in shown


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    monkeypatch.setattr("lora_lightning.verbs.merge.whole_module.torch.save", full)
    with pytest.raises(ConfigError, match=r"cannot be written: .*Nothing was left there. \(out\)"):
        merge("runs/own", tmp_path / "merged.ckpt")
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_compared_is_said(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from own_modules import Net

    result = merge("runs/own", tmp_path / "a.ckpt", check=0)
    assert "not compared with the unmerged module: --check 0" in str(result)

    def silent(self: Any, batch: Any, batch_idx: int = 0) -> None:
        raise ValueError("I answer nobody")

    monkeypatch.setattr(Net, "predict_step", silent)
    monkeypatch.setattr(Net, "forward", silent)
    monkeypatch.setattr(Net, "validation_step", lambda *_: None)
    result = merge("runs/own", tmp_path / "b.ckpt")
    assert "not compared with the unmerged module: I answer nobody" in str(result)


@pytest.mark.slow
def test_quantized_layers_of_ones_own_are_refused(folder: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from own_modules import Net

    net = trained_module(find_run("runs/own"))
    net.extra = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    net.extra[0].weight = net.extra[0].weight.to("cpu")
    assert isinstance(net, Net)
    lora_lightning.unload(net)
    with pytest.raises(
        AdapterStateError, match=r"'extra\.0' and 0 other layers hold weights in few"
    ):
        merge("runs/own", tmp_path / "a.ckpt", module=net)
    with pytest.raises(ConfigError, match=r"dequantize is for the tasks.*\(dequantize\)"):
        merge("runs/own", tmp_path / "a.ckpt", dequantize=True)
    assert [*tmp_path.iterdir()] == []


def test_the_recipe_for_torch_export(folder: Path, tmp_path: Path) -> None:
    """The code of the guide runs as it stands there; that for ONNX is compiled."""
    merge("runs/own", tmp_path / "merged.ckpt")
    codes = [code for _, code in blocks("py", "lora_lightning/verbs/merge/README.md")]
    export = next(code for code in codes if "torch.export" in code)
    export = export.replace(
        "from my_module import MyModule", "from own_modules import Net as MyModule"
    )
    names = {"merged.ckpt": str(tmp_path / "merged.ckpt"), "model.pt2": str(tmp_path / "model.pt2")}
    for name, path in names.items():
        export = export.replace(name, path)
    values: dict[str, Any] = {}
    exec(export, values)
    program = torch.export.load(tmp_path / "model.pt2")
    wanted = answers(trained_module(find_run("runs/own")))
    assert (program.module()(X) - wanted).abs().max() < 1e-6
    onnx = next(code for code in codes if "torch.onnx" in code)
    compile(onnx, "README", "exec")
