"""The table of strategies and precisions in lora_lightning/training/README.md, cell by cell.

Every process is given the same batches, so that the mean of their gradients is the gradient of one:
each strategy has to arrive where one device arrives without interruption, to the last bit.

T: trains, to the same adapters and moments as one device does
A: its checkpoints hold the adapters (and the head) only
R: stopped after an epoch and resumed, it ends where the run without interruption ends
X: so do one device from its checkpoint, and this strategy from that of one device
gpu: needs a CUDA device; the test is marked so
-: refused before training, with the reason
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, LoraError
from lora_lightning.checkpoint.sharded_folder import read_checkpoint_folder
from tests.helpers.fsdp1_on_cpu import FORMS, on_cpu
from tests.helpers.fsdp2_modules import Quiet, ShardedLater, strategy
from tests.helpers.lightning_modules import Data, make_trainer
from tests.helpers.markdown import PAGES
from tests.helpers.processes import on_processes
from tests.helpers.sharded_runs import state_of
from tests.helpers.tensors import assert_same_state, same_state

PAGE = PAGES["lora_lightning/training/README.md"]
EPOCHS = 3


def in_four_bits(module: nn.Module) -> None:
    """Put layers of bitsandbytes in the place of Linears, with the same weights."""
    from bitsandbytes.nn import Linear4bit

    for name, old in list(module.named_modules()):
        if isinstance(old, nn.Linear) and name != "head":
            new = Linear4bit(old.in_features, old.out_features, quant_type="nf4")
            new.load_state_dict(old.state_dict())
            module.set_submodule(name, new.to("cpu"))


def four_bit(kind: type) -> type:
    def __init__(self: Any) -> None:
        kind.__init__(self)
        in_four_bits(self)

    return type(f"FourBit{kind.__name__}", (kind,), {"__init__": __init__})


# Row of the table: the LightningModule, the strategy, how many processes.
STRATEGIES: dict[str, tuple[type, Callable[[], Any], int]] = {
    "one device": (Quiet, lambda: "auto", 1),
    "`ddp`": (Quiet, lambda: "ddp", 2),
    "`ModelParallelStrategy`, folder": (ShardedLater, lambda: strategy(folder=True), 2),
    "`ModelParallelStrategy`, one file": (ShardedLater, lambda: strategy(folder=False), 2),
    "`fsdp`, folder": (Quiet, lambda: on_cpu(**FORMS["folder"]), 2),
    "`fsdp`, one file": (Quiet, lambda: on_cpu(**FORMS["file"]), 2),
}


def table() -> dict[tuple[str, str], str]:
    """The cells by (strategy, precision)."""
    lines = PAGE[PAGE.index("| strategy |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        (row[0], precision.strip("`")): cell
        for row in rows
        for precision, cell in zip(header[1:], row[1:], strict=True)
    }


TABLE = table()


def fit(
    row: str, precision: str, folder: Path, epochs: int, ckpt_path: Any = None, **options: Any
) -> dict[str, Any]:
    """Adapters and moments, whole, after training."""
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    kind, make_strategy, devices = STRATEGIES[row]
    quantised = precision == "NF4 base"
    module = four_bit(kind)() if quantised else kind()
    callback = LoraCallback(r=2, target_modules=["embed", "body.2"], modules_to_save=["head"])
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    settings = {"max_epochs": epochs, "strategy": make_strategy(), "devices": devices}
    settings["precision"] = "32-true" if quantised else precision
    settings["use_distributed_sampler"] = False
    trainer = make_trainer(folder, callback, saver, **{**settings, **options})
    trainer.fit(module, DataLoader(Data().dataset, 16), ckpt_path=ckpt_path)
    return state_of(trainer)


def cells(row: str, *options: str) -> list[str]:
    return [
        precision for (name, precision), cell in TABLE.items() if name == row and cell in options
    ]


def all_cells(row: str, folder: Path) -> dict[str, Any]:
    """On every process: each precision of a row in turn; the text of an error where it failed."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for precision in cells(row, "T A R X", "-"):
        here = folder / row / precision
        alone = folder / "one device" / precision / "epoch=0.ckpt"
        try:
            found[precision] = {
                "straight": fit(row, precision, here, EPOCHS),
                "resumed": fit(row, precision, here / "again", EPOCHS, here / "epoch=0.ckpt"),
                "from one device": fit(row, precision, here / "other", EPOCHS, alone),
            }
        except (LoraError, ValueError) as error:  # the latter of Lightning's own refusals
            found[precision] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("strategies")
    return place


_known: dict[str, Any] = {}


def results(row: str, folder: Path) -> list[dict[str, Any]]:
    """What every process of a row found; one device, which all are compared with, comes first."""
    if row not in _known:
        if row != "one device":
            results("one device", folder)
        try:
            _known[row] = on_processes(STRATEGIES[row][2], all_cells, row, folder)
        except AssertionError as error:
            _known[row] = error
    if isinstance(_known[row], AssertionError):
        raise _known[row]
    return list(_known[row])


def of_letter(letter: str) -> list[Any]:
    return [
        pytest.param(*cell, id=f"{cell[0]}-{cell[1]}") for cell in TABLE if TABLE[cell] == letter
    ]


def test_every_row_and_letter_of_the_table_is_known() -> None:
    assert {row for row, _ in TABLE} == set(STRATEGIES)
    assert set(TABLE.values()) <= {"T A R X", "gpu", "-"}
    assert len(of_letter("T A R X")) > len(TABLE) / 2


@pytest.mark.slow
@pytest.mark.xdist_group("strategies")
@pytest.mark.parametrize(("row", "precision"), of_letter("T A R X"))
def test_a_cell(row: str, precision: str, folder: Path) -> None:
    oracle = results("one device", folder)[0][precision]["straight"]
    for rank in results(row, folder):
        found = rank[precision]
        assert not isinstance(found, str), found
        assert same_state(found["straight"], oracle), "T"
        assert same_state(found["resumed"], oracle), "R"
        assert same_state(found["from one device"], oracle), "X, from one device"

    path = folder / row / precision / "epoch=0.ckpt"
    saved = read_checkpoint_folder(path) if path.is_dir() else torch.load(path, weights_only=True)
    own = {key for key in oracle if "/" not in key}
    assert len(own) == 6
    assert saved["state_dict"].keys() == own, "A"
    (optimizer,) = saved["optimizer_states"]
    assert optimizer["state"].keys() == own, "A"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that random numbers of other processes are not continued
        continued = fit("one device", precision, folder / row / f"{precision} alone", EPOCHS, path)
    assert same_state(continued, oracle), "X, to one device"


@pytest.mark.slow
@pytest.mark.xdist_group("strategies")
def test_negative_control_that_sees_other_batches_differs(folder: Path, tmp_path: Path) -> None:
    oracle = results("one device", folder)[0]["32-true"]["straight"]
    shorter = fit("one device", "32-true", tmp_path, EPOCHS, limit_train_batches=3)
    assert shorter.keys() == oracle.keys()
    assert not same_state(shorter, oracle)


@pytest.mark.slow
@pytest.mark.xdist_group("strategies")
@pytest.mark.parametrize(("row", "precision"), of_letter("-"))
def test_a_cell_that_is_refused(row: str, precision: str, folder: Path) -> None:
    for rank in results(row, folder):
        reason = "quantised. Use strategy='ddp'" if precision == "NF4 base" else "precision"
        assert isinstance(rank[precision], str)
        assert reason in rank[precision]


@pytest.mark.gpu
@pytest.mark.parametrize(("row", "precision"), of_letter("gpu"))
def test_a_cell_that_needs_a_gpu(row: str, precision: str, tmp_path: Path) -> None:
    def on_gpu(folder: Path, ckpt_path: Any = None) -> dict[str, Any]:
        gpu: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
        if "fsdp" in row:  # without the shim
            gpu["strategy"] = FSDPStrategy(**FORMS[row.rpartition(" ")[2]])
        return fit(row, precision, folder, EPOCHS, ckpt_path, **gpu)

    straight = on_gpu(tmp_path)
    assert_same_state(on_gpu(tmp_path / "2", tmp_path / "epoch=0.ckpt"), straight)
