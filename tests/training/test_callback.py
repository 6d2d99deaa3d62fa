"""LoraCallback through the Trainer: every entry point, every place where a model is built."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
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
    OptimizerError,
    TargetError,
)
from tests.helpers.lightning_modules import (
    BuiltInConfigureModel,
    BuiltInSetup,
    Data,
    Net,
    NetWithoutOptimizer,
    make_trainer,
)

OPTIONS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["embed", "body.2"],
    "modules_to_save": ["head"],
}


def adapters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if ".adapters." in k}


# -- where and when ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Net, BuiltInSetup, BuiltInConfigureModel, NetWithoutOptimizer])
def test_trains_wherever_the_model_is_built(tmp_path: Path, kind: type) -> None:
    module = kind()
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    assert all(v.abs().sum() > 0 for v in adapters(module).values())
    assert len(adapters(module)) == 6


@pytest.mark.parametrize("kind", [Net, BuiltInSetup, BuiltInConfigureModel])
def test_every_entry_point_once_and_again(tmp_path: Path, kind: type) -> None:
    module, data = kind(), Data()
    trainer = make_trainer(
        tmp_path, LoraCallback(**OPTIONS), ModelCheckpoint(tmp_path, filename="best")
    )
    trainer.validate(module, data, verbose=False)  # before fit: adapters are there, as a no-op
    at_start = adapters(module)
    trainer.fit(module, data)
    trained = adapters(module)
    assert at_start.keys() == trained.keys()
    assert not torch.equal(
        at_start["embed.adapters.default.lora_B"], trained["embed.adapters.default.lora_B"]
    )
    own = trainer.validate(module, data, verbose=False)
    assert trainer.test(module, data, verbose=False)[0]["test_loss"] == own[0]["val_loss"]
    trainer.predict(module, data)
    trainer.fit(module, data)  # max_epochs reached: nothing more, and nothing is injected twice
    assert all(torch.equal(trained[k], v) for k, v in adapters(module).items())
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
    first = adapters(module)
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    second = adapters(module)
    assert first.keys() == second.keys()
    assert not torch.equal(
        first["embed.adapters.default.lora_B"], second["embed.adapters.default.lora_B"]
    )


def test_disabled_callback_is_not_there(tmp_path: Path, capsys: Any) -> None:
    module = Net()
    before = copy.deepcopy(module.state_dict())
    trainer = make_trainer(tmp_path, LoraCallback(enabled=False))
    trainer.fit(module, Data())
    assert not adapters(module)
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
    assert {name.partition(".adapters.")[0] for name in adapters(module)} == {"body.2"}
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
    assert set(adapters(module)) == {"net.adapters.default.lora_A", "net.adapters.default.lora_B"}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt")["state_dict"]) == set(adapters(module))


def test_two_callbacks_train_together(tmp_path: Path) -> None:
    module = Net()
    pair = [
        LoraCallback(r=2, target_modules=["embed"], adapter_name="a"),
        LoraCallback(r=3, target_modules=["embed", "body.2"], adapter_name="b"),
    ]
    trainer = make_trainer(tmp_path, *pair)
    trainer.fit(module, Data())
    assert adapter_names(module) == active_adapters(module) == ["a", "b"]
    assert all(v.abs().sum() > 0 for v in adapters(module).values())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(adapters(module))
    fresh = Net()
    make_trainer(tmp_path, *pair).validate(
        fresh, Data(), ckpt_path=tmp_path / "two.ckpt", verbose=False
    )
    assert all(torch.equal(v, adapters(fresh)[k]) for k, v in adapters(module).items())
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
    assert f"best checkpoint: {tmp_path}/best.ckpt (" in out
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
    assert out.count("effective batch") == out.count("best checkpoint") == 1


# -- the rest of the run -----------------------------------------------------------------------------


def test_supplied_optimizer_is_fused_adamw(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraCallback(lr=3e-3, **OPTIONS))
    trainer.fit(NetWithoutOptimizer(), Data())
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] is True
    assert optimizer.defaults["lr"] == 3e-3


def test_supplied_optimizer_in_mixed_precision(tmp_path: Path) -> None:
    """Lightning would not clip the gradients of a fused one."""
    for clip in (None, 0.1):
        options = {"precision": "bf16-mixed", "gradient_clip_val": clip}
        trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS), max_steps=1, **options)
        trainer.fit(NetWithoutOptimizer(), Data())
        assert bool(trainer.optimizers[0].defaults["fused"]) == (clip is None)


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
    make_trainer(
        tmp_path, LoraCallback(r=2, target_modules=["embed"], modules_to_save=[saved])
    ).fit(module, Data())
    assert torch.equal(module.norm[1].running_mean, before)
    copy_of = {k.rpartition("norm.")[2]: v for k, v in adapter_state_dict(module).items()}
    assert not torch.equal(copy_of["1.running_mean"], before)
    copies = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert [m.train().training for m in copies] == [False, True]
    assert [m.training for m in module.eval().modules() if m in copies] == [False, False]


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
    assert f"best checkpoint: {tmp_path}/one.ckpt" in capsys.readouterr().out


def test_manual_optimization_in_parts_is_no_warning(tmp_path: Path, recwarn: Any) -> None:
    class Alternates(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.embed(batch[0]).mean())
            optimizer.step()

    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(Alternates(), Data())
    assert not [w for w in recwarn if "had no gradient" in str(w.message)]


def test_groups_are_found_by_type_not_by_name(tmp_path: Path) -> None:
    """A user's module may be called `adapters`."""

    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleDict({"fast": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.adapters["fast"](x))

    module = Named()
    optimizer = torch.optim.SGD(
        [
            {"params": module.embed.parameters(), "lr": 0.1},
            {"params": module.adapters.parameters(), "lr": 0.2},
        ]
    )
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign,assignment]
    make_trainer(tmp_path, LoraCallback(r=2, target_modules=["embed", "fast"])).fit(module, Data())
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


def test_a_bypassed_adapter_is_noticed_in_the_first_step(tmp_path: Path) -> None:
    class ReadsTheWeight(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.linear(x, self.embed.weight)  # past the module
            return hidden[:, :3] + self.bias

        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]).requires_grad_(), batch[1])

    with pytest.raises(AdapterStateError) as error:
        make_trainer(tmp_path, LoraCallback(r=2, target_modules=["embed"])).fit(
            ReadsTheWeight(), Data()
        )
    assert "After the first backward pass no adapter has a gradient" in str(error.value)
    assert "(lora.target_modules)" in str(error.value)


def test_a_partly_bypassed_adapter_is_a_warning(tmp_path: Path) -> None:
    class SkipsBody(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.embed(x)))

    with pytest.warns(UserWarning, match=r"2 of 6 trainable tensors had no gradient.*body\.2"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS), max_steps=1).fit(SkipsBody(), Data())


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
    assert not adapters(module)["embed.adapters.default.lora_B"].any()  # as at the start
    trainer.fit(module, Data())
    assert all(v.abs().sum() > 0 for v in adapters(module).values())


# -- optimizers of every make ------------------------------------------------------------------------


def groups_by_kind(self: LightningModule) -> Any:
    weights = [p for n, p in self.named_parameters() if p.ndim > 1]
    others = [p for n, p in self.named_parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": others}], lr=1e-2
    )


def only_the_head(self: Any) -> Any:
    return torch.optim.SGD(self.head.parameters(), lr=0.1)


def named(self: Any) -> Any:
    return torch.optim.SGD(self.named_parameters(), lr=0.1)


def one_cycle(self: Any) -> Any:
    optimizer = groups_by_kind(self)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=10)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


OPTIMIZERS = {
    "groups": groups_by_kind,
    "only the head": only_the_head,
    "named parameters": named,
    "one cycle": one_cycle,
    "Adagrad": lambda self: torch.optim.Adagrad(self.parameters(), lr=0.1),
    "LBFGS": lambda self: torch.optim.LBFGS(self.parameters(), lr=0.1),
    "filtered": lambda self: torch.optim.Adam(
        [p for p in self.parameters() if p.requires_grad], lr=0.1
    ),
    "None": lambda self: None,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_whatever_configure_optimizers_returns(tmp_path: Path, make: Any) -> None:
    class Module(Net):
        configure_optimizers = make

    module = Module()
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS), max_epochs=2)
    trainer.fit(module, Data())
    held = [id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert all(v.abs().sum() > 0 for v in adapters(module).values())


def test_adapter_joins_the_group_of_its_base_weight(tmp_path: Path) -> None:
    """As from LightningCLI, whose optimizer is older than the adapters."""
    module = Net()
    optimizer = torch.optim.SGD(
        [
            {"params": module.head.parameters(), "lr": 0.1},
            {"params": module.embed.parameters(), "lr": 0.2},
        ]
    )
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign,assignment]
    make_trainer(tmp_path, LoraCallback(r=2, target_modules=["embed", "head"])).fit(module, Data())
    head, embed = (group["params"] for group in optimizer.param_groups)
    ids = {id(p): name for name, p in module.named_parameters()}
    assert [ids[id(p)] for p in head] == [
        "head.adapters.default.lora_A",
        "head.adapters.default.lora_B",
    ]
    assert [ids[id(p)] for p in embed] == [
        "embed.adapters.default.lora_A",
        "embed.adapters.default.lora_B",
    ]


def test_optimizer_left_with_nothing(tmp_path: Path) -> None:
    class TwoOptimizers(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.body.parameters(), lr=0.1),
                torch.optim.Adam(self.head.parameters(), lr=0.1),
            ]

    with pytest.raises(OptimizerError) as error:
        make_trainer(tmp_path, LoraCallback(r=2, target_modules=["body.2"])).fit(
            TwoOptimizers(), Data()
        )
    assert "Optimizer 1 (Adam) is left without any parameter" in str(error.value)
    assert "(lora.modules_to_save)" in str(error.value)


# -- bad input ---------------------------------------------------------------------------------------


def text_of(error: type[Exception], act: Any) -> str:
    with pytest.raises(error) as caught:
        act()
    return str(caught.value)


def test_options_are_checked_when_they_are_given() -> None:
    text = text_of(ConfigError, lambda: LoraCallback(rank=4))
    assert "LoraCallback has no option 'rank'" in text
    assert text_of(ConfigError, lambda: LoraCallback(lora_alhpa=4)).startswith(
        "LoraCallback has no option 'lora_alhpa'. Did you mean 'lora_alpha'?"
    )
    text = text_of(ConfigError, lambda: LoraCallback(LoraConfig(r=2), r=4))
    assert text.startswith("LoraCallback was given config and also r: two sources")
    assert LoraCallback(LoraConfig(r=2)).config.r == 2
    passed_on = {**vars(LoraConfig()), "r": 4}  # as the command line does it: all of them
    text = text_of(ConfigError, lambda: LoraCallback(LoraConfig(r=2), **passed_on))
    assert text.startswith("LoraCallback was given config and also r: two sources")
    text = text_of(ConfigError, lambda: LoraCallback(init_from="there", **passed_on))
    assert text.startswith("LoraCallback was given init_from='there' and also r: the adapter")


def test_wrong_submodule(tmp_path: Path) -> None:
    act = lambda: make_trainer(tmp_path, LoraCallback(module="bodi")).fit(Net(), Data())  # noqa: E731
    text = text_of(ConfigError, act)
    assert text == (
        "module='bodi': Net has no such submodule. Did you mean 'body'? "
        "At its top: embed, norm, body, head. (lora.module)"
    )


def test_wrong_target_is_found_before_the_first_step(tmp_path: Path) -> None:
    for kind in (Net, BuiltInSetup, BuiltInConfigureModel):
        module = kind()
        fit = make_trainer(tmp_path, LoraCallback(target_modules=["embd"])).fit
        assert "did you mean 'embed'" in text_of(TargetError, partial(fit, module, Data()))
        assert not adapters(module)


def test_other_options_on_the_same_module(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2)).validate(module, Data(), verbose=False)
    text = text_of(
        AdapterMismatchError,
        lambda: make_trainer(tmp_path, LoraCallback(r=3)).validate(module, Data(), verbose=False),
    )
    assert "The model carries an adapter 'default' already ('embed', for one)" in text
    assert "r: 2 there, 3 here" in text


def test_adapters_that_nobody_would_save(tmp_path: Path) -> None:
    module = Net()
    inject_adapter(module, LoraConfig(r=2, target_modules=["embed"]), "older")
    with pytest.raises(AdapterStateError) as error:
        make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    assert "The model carries adapters ['older'], which no LoraCallback" in str(error.value)
    assert "merge_and_unload(module)" in str(error.value)


def test_an_adapter_that_was_injected_by_hand(tmp_path: Path) -> None:
    module = Net()
    inject_adapter(module, LoraConfig(**OPTIONS))
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    assert len(adapters(module)) == 6
    assert all(v.abs().sum() > 0 for v in adapters(module).values())


def test_an_adapter_that_was_switched_off_trains_again(tmp_path: Path) -> None:
    module = Net()
    inject_adapter(module, LoraConfig(**OPTIONS))
    set_adapter(module, [])
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    assert active_adapters(module) == ["default"]
    assert all(v.abs().sum() > 0 for v in adapters(module).values())


def test_merged_adapters_do_not_train(tmp_path: Path) -> None:
    from lora_lightning import merge_adapter

    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2)).validate(module, Data(), verbose=False)
    merge_adapter(module)
    with pytest.raises(AdapterStateError, match="Call unmerge_adapter"):
        make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())


def test_unsupported_strategies_are_refused() -> None:
    from lightning.pytorch.strategies import DDPStrategy

    from lora_lightning.training.checks.run import check_strategy

    class XLAStrategy:
        """Stands for one that nobody has tried."""

    with pytest.raises(ConfigError, match="does not support XLAStrategy in this version"):
        check_strategy(SimpleNamespace(strategy=XLAStrategy()))
    check_strategy(SimpleNamespace(strategy=DDPStrategy()))


def test_another_submodule_than_before(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    act = lambda: make_trainer(tmp_path, LoraCallback(r=2, module="body")).validate(module, Data())  # noqa: E731
    text = text_of(AdapterMismatchError, act)
    assert "on 'embed', for one, which is outside the submodule" in text
    assert text.endswith("(lora.module)")


def test_two_copies_of_one_module_are_refused_before_the_second_is_made(tmp_path: Path) -> None:
    module = Net()
    save = {"r": 2, "target_modules": ["embed"], "modules_to_save": ["head"]}
    one, two = LoraCallback(**save), LoraCallback(adapter_name="two", **save)
    text = text_of(AdapterStateError, lambda: make_trainer(tmp_path, one, two).fit(module, Data()))
    assert text.endswith("(lora.modules_to_save)")
    assert adapter_names(module) == ["default"]


def test_a_later_trainer_without_the_callback_is_warned_about(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    other = make_trainer(tmp_path)
    other.validate(module, Data())  # the trained adapters act, which is what one wants
    for trainer in (other, make_trainer(tmp_path, LoraCallback(r=2, enabled=False))):
        with pytest.warns(UserWarning, match=r"adapters \['default'\] of an earlier run, but this"):
            trainer.fit(module, Data())
    make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    merge_and_unload(module)
    other.fit(module, Data())
