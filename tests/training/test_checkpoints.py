"""What is in a checkpoint beside adapters, and loading one without a Trainer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import (
    LoraCallback,
    LoraConfig,
    active_adapters,
    inject_adapter,
    load_from_checkpoint,
)
from lora_lightning.errors import AdapterMismatchError, CheckpointError
from lora_lightning.training.checkpoint_io.readable import check_hyperparameters
from tests.helpers.lightning_modules import (
    KEYS,
    OPTIONS,
    BuiltInConfigureModel,
    BuiltInSetup,
    Data,
    Net,
    WithHparams,
    make_trainer,
    saved,
    trained,
)


@pytest.mark.parametrize("how", ["ModelCheckpoint", "save_checkpoint"])
def test_save_weights_only(tmp_path: Path, how: str) -> None:
    """Callback.on_save_checkpoint is not called then: the base would be in the file."""
    saver = ModelCheckpoint(tmp_path, filename="w", save_weights_only=True)
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS), saver)
    module = Net()
    trainer.fit(module, Data())
    if how == "save_checkpoint":
        trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    content = saved(tmp_path / "w.ckpt")
    assert sorted(content["state_dict"]) == sorted(KEYS)
    assert "optimizer_states" not in content
    fresh = Net()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).validate(
        fresh, Data(), ckpt_path=tmp_path / "w.ckpt", verbose=False
    )
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in module.state_dict().items())


def test_weights_only_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    """Lightning loads the weights and only then finds the optimizer's state missing."""
    trainer, _ = trained(tmp_path)
    trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    module = Net()
    with pytest.raises(CheckpointError, match=r"weights only .*init_from=.*\(lora\.init_from\)"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(
            module, Data(), ckpt_path=tmp_path / "w.ckpt"
        )
    assert not module.embed.adapters["default"].lora_B.any()
    make_trainer(tmp_path, LoraCallback(init_from=str(tmp_path / "w.ckpt"))).fit(Net(), Data())


def test_the_users_state_dict_stays_whole(tmp_path: Path) -> None:
    """Only checkpoints are reduced; `module.state_dict()` is the model."""
    trainer, module = trained(tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert set(module.state_dict()) == set(Net().state_dict()) | set(KEYS)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_bound_module_train_and_save_adapters(tmp_path: Path, make: Any) -> None:
    """Overrides that are closures could not be pickled, or would act on the original."""
    _, module = trained(tmp_path)
    module.trainer = None  # a Trainer cannot be pickled
    before = copy.deepcopy(module.state_dict())
    again = make(module)
    trainer, again = trained(tmp_path, again)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(saved(tmp_path / "a.ckpt")["state_dict"]) == sorted(KEYS)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
    assert not torch.equal(
        again.embed.adapters["default"].lora_B, module.embed.adapters["default"].lora_B
    )


def test_checkpoints_are_plain(tmp_path: Path) -> None:
    """torch loads with weights_only=True: one Enum or dataclass and nothing resumes."""
    module = WithHparams(scale=2.0)
    trainer, _ = trained(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert saved(tmp_path / "a.ckpt")["hyper_parameters"] == {"width": 16, "scale": 2.0}


def test_classes_in_hparams(tmp_path: Path) -> None:
    """torch does not load them; said when the run begins, not when it is to be resumed."""
    with pytest.warns(UserWarning, match=r"weights_only=True: act\. .*ignore=\['act'\]"):
        trainer, _ = trained(tmp_path, WithHparams(act=nn.ReLU))
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    def resume(**options: Any) -> None:
        make_trainer(tmp_path, LoraCallback(**OPTIONS), max_epochs=2).fit(
            WithHparams(act=nn.ReLU), Data(), ckpt_path=tmp_path / "a.ckpt", **options
        )

    with pytest.raises(Exception, match=r"torch\.nn\.modules\.activation\.ReLU"):
        resume()
    with pytest.warns(UserWarning, match="weights_only=True: act"):
        resume(weights_only=False)
    with pytest.warns(UserWarning, match="weights_only=True: act"):  # options of ours are no better
        trained(tmp_path, WithHparams(act=LoraConfig(r=2)))


def test_a_module_in_hparams_is_told_without_writing_it() -> None:
    written = []

    class Large(nn.Module):
        def __reduce_ex__(self, protocol: Any) -> Any:
            written.append(self)
            raise TypeError

    owner = SimpleNamespace(hparams={"net": Large(), "width": 3})
    with pytest.warns(UserWarning, match=r"weights_only=True: net\. .*ignore=\['net'\]"):
        check_hyperparameters(owner)
    assert not written


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")
@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}], ids=["plain", "bias"])
def test_load_from_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    """LightningModule.load_from_checkpoint finds no base in the file; ours makes the module's own."""
    module = WithHparams(scale=2.0)
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS, **options))
    trainer.fit(module, Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    x = torch.randn(4, 8)
    with torch.no_grad():
        fresh = load_from_checkpoint(WithHparams, tmp_path / "a.ckpt").eval()
        assert torch.equal(fresh(x), module.eval()(x))
        other = load_from_checkpoint(WithHparams, tmp_path / "a.ckpt", scale=1.0).eval()
        assert torch.equal(2 * other(x), module(x))
    with pytest.raises(RuntimeError, match="Missing key"):  # loud, as it should be
        WithHparams.load_from_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"not in the model .* in the checkpoint: .*lora_A"):
        WithHparams.load_from_checkpoint(tmp_path / "a.ckpt", strict=False)


def test_load_from_checkpoint_of_several_adapters(tmp_path: Path) -> None:
    module, pair = Net(), [LoraCallback(r=2, adapter_name=name) for name in ("a", "b")]
    trainer = make_trainer(tmp_path, *pair)
    trainer.fit(module, Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = load_from_checkpoint(Net, tmp_path / "a.ckpt").eval()
    assert active_adapters(fresh) == ["a", "b"]
    x = torch.randn(4, 8)
    assert torch.equal(fresh(x), module.eval()(x))


def test_load_from_checkpoint_checks_the_base(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, BuiltInConfigureModel())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    load_from_checkpoint(BuiltInConfigureModel, tmp_path / "a.ckpt")

    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.embed.weight)

    with pytest.raises(AdapterMismatchError, match="another base model"):
        load_from_checkpoint(Other, tmp_path / "a.ckpt")
    with pytest.raises(AdapterMismatchError, match="this BuiltInSetup does not have"):
        load_from_checkpoint(BuiltInSetup, tmp_path / "a.ckpt")
    trainer = make_trainer(tmp_path)
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    with pytest.raises(CheckpointError, match="is no adapter checkpoint"):
        load_from_checkpoint(Net, tmp_path / "full.ckpt")


def test_adapters_are_no_hooks(tmp_path: Path) -> None:
    """DeepSpeed takes all hooks off before it evaluates: adapters may not depend on any."""
    _, module = trained(tmp_path)
    for child in module.modules():
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_state_dict_hooks",
            "_backward_hooks",
        ):
            assert not getattr(child, kind)
        for kind in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
            assert not getattr(child, kind)


def test_start_values_where_initialization_is_left_out(tmp_path: Path) -> None:
    """`init_module(empty_init=True)` makes nn.init do nothing: A would be whatever lay in memory."""
    inside, outside = Net(), Net()
    with make_trainer(tmp_path).init_module(empty_init=True):
        inject_adapter(inside, LoraConfig(**OPTIONS), seed=1)
    inject_adapter(outside, LoraConfig(**OPTIONS), seed=1)
    assert all(torch.equal(v, inside.state_dict()[k]) for k, v in outside.state_dict().items())
