"""`base_state_dict` where the module has memory at once: under one device, DDP and FSDP1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import LoraCallback
from lora_lightning.errors import AdapterMismatchError
from tests.helpers.lightning_modules import BuiltInConfigureModel, Data, Net, make_trainer

OPTIONS: dict[str, Any] = {
    "r": 2,
    "init_lora_weights": "pissa",  # starts from the base
    "target_modules": ["embed"],
    "modules_to_save": ["head"],
}


class Unset:
    """What `init_module(empty_init=True)` leaves: memory that nobody has written to."""

    def base_state_dict(self) -> dict[str, Tensor]:
        return Net().state_dict()


class InInit(Unset, Net):
    def __init__(self) -> None:
        super().__init__()
        wipe(self)


class InConfigureModel(Unset, BuiltInConfigureModel):
    def configure_model(self) -> None:
        built = hasattr(self, "embed")
        super().configure_model()
        if not built:
            wipe(self)


def wipe(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(3.0)


def trained(folder: Path, module: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    make_trainer(folder, LoraCallback(**OPTIONS), max_epochs=1).fit(module, Data())
    return dict(module.state_dict())


@pytest.mark.parametrize("kind", [InInit, InConfigureModel])
def test_it_is_loaded_before_adapters_grow(tmp_path: Path, kind: Any) -> None:
    found, wanted = trained(tmp_path, kind()), trained(tmp_path, Net())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_negative_control_without_it_the_run_has_another_base(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.delattr(Unset, "base_state_dict")
    found, wanted = trained(tmp_path, InInit()), trained(tmp_path, Net())
    assert not torch.equal(found["body.2.weight"], wanted["body.2.weight"])


def test_a_second_trainer_does_not_load_it_again(tmp_path: Path, monkeypatch: Any) -> None:
    module = InInit()
    before = trained(tmp_path, module)
    monkeypatch.setattr(Unset, "base_state_dict", lambda self: pytest.fail("loaded again"))
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).validate(module, Data(), verbose=False)
    assert all(torch.equal(module.state_dict()[key], before[key]) for key in before)


def test_another_base_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    state = {k: v for k, v in Net(width=8).state_dict().items() if k != "norm.bias"}
    monkeypatch.setattr(Unset, "base_state_dict", lambda self: state)
    with pytest.raises(AdapterMismatchError, match=r"missing: norm\.bias\n  other shape: embed"):
        trained(tmp_path, InInit())
