"""LoraCallback through the Trainer: every entry point, every place where a model is built."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import (
    AdaLoraConfig,
    LoraCallback,
    LoraConfig,
    active_adapters,
    adapter_names,
    adapter_state_dict,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_and_unload,
    set_adapter,
    unload,
)
from lora_lightning.errors import (
    AdapterMismatchError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
    TargetError,
)
from tests.helpers.lightning_modules import (
    OPTIONS,
    BuiltInConfigureModel,
    BuiltInSetup,
    Data,
    Net,
    NetWithoutOptimizer,
    make_trainer,
)
from tests.helpers.tensors import adapter_tensors

# -- where and when ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Net, BuiltInSetup, BuiltInConfigureModel, NetWithoutOptimizer])
def test_trains_wherever_the_model_is_built(tmp_path: Path, kind: type) -> None:
    module = kind()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    assert all(v.abs().sum() > 0 for v in adapter_tensors(module).values())
    assert len(adapter_tensors(module)) == 6


@pytest.mark.parametrize("kind", [Net, BuiltInSetup, BuiltInConfigureModel])
def test_every_entry_point_once_and_again(tmp_path: Path, kind: type) -> None:
    module, data = kind(), Data()
    trainer = make_trainer(
        tmp_path, LoraCallback(**OPTIONS), ModelCheckpoint(tmp_path, filename="best")
    )
    trainer.validate(module, data, verbose=False)  # before fit: adapters are there, as a no-op
    at_start = adapter_tensors(module)
    trainer.fit(module, data)
    trained = adapter_tensors(module)
    assert at_start.keys() == trained.keys()
    assert not torch.equal(
        at_start["embed.adapters.default.lora_B"], trained["embed.adapters.default.lora_B"]
    )
    own = trainer.validate(module, data, verbose=False)
    assert trainer.test(module, data, verbose=False)[0]["test_loss"] == own[0]["val_loss"]
    trainer.predict(module, data)
    trainer.fit(module, data)  # max_epochs reached: nothing more, and nothing is injected twice
    assert all(torch.equal(trained[k], v) for k, v in adapter_tensors(module).items())
    assert (
        trainer.test(module, data, ckpt_path="best", verbose=False)[0]["test_loss"]
        == own[0]["val_loss"]
    )
    fresh = kind()
    again = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    losses = again.validate(fresh, data, ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)
    assert losses == own
    predictions = again.predict(fresh, data, ckpt_path=str(tmp_path / "best.ckpt"))
    assert predictions is not None
    fresh.eval()
    assert torch.equal(torch.cat(predictions), fresh(data.dataset.tensors[0]))  # type: ignore[arg-type]


def test_same_module_with_a_second_trainer(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    first = adapter_tensors(module)
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    second = adapter_tensors(module)
    assert first.keys() == second.keys()
    assert not torch.equal(
        first["embed.adapters.default.lora_B"], second["embed.adapters.default.lora_B"]
    )


def test_disabled_callback_is_not_there(tmp_path: Path, capsys: Any) -> None:
    module = Net()
    before = copy.deepcopy(module.state_dict())
    trainer = make_trainer(tmp_path, LoraCallback(enabled=False))
    trainer.fit(module, Data())
    assert not adapter_tensors(module)
    assert not torch.equal(before["embed.weight"], module.embed.weight)  # full fine-tuning
    count = f"{sum(p.numel() for p in module.parameters()):,}"
    said = f"no adapters (lora.enabled): trainable {count} of {count} parameters (100.00%)"
    assert said in capsys.readouterr().out
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "lora_lightning" not in torch.load(tmp_path / "a.ckpt")


def test_without_the_callback_the_module_is_as_it_was(tmp_path: Path) -> None:
    """The overrides stay on the module; under a Trainer without the callback they do nothing."""
    module = Net()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    other = make_trainer(tmp_path)
    other.validate(module, Data(), verbose=False)
    other.save_checkpoint(tmp_path / "all.ckpt", weights_only=True)
    assert set(torch.load(tmp_path / "all.ckpt")["state_dict"]) == set(module.state_dict())


def test_submodule_only(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2, module="body")).fit(module, Data())
    assert {name.partition(".adapters.")[0] for name in adapter_tensors(module)} == {"body.2"}
    assert not module.head.weight.requires_grad


def test_a_trained_bias_is_saved_also_while_its_adapter_is_switched_off(tmp_path: Path) -> None:
    module, options = Net(), {"r": 2, "target_modules": ["embed"], "bias": "lora_only"}
    trainer = make_trainer(tmp_path, LoraCallback(**options))
    trainer.fit(module, Data())
    trained = module.embed.bias.detach().clone()
    set_adapter(module, [])
    assert not torch.equal(module.embed.bias, trained)
    trainer.save_checkpoint(tmp_path / "off.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "off.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["embed.bias"], trained)


def test_adapted_module_can_be_copied_and_pickled(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    module.eval()
    x = torch.randn(4, 8)
    module.trainer = None  # a Trainer cannot be pickled, with or without LoRA
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_modules_of_pytorch_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Theirs(other.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 3)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(Data().dataset, 16)
    module = Theirs()
    trainer = other.Trainer(
        max_epochs=1, default_root_dir=tmp_path, callbacks=[LoraCallback(r=2)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, loader)
    assert set(adapter_tensors(module)) == {
        "net.adapters.default.lora_A",
        "net.adapters.default.lora_B",
    }
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt")["state_dict"]) == set(adapter_tensors(module))


def test_two_callbacks_train_together(tmp_path: Path) -> None:
    module = Net()
    pair = [
        LoraCallback(r=2, target_modules=["embed"], adapter_name="a"),
        LoraCallback(r=3, target_modules=["embed", "body.2"], adapter_name="b"),
    ]
    trainer = make_trainer(tmp_path, *pair)
    trainer.fit(module, Data())
    assert adapter_names(module) == active_adapters(module) == ["a", "b"]
    assert all(v.abs().sum() > 0 for v in adapter_tensors(module).values())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(adapter_tensors(module))
    fresh = Net()
    make_trainer(tmp_path, *pair).validate(
        fresh, Data(), ckpt_path=tmp_path / "two.ckpt", verbose=False
    )
    assert all(
        torch.equal(v, adapter_tensors(fresh)[k]) for k, v in adapter_tensors(module).items()
    )
    with pytest.raises(AdapterMismatchError, match="adapter 'b': only in the checkpoint"):
        make_trainer(tmp_path, pair[0]).validate(
            Net(), Data(), ckpt_path=tmp_path / "two.ckpt", verbose=False
        )
    with pytest.raises(
        ConfigError, match="Two LoraCallbacks of this Trainer have adapter_name='a'"
    ):
        make_trainer(tmp_path, pair[0], LoraCallback(adapter_name="a")).fit(Net(), Data())


def test_evaluating_a_disabled_or_merged_adapter(tmp_path: Path) -> None:
    """Comparing with the base is a validate inside `disable_adapter`, callback and all."""
    from lora_lightning import disable_adapter, merge_adapter

    base = make_trainer(tmp_path).validate(Net(), Data(), verbose=False)[0]["val_loss"]
    module, data = Net(), Data()
    trainer = make_trainer(tmp_path, LoraCallback(r=2))
    trainer.fit(module, data)
    tuned = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    with disable_adapter(module):
        assert trainer.validate(module, data, verbose=False)[0]["val_loss"] == base
    assert trainer.validate(module, data, verbose=False)[0]["val_loss"] == tuned
    merge_adapter(module)
    merged = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    assert merged == pytest.approx(tuned, rel=1e-6)
    assert merged != base


# -- what it says ------------------------------------------------------------------------------------


def test_start_table_and_end_lines(tmp_path: Path, capsys: Any) -> None:
    make_trainer(
        tmp_path,
        LoraCallback(r=2, target_modules=["embed", "body.2"], modules_to_save=["head"]),
        ModelCheckpoint(tmp_path, filename="best", save_last=True),
        accumulate_grad_batches=2,
    ).fit(Net(), Data())
    out = capsys.readouterr().out
    assert "LoRA adapter 'default'" in out
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line
    ]
    assert ["embed", "1 of 1", "2", "48"] in rows
    assert ["body.2", "1 of 1", "2", "64"] in rows
    assert ["head", "1 of 1", "full", "51"] in rows
    assert "trainable 163 of 662 parameters (24.62%)" in out
    assert "adapter on disk 652 B; the base (" in out
    assert "effective batch 32 = 16 x 2 accumulated x 1 devices" in out
    assert f"\ncheckpoint: {tmp_path}/best.ckpt (" in out  # best by no metric
    assert f"last checkpoint: {tmp_path}/last.ckpt (" in out


def test_several_callbacks_say_once_what_is_true_of_the_run(tmp_path: Path, capsys: Any) -> None:
    callbacks = [
        LoraCallback(r=2),
        LoraCallback(AdaLoraConfig(init_r=2, target_r=1, tfinal=1), adapter_name="two"),
    ]
    make_trainer(tmp_path, *callbacks, ModelCheckpoint(tmp_path)).fit(Net(), Data())
    out = capsys.readouterr().out
    assert "LoRA adapter 'default'" in out
    assert "AdaLoRA adapter 'two'" in out
    assert out.count("effective batch") == out.count("checkpoint: ") == 1


# -- the rest of the run -----------------------------------------------------------------------------


def test_lora_dropout_acts_even_where_the_base_came_in_eval_mode(tmp_path: Path) -> None:
    module = Net()
    module.eval()
    seen = []

    class Watch(LoraCallback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.embed.adapters["default"].lora_dropout.training)

    make_trainer(tmp_path, Watch(lora_dropout=0.5, **OPTIONS), max_steps=1).fit(module, Data())
    assert seen == [True]


def test_frozen_norm_is_held_while_adapters_are_on(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    module.train()
    assert not module.norm.training
    assert not pickle.loads(pickle.dumps(module.norm)).train().training
    unload(module)
    assert module.norm.training
    assert module.norm.eval().train().training


@pytest.mark.parametrize("saved", ["norm", "1"])
def test_a_norm_that_trains_as_a_copy_is_not_held(tmp_path: Path, saved: str) -> None:
    module = Net()
    module.norm = torch.nn.Sequential(torch.nn.Identity(), module.norm)
    before = module.norm[1].running_mean.clone()
    key = "norm.1.running_mean"
    make_trainer(
        tmp_path, LoraCallback(r=2, target_modules=["embed"], modules_to_save=[saved])
    ).fit(module, Data())
    assert torch.equal(module.state_dict()[key], before)
    copy_of = {k.rpartition("norm.")[2]: v for k, v in adapter_state_dict(module).items()}
    assert not torch.equal(copy_of["1.running_mean"], before)
    norm = module.norm[1]
    assert torch.equal(norm.running_mean, copy_of["1.running_mean"])
    assert module.train().norm[1].training
    with disable_adapter(module):
        assert not norm.training  # the base's own is held
        assert not module.train().norm[1].training
        module(torch.randn(4, 8))
        assert torch.equal(norm.running_mean, before)
    assert norm.training
    assert not module.eval().norm[1].training
    assert not torch.equal(norm.running_mean, before)


def test_deleting_another_adapter_does_not_let_go_of_a_norm_whose_bias_trains() -> None:
    module = Net()
    inject_adapter(module, LoraConfig(r=2, target_modules=["embed"], bias="all"), "one")
    inject_adapter(module, LoraConfig(r=2, target_modules=["embed"]), "two")
    delete_adapter(module, "two")
    assert not module.train().norm.training


@pytest.mark.parametrize("method", ["lr_find", "scale_batch_size"])
def test_trial_runs_leave_the_base_alone(tmp_path: Path, method: str) -> None:
    """The Tuner leaves callbacks out of its trial fits."""
    from lightning.pytorch.tuner import Tuner

    class Searchable(Net):
        lr = 1e-3

    module = Searchable()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    tuner = Tuner(make_trainer(tmp_path, LoraCallback(**OPTIONS)))
    if method == "lr_find":
        tuner.lr_find(module, datamodule=Data(), num_training=5, update_attr=False)
    else:
        tuner.scale_batch_size(module, datamodule=Data(), max_trials=2, steps_per_trial=2)
    unload(module)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_base_that_was_exchanged_has_another_fingerprint(tmp_path: Path) -> None:
    """merge_and_unload or other weights between two runs: the checkpoint names the base it had."""
    module, data = Net(), Data()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, data)
    merge_and_unload(module)
    merged = copy.deepcopy(module.state_dict())
    trainer = make_trainer(tmp_path, LoraCallback(**{**OPTIONS, "r": 3}))
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    again = make_trainer(tmp_path, LoraCallback(**{**OPTIONS, "r": 3}))
    with pytest.raises(AdapterMismatchError, match="another base model"):
        again.validate(Net(), data, ckpt_path=tmp_path / "second.ckpt", verbose=False)
    right = Net()
    right.load_state_dict(merged)
    again.validate(right, data, ckpt_path=tmp_path / "second.ckpt", verbose=False)

    loaded = Net()  # other weights loaded into a module that carries its adapters already
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    trainer.validate(loaded, data, verbose=False)
    loaded.load_state_dict(merged, strict=False)
    trainer.fit(loaded, data)
    trainer.save_checkpoint(tmp_path / "third.ckpt")
    right = Net()
    right.load_state_dict(merged)
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).validate(
        right, data, ckpt_path=tmp_path / "third.ckpt", verbose=False
    )


def test_second_run_in_half_precision_keeps_the_fingerprint(tmp_path: Path) -> None:
    """bf16-true casts the base in place; its fingerprint stays that of the base as it came."""
    module, data = Net(), Data()
    for _ in range(2):
        trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS), precision="bf16-true")
        trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(".adapters." in key for key in state)  # a cast buffer is no change
    fresh = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    fresh.validate(Net(), data, ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_callbacks_that_change_the_base_are_refused(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning

    for callback in (BackboneFinetuning(), ModelPruning("l1_unstructured", amount=0.5)):
        with pytest.raises(ConfigError, match=f"{type(callback).__name__} changes base weights"):
            make_trainer(tmp_path, LoraCallback(**OPTIONS), callback).fit(Net(), Data())


def test_base_weights_that_begin_to_train_are_noticed(tmp_path: Path) -> None:
    class Unfreezes(Net):
        def on_train_start(self) -> None:
            self.embed.requires_grad_(True)
            self.optimizers().add_param_group({"params": self.embed.bias})
            self.embed.weight.requires_grad_(False)

    with pytest.raises(AdapterStateError, match=r"embed\.bias began to train, but belong"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(Unfreezes(), Data())


@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # OnExceptionCheckpoint asks for "last"
def test_a_failing_setup_shows_its_own_error(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    callbacks = [LoraCallback(target_modules=["nope"]), OnExceptionCheckpoint(str(tmp_path))]
    with pytest.raises(TargetError, match="matched nothing"):
        make_trainer(tmp_path, *callbacks, enable_checkpointing=True).fit(Net(), Data())


def test_an_adapter_checkpoint_needs_the_callback(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="no LoraCallback is at work in this Trainer"):
        make_trainer(tmp_path, LoraCallback(enabled=False)).fit(
            Net(), Data(), ckpt_path=tmp_path / "a.ckpt"
        )
    with pytest.raises(CheckpointError, match=r"is a folder; name a file. It holds a\.ckpt"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(Net(), Data(), ckpt_path=str(tmp_path))


def test_a_failing_load_leaves_strict_loading_strict(tmp_path: Path) -> None:
    class Refuses(Net):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            raise KeyError("mine")

    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = Refuses()
    with pytest.raises(KeyError, match="mine"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS)).validate(
            module, Data(), ckpt_path=tmp_path / "a.ckpt"
        )
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})


def test_extra_state_is_kept(tmp_path: Path) -> None:
    class Counts(Net):
        steps = 0

        def get_extra_state(self) -> Any:
            return {"steps": self.steps}

        def set_extra_state(self, state: Any) -> None:
            self.steps = state["steps"]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.steps += 1
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    trainer.fit(Counts(), Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Counts()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).validate(
        fresh, Data(), ckpt_path=tmp_path / "a.ckpt", verbose=False
    )
    assert fresh.steps == 4


def test_interrupted_run_says_where_its_checkpoint_lies(tmp_path: Path, capsys: Any) -> None:
    class Interrupted(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        make_trainer(
            tmp_path,
            LoraCallback(**OPTIONS),
            ModelCheckpoint(tmp_path, filename="one"),
            max_epochs=3,
        ).fit(Interrupted(), Data())
    assert f"checkpoint: {tmp_path}/one.ckpt" in capsys.readouterr().out


def test_learning_rate_finder(tmp_path: Path) -> None:
    """It saves and restores through the same hooks, in the middle of fit."""
    from lightning.pytorch.tuner import Tuner

    class Searchable(Net):
        lr = 1e-3

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    module = Searchable()
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    Tuner(trainer).lr_find(module, datamodule=Data(), num_training=10, min_lr=1e-4, max_lr=1e-1)
    assert not adapter_tensors(module)["embed.adapters.default.lora_B"].any()  # as at the start
    trainer.fit(module, Data())
    assert all(v.abs().sum() > 0 for v in adapter_tensors(module).values())
