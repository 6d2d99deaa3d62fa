"""`inspect`: its figures against dense formulas, every kind of file, and files that cannot be trusted."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lightning
from lora_lightning import export, inject_adapter, inspect, save_adapter
from lora_lightning.engine.injection import adapters_named
from lora_lightning.engine.update_spectrum import entropy_rank
from lora_lightning.errors import CheckpointError
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import find_run
from lora_lightning.verbs.export.diffusers import write_diffusers
from lora_lightning.verbs.inspect.updates import Update
from tests.helpers.adapter_types import TYPES, net, options
from tests.helpers.command import run_command
from tests.helpers.tensors import randomize, trainable
from tests.helpers.tiny_pipeline import Pipeline, text_encoder

TENSORS = "adapter_model.safetensors"
ON_LINEARS = ("lora", "rslora", "pissa", "olora", "adalora", "loha", "lokr", "lokr_cp", "dora")
MEASURED = [(name, "linear") for name in ON_LINEARS]
MEASURED += [(name, kind) for name in ("lora", "rslora") for kind in ("conv2d", "embed")]


def dense_figures(delta: Tensor) -> tuple[float, float]:
    """(norm, effective rank) by the definition, from the whole matrix."""
    values = torch.linalg.svdvals(delta.detach().double().flatten(1))
    p = values / values.sum()
    entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 1e-14)
    return float(delta.detach().double().norm()), math.exp(entropy)


def only(contents: Any) -> Update:
    ((_, adapter),) = contents.adapters.items()
    (update,) = adapter.updates
    return update


def adapted(name: str, kind: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    model = net(kind, torch.float32)
    inject_adapter(model, getattr(lora_lightning, TYPES[name][0])(**options(name)))
    randomize(trainable(model).values(), 0.3)
    return model


@pytest.mark.parametrize(("name", "kind"), MEASURED)
def test_figures_are_those_of_the_dense_update(name: str, kind: str, tmp_path: Path) -> None:
    model = adapted(name, kind)
    save_adapter(model, tmp_path)
    found = only(inspect(tmp_path).first)
    adapter: Any = adapters_named(model, "default")["proj"]
    if name == "dora":  # its low-rank part, by the formula
        delta = adapter.scaling * adapter.lora_B @ adapter.lora_A
        assert "before DoRA" in found.note
    else:
        delta = adapter.delta_weight()
    norm, rank = dense_figures(delta)
    assert found.module == "proj"
    assert found.norm == pytest.approx(norm, rel=1e-5)
    assert found.effective_rank == pytest.approx(rank, rel=1e-4)
    assert found.effective_rank <= found.rank + 1e-6


@pytest.mark.parametrize("name", ["oft", "ia3", "vera", "shira"])
def test_what_depends_on_the_weight_says_so(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    save_adapter(model, tmp_path)
    update = only_of_module(inspect(tmp_path).first, "proj")
    assert update.note
    if name == "shira":
        adapter: Any = adapters_named(model, "default")["proj"]
        assert update.norm == pytest.approx(float(adapter.delta_weight().detach().norm()), rel=1e-5)
    else:
        assert update.norm is None


def only_of_module(contents: Any, module: str) -> Update:
    (adapter,) = contents.adapters.values()
    (update,) = [update for update in adapter.updates if update.module == module]
    return update


def test_effective_rank_of_what_is_known() -> None:
    assert entropy_rank(torch.ones(7)) == pytest.approx(7)
    assert entropy_rank(torch.tensor([2.0, 0, 0])) == pytest.approx(1)
    assert entropy_rank(torch.zeros(4)) == 0
    # H(3/4, 1/4) in nats
    assert entropy_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(0.5623351))


@pytest.mark.parametrize("name", ["own", "lm"])
def test_a_run(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Path = request.getfixturevalue(f"{name}_run")
    monkeypatch.syspath_prepend(run.parents[1])
    found = inspect(run)
    contents = found.first
    assert contents.kind == "checkpoint"
    assert contents.path == find_run(run).checkpoint
    assert (contents.step, contents.epoch) == (4, 0)
    assert contents.versions["lora_lightning"] == lora_lightning.__version__
    assert contents.metrics.keys() >= {"val_loss"}
    assert contents.base_digest == inspect(run / "checkpoints/last.ckpt").first.base_digest
    module = trained_module(find_run(run))
    (adapter,) = contents.adapters.values()
    truth = adapters_named(module, "default")
    assert {update.module for update in adapter.updates} == {*truth}
    for update in adapter.updates:
        if update.norm is None:
            assert update.note == "trains in full"
            continue
        norm, _ = dense_figures(truth[update.module].delta_weight())  # type: ignore[attr-defined]
        assert update.norm == pytest.approx(norm, rel=1e-5)
    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    assert f"{numbers:,} numbers" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80


def test_against_its_own_exports(lm_run: Path, tmp_path: Path) -> None:
    for form in ("peft", "portable"):
        export(lm_run, tmp_path / form, format=form)
    same = inspect(lm_run, tmp_path / "peft").difference
    assert (same.tensors, same.only_first, same.only_second) == ({}, [], [])
    assert not same.updates
    portable = inspect(tmp_path / "portable", lm_run).difference
    assert portable.tensors  # the scale is in B
    assert not portable.updates  # but nothing else is added to any weight
    assert portable.options["default", "lora_alpha"] == (4, 8.0)
    file = tmp_path / "peft" / TENSORS
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    moved = tensors[key].clone()
    moved[3, 2] += 0.5
    save_file({**tensors, key: moved}, file)
    found = inspect(lm_run, tmp_path / "peft").difference
    name = "model.layers.1.mlp.up_proj"
    assert found.tensors == {f"{name}.lora_B": pytest.approx(0.5)}
    row = tensors[key.replace("lora_B", "lora_A")][2]
    assert found.updates == {
        f"network.{name}": pytest.approx(2 * 0.5 * float(row.norm()), rel=1e-5)
    }
    assert "the largest difference is 0.5" in str(inspect(lm_run, tmp_path / "peft"))


def test_two_runs_of_other_bases(own_run: Path, lm_run: Path) -> None:
    found = inspect(own_run, lm_run).difference
    assert any("not in this model" in line for line in found.base)
    assert found.options["default", "r"] == (2, 4)
    assert "what differs" in str(inspect(own_run, lm_run))
    assert inspect(lm_run, lm_run).difference.same
    assert str(inspect(lm_run, lm_run)).endswith("nothing differs")


def test_other_kinds(lm_run: Path, tmp_path: Path) -> None:
    full = {"state_dict": {"net.weight": torch.ones(3, 2)}, "pytorch-lightning_version": "2.6"}
    torch.save({**full, "global_step": 7, "epoch": 1}, tmp_path / "full.ckpt")
    found = inspect(tmp_path / "full.ckpt").first
    assert (found.kind, found.step, [*found.others]) == ("full checkpoint", 7, ["net.weight"])
    assert any("optimizer state" in line for line in found.missing)
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert inspect(tmp_path / "a.safetensors").first.kind == "safetensors"
    found = inspect(lm_run / "checkpoints/best.ckpt").first
    assert not any("optimizer" in line for line in found.missing)
    content = torch.load(lm_run / "checkpoints/best.ckpt", weights_only=True)
    del content["optimizer_states"], content["lora_lightning"]["content"]
    torch.save(content, tmp_path / "weights.ckpt")
    missing = inspect(tmp_path / "weights.ckpt").first.missing
    assert any(line.startswith("optimizer state: a run can start from it") for line in missing)


def test_diffusers(tmp_path: Path) -> None:
    module = Pipeline(text_encoder())
    inject_adapter(module, lora_lightning.LoraConfig(r=2, lora_alpha=6, target_modules=["fc1"]))
    randomize(trainable(module).values(), 0.3)
    write_diffusers(module, tmp_path, "default")
    found = inspect(tmp_path).first
    assert found.kind == "diffusers file"
    (adapter,) = found.adapters.values()
    truth = adapters_named(module, "default")
    for update in adapter.updates:
        norm, rank = dense_figures(truth[update.module].delta_weight())  # type: ignore[attr-defined]
        assert update.norm == pytest.approx(norm, rel=1e-5)
        assert update.effective_rank == pytest.approx(rank, rel=1e-4)


def test_what_is_wrong_in_a_folder(tmp_path: Path) -> None:
    save_adapter(adapted("lora"), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    key = "base_model.model.proj.lora_B.weight"
    bad = copy.deepcopy(tensors)
    bad[key][0, 0] = math.nan
    save_file(bad, tmp_path / TENSORS)
    found = inspect(tmp_path)
    assert found.first.not_finite == ["proj.lora_B.weight"]
    assert only(found.first).note.startswith("not finite: lora_B")
    assert "NaN" in str(found)
    del tensors[key]
    save_file(tensors, tmp_path / TENSORS)
    found = inspect(tmp_path)
    assert any(line.startswith("proj.lora_B.weight: ") for line in found.first.missing)
    assert only(found.first).note.startswith("not measured")
    save_file({**tensors, key: torch.ones(8, 3)}, tmp_path / TENSORS)
    assert only(inspect(tmp_path).first).note.startswith("not measured")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"alpha_pattern": {"(a+)+$": 3}, "lora_alpha": "\x1b[31m", "r": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    said = " ".join(str(inspect(tmp_path)).split())
    assert "could take for ever" in said
    assert "\x1b" not in said


def test_nothing_is_run_or_read_elsewhere(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil2.ckpt")
    for name in ("evil.ckpt", "evil2.ckpt"):
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            inspect(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    mix = tmp_path / "mix"
    mix.mkdir()
    content = {"peft_type": "LORA_LIGHTNING_MIX", "adapters": ["../other"]}
    (mix / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not folders beside it"):
        inspect(mix)


def test_several_adapters_in_a_folder(tmp_path: Path) -> None:
    model = adapted("lora")
    inject_adapter(model, lora_lightning.LoraConfig(r=2, target_modules=["proj"]), "second")
    save_adapter(model, tmp_path, ["default", "second"])
    found = inspect(tmp_path)
    assert [*found.first.adapters] == ["default", "second"]
    assert "unmoved" in str(found)  # the second one's B is zero


def test_mistakes(lm_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file or folder .*Did you mean .*best.ckpt"):
        inspect(lm_run / "checkpoints/bst.ckpt")
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        inspect(tmp_path)
    broken = Path(shutil.copy(lm_run / "checkpoints/best.ckpt", tmp_path / "a.ckpt"))
    broken.write_bytes(broken.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        inspect(broken)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint of Lightning"):
        inspect(tmp_path / "list.ckpt")


def test_the_command(
    lm_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    home = lm_run.parents[1]
    said = run_command(home, monkeypatch, capfd, "inspect", "runs/lm")
    assert "adapter 'default': LORA" in said
    said = run_command(
        home, monkeypatch, capfd, "inspect", "runs/lm", "runs/lm/checkpoints/last.ckpt"
    )
    assert "what differs" in said or "nothing differs" in said
    said = run_command(home, monkeypatch, capfd, "inspect", "runs/lmm", fails=1)
    assert "Did you mean 'runs/lm'?" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "lm"])
def test_in_a_process_of_its_own(name: str, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(f"{name}_run")
    command = [str(Path(sys.executable).parent / "lora-lightning"), "inspect"]

    def said(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, *words], cwd=run.parents[1], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    code, text = said(f"runs/{name}", f"runs/{name}/checkpoints/last.ckpt")
    assert (code, "effective rank" in text) == (0, True), text
    code, text = said("runs/nothing")
    assert (code, "There is no file" in text, "Traceback" in text) == (1, True, False), text


def test_a_text_that_is_called_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"as a checkpoint: it is no file of torch.save"):
        lora_lightning.inspect(tmp_path / "text.ckpt")
