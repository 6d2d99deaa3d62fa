"""Here -> peft -> here and peft -> here -> peft: every tensor bit for bit, for every type of both."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lightning
from lora_lightning import adapter_state_dict, inject_adapter, load_adapter, save_adapter
from lora_lightning.adapters.registry import config_types
from tests.helpers.adapter_types import TYPES, cells, example, net, options
from tests.helpers.strict_readers import read
from tests.helpers.tensors import assert_bit_equal, randomize, trainable

TENSORS = "adapter_model.safetensors"
PEFT_CLASSES = {
    "LohaConfig": "LoHaConfig",
    "LokrConfig": "LoKrConfig",
    "OftConfig": "OFTConfig",
    "Ia3Config": "IA3Config",
}
KINDS = ("linear", "conv1D", "embed", "conv1d", "conv2d")
# Where peft has the type: p, f and g in the table.
CELLS = [
    cell
    for letter in "pfg"
    for cell in cells(letter)
    if str(cell.id).endswith(tuple(f"-{k}" for k in KINDS))
]
# What changes peft's base when it is made: its folder needs peft's own conversion.
FROM_THE_BASE = ("pissa", "olora")


def ours(base: nn.Module, name: str) -> nn.Module:
    model = copy.deepcopy(base)
    inject_adapter(model, getattr(lora_lightning, TYPES[name][0])(**options(name)))
    randomize(trainable(model).values(), 0.3)
    return model


def peft_saves(model: peft.PeftModel, folder: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)
    return read(folder / TENSORS)


def peft_loads(base: nn.Module, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def saved_here(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    save_adapter(model, folder)
    return read(folder / TENSORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_here_peft_here(name: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = net(kind, dtype)
    model = ours(base, name)
    first = saved_here(model, tmp_path / "first")
    second = peft_saves(peft_loads(base, tmp_path / "first"), tmp_path / "second")
    assert_bit_equal(second, first)
    back = copy.deepcopy(base)
    load_adapter(back, tmp_path / "second")
    assert_bit_equal(saved_here(back, tmp_path / "third"), first)
    if name not in FROM_THE_BASE:  # whose folder is plain LoRA of twice the rank
        assert_bit_equal(adapter_state_dict(back), adapter_state_dict(model))


@pytest.mark.parametrize(
    ("name", "kind"), [cell for cell in CELLS if cell.values[0] not in FROM_THE_BASE]
)
def test_peft_here_peft(name: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = net(kind, torch.float32)
    kind_of_peft = PEFT_CLASSES.get(TYPES[name][0], TYPES[name][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(base), getattr(peft, kind_of_peft)(**options(name))
        )
    moving = [p for n, p in theirs.named_parameters() if p.requires_grad and "ranknum" not in n]
    randomize(moving, 0.3)
    first = peft_saves(theirs, tmp_path / "first")
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "first")
    second = saved_here(model, tmp_path / "second")
    assert_bit_equal(second, first)
    back = peft_loads(base, tmp_path / "second")
    assert_bit_equal(peft_saves(back, tmp_path / "third"), first)
    x = example(kind, torch.float32)
    torch.testing.assert_close(back(x), theirs.eval()(x), rtol=0, atol=0)


def test_every_type_is_in_here() -> None:
    covered = {getattr(lora_lightning, kind).peft_type for kind, _ in TYPES.values()}
    known = {kind.value for kind in peft.PeftType}
    assert covered >= {*config_types()} & known
