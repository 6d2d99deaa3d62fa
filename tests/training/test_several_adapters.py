"""Several adapters on one module under a Trainer: frozen, trained, saved, resumed, added, deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lora_lightning import (
    LoraCallback,
    LoraConfig,
    LoraError,
    active_adapters,
    adapter_state_dict,
    delete_adapter,
    inject_adapter,
    load_adapter,
    save_adapter,
    set_adapter,
)
from lora_lightning.errors import AdapterMismatchError, AdapterStateError
from tests.helpers.adapted_models import add_adapter
from tests.helpers.lightning_modules import BuiltInConfigureModel, Data, Net, make_trainer
from tests.helpers.tensors import bit_equal, trainable


def fit(folder: Path, module: nn.Module, *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    trainer = make_trainer(folder, *callbacks, **{"max_steps": 3, "max_epochs": -1, **options})
    trainer.fit(module, Data())
    return trainer


ONE = {"r": 2, "target_modules": ["embed"]}
TWO = {"r": 3, "target_modules": ["embed", "body.2"], "modules_to_save": ["head"]}


def values(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in adapter_state_dict(model, name).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(bit_equal(t, other[k]) for k, t in one.items())


def test_a_frozen_adapter_beside_one_that_trains(tmp_path: Path) -> None:
    module = Net()
    add_adapter(module, "kept", **ONE)
    before = values(module, "kept")
    base = {k: t.clone() for k, t in module.state_dict().items() if "adapters" not in k}
    kept = LoraCallback(**ONE, adapter_name="kept", trainable=False)
    trainer = fit(tmp_path, module, kept, LoraCallback(**TWO, adapter_name="new"))
    assert same(values(module, "kept"), before)
    assert active_adapters(module) == ["kept", "new"]
    fresh = Net()
    add_adapter(fresh, "kept", **ONE)
    inject_adapter(fresh, LoraConfig(**TWO), "new")
    assert not same(values(module, "new"), values(fresh, "new"))
    assert {n.split(".adapters.")[1].split(".")[0] for n in trainable(module)} == {"new"}
    in_optimizer = [p for g in trainer.optimizers[0].param_groups for p in g["params"]]
    assert {id(p) for p in in_optimizer} == {id(p) for p in trainable(module).values()}
    for name, tensor in base.items():
        assert bit_equal(module.state_dict()[name], tensor), name
    # the frozen one acted
    x = torch.randn(4, 8)
    module.eval()
    both = module(x)
    set_adapter(module, "new")
    assert not torch.allclose(module(x), both)


def test_both_train_and_the_checkpoint_holds_both(tmp_path: Path) -> None:
    module = Net()
    trainer = fit(
        tmp_path, module, LoraCallback(**ONE, adapter_name="a"),
        LoraCallback(**TWO, adapter_name="b"),
    )  # fmt: skip
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    start = Net()
    inject_adapter(start, LoraConfig(**ONE), "a")
    inject_adapter(start, LoraConfig(**TWO), "b")
    for name in "ab":
        assert not same(values(module, name), values(start, name))
    again = Net()
    assert load_adapter(again, tmp_path / "both.ckpt") == ["a", "b"]
    for name in "ab":
        assert same(values(again, name), values(module, name))
    single = Net()
    assert load_adapter(single, tmp_path / "both.ckpt", "b") == ["b"]
    assert same(values(single, "b"), values(module, "b"))


def test_resume_with_two_is_exact(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            LoraCallback(**ONE, adapter_name="a"),
            LoraCallback(**TWO, adapter_name="b", lora_dropout=0.1),
            ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False),
        ]

    def trained(epochs: int, **options: Any) -> Net:
        torch.manual_seed(3 if options else 1)
        module = Net()
        make_trainer(tmp_path, *callbacks(), max_epochs=epochs).fit(module, Data(), **options)
        return module

    whole = trained(4)
    trained(2)
    last = str(tmp_path / "last.ckpt")
    resumed = trained(4, ckpt_path=last)
    for name in "ab":
        assert same(values(resumed, name), values(whole, name))
    with pytest.raises(AdapterMismatchError, match="adapter 'b': only in the checkpoint"):
        make_trainer(tmp_path, callbacks()[0], max_epochs=5).fit(Net(), Data(), ckpt_path=last)


@pytest.mark.parametrize("kind", [Net, BuiltInConfigureModel])
def test_start_from_a_folder_and_from_a_checkpoint(kind: type, tmp_path: Path) -> None:
    source = Net()
    trainer = fit(tmp_path, source, LoraCallback(**TWO, adapter_name="b"))
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    style = add_adapter(Net(), "style", **ONE)
    save_adapter(style, tmp_path / "style", "style")
    module = kind()
    callbacks = [
        LoraCallback(adapter_name="style", init_from=str(tmp_path / "style"), trainable=False),
        LoraCallback(adapter_name="more", init_from=str(tmp_path / "b.ckpt")),
    ]
    make_trainer(tmp_path, *callbacks).validate(module, Data(), verbose=False)
    assert same(values(module, "style"), values(style, "style"))
    assert same(values(module, "more"), values(source, "b"))
    assert callbacks[0].config.r == 2
    fit(tmp_path, module, *callbacks)
    assert same(values(module, "style"), values(style, "style"))
    assert not same(values(module, "more"), values(source, "b"))


def test_adapters_come_and_go_between_runs(tmp_path: Path) -> None:
    module = Net()
    fit(tmp_path, module, LoraCallback(**ONE, adapter_name="a"))
    of_a = values(module, "a")
    with pytest.raises(AdapterStateError, match=r"adapters \['a'\], which no LoraCallback"):
        fit(tmp_path, module, LoraCallback(**TWO, adapter_name="b"))
    both = [
        LoraCallback(**ONE, adapter_name="a", trainable=False),
        LoraCallback(**TWO, adapter_name="b"),
    ]
    fit(tmp_path, module, *both)
    assert same(values(module, "a"), of_a)
    of_b = values(module, "b")
    add_adapter(module, "c", r=1, target_modules=["body.2"])
    with pytest.raises(AdapterStateError, match=r"adapters \['c'\], which no LoraCallback"):
        fit(tmp_path, module, *both)
    delete_adapter(module, "c")
    fit(tmp_path, module, *both)
    assert same(values(module, "a"), of_a)
    assert not same(values(module, "b"), of_b)


def test_an_adapter_added_during_a_run_is_noticed(tmp_path: Path) -> None:
    class Adds(Net):
        def on_train_start(self) -> None:
            add_adapter(self, "late", r=1, target_modules=["body.2"])
            set_adapter(self, ["default", "late"])

    with pytest.raises(LoraError, match="late"):
        fit(tmp_path, Adds(), LoraCallback(**ONE))

    class AddsInactive(Net):
        def on_train_start(self) -> None:
            add_adapter(self, "late", r=1, target_modules=["body.2"])

    module = AddsInactive()
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    fit(tmp_path, module, LoraCallback(**ONE), keep)
    assert active_adapters(module) == ["default"]
    again = Net()
    assert load_adapter(again, tmp_path / "kept" / "last.ckpt") == ["default"]
    assert same(values(again, "default"), values(module, "default"))
