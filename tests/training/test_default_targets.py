"""Default targets in a run: what the start table says, and that the next run selects the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lora_lightning import LoraCallback, LoraConfig, inject_adapter, load_adapter
from lora_lightning.training.summary import base_bytes, total_bytes
from tests.helpers.lightning_modules import Data, make_trainer
from tests.helpers.tensors import adapter_tensors


class Distillation(LightningModule):
    """A small student learns what a frozen teacher says."""

    def __init__(self, freeze_in_setup: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
            self.teacher = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
            self.gate = nn.Linear(3, 1)
        self.freeze_in_setup = freeze_in_setup
        if not freeze_in_setup:
            self.teacher.requires_grad_(False)

    def setup(self, stage: str) -> None:
        if self.freeze_in_setup:
            self.teacher.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.student(batch[0])
        return (y - self.teacher(batch[0])).square().mean() + self.gate(y).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)


def rows_of(out: str) -> list[list[str]]:
    lines = [line for line in out.splitlines() if "│" in line]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_the_start_table_names_what_is_left_out(tmp_path: Path, capsys: Any) -> None:
    module = Distillation()
    x = torch.randn(4, 8)
    before = module.teacher(x)
    make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    out = capsys.readouterr().out
    assert ["teacher (frozen before)", "0 of 2", "-", "0"] in rows_of(out)
    assert "not trained: teacher; to adapt it, name its layers" in out
    assert "target_modules: [teacher.0, teacher.2] (lora.target_modules)" in out
    assert "too small for the rank, which is lower there: gate (r=1) (lora.rank_pattern)" in out
    assert ["gate", "1 of 1", "1", "4"] in rows_of(out)
    assert torch.equal(module.teacher(x), before)


def test_convolutions_that_are_left_out_are_counted(tmp_path: Path, capsys: Any) -> None:
    class Images(Distillation):
        def __init__(self) -> None:
            super().__init__()
            del self.student, self.teacher, self.gate
            self.body = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3))
            self.head = nn.Linear(16, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = self.head(self.body(batch[0][:, None]).flatten(1))
            return nn.functional.cross_entropy(y, batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    make_trainer(tmp_path, LoraCallback(r=2)).fit(Images(), Data())
    text = "left out by 'all-linear': 2 Conv1d; target_modules: all-layers takes them, too"
    assert text in capsys.readouterr().out
    callback = LoraCallback(r=2, target_modules="all-layers")
    make_trainer(tmp_path, callback).fit(Images(), Data())
    out = capsys.readouterr().out
    assert "left out" not in out
    assert [row[0] for row in rows_of(out)] == ["body.0", "body.2", "head"]


@pytest.mark.parametrize("freeze_in_setup", [False, True])
def test_the_next_run_selects_the_same(tmp_path: Path, freeze_in_setup: bool) -> None:
    def run(module: Distillation, *callbacks: Any, **options: Any) -> list[str]:
        callback = LoraCallback(r=2)
        trainer = make_trainer(tmp_path, callback, *callbacks, **options)
        trainer.fit(module, Data(), ckpt_path=options.pop("ckpt", None))
        return list(callback._selection.targets)

    module = Distillation(freeze_in_setup)
    wanted = ["student.0", "student.2", "gate"]
    assert run(module, ModelCheckpoint(tmp_path, save_last=True)) == wanted
    assert run(module) == wanted  # all are frozen now, the teacher by its owner
    callback = LoraCallback(r=2)
    fresh = Distillation(freeze_in_setup)
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(fresh, Data(), ckpt_path=tmp_path / "last.ckpt")
    assert list(callback._selection.targets) == wanted


@pytest.mark.parametrize("freeze_in_setup", [False, True])
def test_a_checkpoint_is_read_onto_the_layers_that_it_was_trained_on(
    tmp_path: Path, freeze_in_setup: bool
) -> None:
    """Also where the teacher is not frozen yet: the tensors say what was adapted."""
    module = Distillation(freeze_in_setup)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, LoraCallback(r=2), saver).fit(module, Data())
    fresh = Distillation(freeze_in_setup)
    load_adapter(fresh, tmp_path / "last.ckpt")
    expected, found = adapter_tensors(module), adapter_tensors(fresh)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    again = Distillation(freeze_in_setup)  # and from there, with the rank that the gate has
    callback = LoraCallback(init_from=str(tmp_path / "last.ckpt"))
    again_saver = ModelCheckpoint(tmp_path / "again", save_last=True)
    make_trainer(tmp_path, callback, again_saver).fit(again, Data())
    last = Distillation(freeze_in_setup)
    load_adapter(last, tmp_path / "again" / "last.ckpt")
    assert adapter_tensors(last).keys() == expected.keys()
    assert last.gate.adapters["default"].r == 1


def test_a_part_of_the_module_takes_its_part_of_a_checkpoint(tmp_path: Path) -> None:
    module = Distillation()
    module.student[2] = nn.Linear(16, 1)  # so small that its rank is lower
    saver = ModelCheckpoint(tmp_path, save_last=True)
    module.gate = nn.Identity()
    make_trainer(tmp_path, LoraCallback(r=2), saver).fit(module, Data())
    inside = Distillation().student
    inside[2] = nn.Linear(16, 1)
    inside.load_state_dict(
        {k: v for k, v in module.student.state_dict().items() if "adapters" not in k}
    )
    load_adapter(inside, tmp_path / "last.ckpt")
    x = torch.randn(3, 8)
    assert torch.equal(inside(x), module.student(x))
    assert inside[0].adapters["default"].config.rank_pattern == {r"^2": 1}


def test_the_callback_alone_speaks_of_its_first_step(tmp_path: Path) -> None:
    class Idle(Distillation):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.student(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, LoraCallback(r=2)).fit(Idle(), Data())
    said = [str(w.message) for w in caught if "first" in str(w.message)]
    assert len(said) == 1
    assert "2 of 6 trainable tensors had no gradient in the first step" in said[0]


def test_tied_tensors_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(100, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 100, bias=False)
            self.head.weight = self.table.weight

    model = Tied()
    inject_adapter(model, LoraConfig(r=2, target_modules=["body"]))
    assert base_bytes(model) == 4 * (100 * 8 + 8 * 8 + 8)
    table = torch.zeros(10, 4)
    assert total_bytes([table, table.detach(), table.clone(), table[:5]]) == 4 * (40 + 40 + 20)
    assert total_bytes([torch.zeros(3, device="meta"), torch.zeros(3, device="meta")]) == 24


@pytest.mark.parametrize("saved", [["head"], ["embed"], ["embed", "head"]], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_trained_apart_from_its_table(
    saved: list[str], tied: bool, tmp_path: Path, capsys: Any
) -> None:
    class LanguageModel(Distillation):
        def __init__(self) -> None:
            super().__init__()
            del self.student, self.teacher, self.gate
            self.embed, self.body = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 9, bias=False)
            if tied:
                self.head.weight = self.embed.weight

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.body(self.embed(batch[0].abs().long().clamp(max=8)))
            return self.head(h).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    options = {"target_modules": ["body"], "modules_to_save": saved}
    make_trainer(tmp_path, LoraCallback(r=2, **options), max_steps=1).fit(LanguageModel(), Data())
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("shared a weight with") == tied
    if tied:
        one, other = ("embed", "head") if saved == ["embed"] else ("head", "embed")
        assert f"{one} shared a weight with {other}, and trains by itself now" in out
