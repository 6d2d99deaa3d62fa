"""NaN and inf are noticed before the step that would spread them, whatever made the step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lora_lightning import AdaLoraConfig, LoraCallback, LoraConfig, inject_adapter
from lora_lightning.errors import ConfigError, NonfiniteError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.training import nonfinite
from lora_lightning.utilities.dtensor import full_tensor
from tests.helpers.fsdp2_modules import shard
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.tensors import assert_same_state, same_state

OPTIONS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["embed", "body.2"],
    "modules_to_save": ["head", "norm"],  # a trained norm moves its statistics in forward
}


class Ordered(Data):
    """The same batches in the same order every epoch: four of 16."""

    def train_dataloader(self) -> Any:
        return self.val_dataloader()


class Poisoned(Net):
    """One batch whose loss or gradient is not finite.

    Args:
        at: (epoch, batch index), or every batch from there on with `onwards`.
        kind: a loss of "nan"; one of "inf", whose gradients are finite; "gradient" is NaN behind a finite loss;
            "input" poisons the batch itself.

    """

    def __init__(self, at: tuple[int, int] = (1, 2), kind: str = "nan", onwards: bool = False):
        super().__init__()
        self.at, self.kind, self.onwards = at, kind, onwards
        self.body[1].p = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, here = batch[0], (self.current_epoch, batch_idx)
        bad = here >= self.at if self.onwards else here == self.at
        if bad and self.kind == "input":
            x = x.clone()
            x[3, 2] = torch.nan
        loss = nn.functional.cross_entropy(self(x), batch[1])
        if bad and self.kind == "gradient":
            nothing = self.body(self.embed(x)).sum() * 0
            loss = loss + torch.sqrt(nothing * nothing)  # its derivative at 0 is infinite
        if bad and self.kind == "nan":
            loss = loss * torch.nan
        if bad and self.kind == "inf":
            loss = loss + torch.inf
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def full_state(trainer: Any, module: nn.Module) -> dict[str, Any]:
    optimizer = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{k}": v for i, s in optimizer.items() for k, v in s.items()}
    return copy.deepcopy({**module.state_dict(), **moments})


class Watch(LoraCallback):
    """Keeps the state after every batch; before, so that one can see what a step changed."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *rest)
        self.before = full_state(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.at_exception = full_state(trainer, pl_module)


# -- stop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient", "input"])
def test_stop_leaves_everything_as_before_the_step(tmp_path: Path, kind: str) -> None:
    watch, saver = Watch(**OPTIONS), ModelCheckpoint(tmp_path, filename="{epoch}", save_last=True)
    trainer = make_trainer(tmp_path, watch, saver, max_epochs=3)
    with pytest.raises(NonfiniteError) as error:
        trainer.fit(Poisoned(kind=kind), Ordered())
    assert_same_state(watch.before, watch.at_exception)
    text = str(error.value)
    assert text.startswith("At global_step=6, epoch 1, batch 2: ")
    if kind == "inf":  # a constant has no gradient
        assert "the loss is inf. The step was not made" in text
    elif kind == "gradient":
        assert "2: 4 of 8 gradients are not finite: embed.adapters.default.lora_A (" in text
    else:
        assert "the loss is nan; 8 of 8 gradients are not finite: embed.adapters" in text
    assert f"resume from '{tmp_path}/last.ckpt'" in text
    assert "(lora.nonfinite)" in text
    # The checkpoint of the epoch before is whole: resuming without the bad batch is the run itself.
    fresh = Poisoned(at=(9, 9))
    trainer = make_trainer(tmp_path / "again", LoraCallback(**OPTIONS), max_epochs=3)
    trainer.fit(fresh, Ordered(), ckpt_path=tmp_path / "last.ckpt")
    straight = Poisoned(at=(9, 9))
    make_trainer(tmp_path / "straight", LoraCallback(**OPTIONS), max_epochs=3).fit(
        straight, Ordered()
    )
    assert_same_state(fresh.state_dict(), straight.state_dict())


@pytest.mark.parametrize("kind", ["nan", "input"])
def test_negative_control_without_the_guard_is_poisoned(tmp_path: Path, kind: str) -> None:
    module = Poisoned(kind=kind)
    trainer = make_trainer(tmp_path, LoraCallback(nonfinite="ignore", **OPTIONS), max_epochs=2)
    trainer.fit(module, Ordered())
    assert module.embed.adapters["default"].lora_B.isnan().all()


def test_stop_names_batches_of_an_accumulated_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS), accumulate_grad_batches=4)
    with pytest.raises(NonfiniteError, match="global_step=0, epoch 0, batch 1: the loss is nan"):
        trainer.fit(Poisoned(at=(0, 1)), Ordered())
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS), accumulate_grad_batches=4)
    with pytest.raises(NonfiniteError, match="batch 0 and 3: 4 of 8 gradients are not finite"):
        trainer.fit(Poisoned(at=(0, 1), kind="gradient"), Ordered())


def test_weights_that_were_broken_before_are_named(tmp_path: Path) -> None:
    class TooLarge(Poisoned):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=torch.inf)

    with pytest.raises(
        NonfiniteError, match=r"Weights are not finite already: .*The update before"
    ):
        make_trainer(tmp_path, LoraCallback(r=2), max_epochs=9).fit(TooLarge(at=(99, 0)), Ordered())


def test_large_finite_gradients_are_no_alarm(tmp_path: Path) -> None:
    """Their squares overflow, and with them the 2-norm."""

    class Large(Poisoned):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 1e30

    module = Large(at=(9, 9))
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Ordered())
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # OnExceptionCheckpoint
def test_what_is_saved_on_the_exception_is_good(tmp_path: Path) -> None:
    callbacks = [LoraCallback(**OPTIONS), OnExceptionCheckpoint(tmp_path, "crash")]
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=2, enable_checkpointing=True)
    with pytest.raises(NonfiniteError):
        trainer.fit(Poisoned(kind="input"), Ordered())
    saved = torch.load(tmp_path / "crash.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in saved.values())


# -- skip --------------------------------------------------------------------------------------------


def by_hand(at: tuple[int, int], accumulate: int = 1, epochs: int = 2) -> dict[str, Tensor]:
    """A plain training loop that never sees the step with the bad batch."""
    module = Poisoned(at=(9, 9))
    inject_adapter(module, LoraConfig(**OPTIONS))
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for epoch in range(epochs):
        batches = list(Ordered().val_dataloader())
        for start in range(0, len(batches), accumulate):
            if epoch == at[0] and start <= at[1] < start + accumulate:
                continue
            optimizer.zero_grad()
            for x, y in batches[start : start + accumulate]:
                (nn.functional.cross_entropy(module(x), y) / accumulate).backward()
            optimizer.step()
    return module.state_dict()


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient", "input"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_is_the_run_without_that_step(
    tmp_path: Path, kind: str, accumulate: int, capsys: Any
) -> None:
    module = Poisoned(kind=kind)
    trainer = make_trainer(
        tmp_path, LoraCallback(nonfinite="skip", **OPTIONS), max_epochs=2,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="epoch 1, .*left out, number 1 of this run"):
        trainer.fit(module, Ordered())
    assert_same_state(module.state_dict(), by_hand((1, 2), accumulate))
    assert "1 optimizer steps were left out" in capsys.readouterr().out
    assert trainer.global_step == 8 // accumulate  # schedules and max_steps go by attempts


def test_negative_control_a_skipped_batch_is_a_difference() -> None:
    assert not same_state(by_hand((1, 2)), by_hand((9, 9)))


@pytest.mark.filterwarnings("ignore:.*left out, number 1")
def test_skip_with_clipping_and_schedule(tmp_path: Path) -> None:
    class Scheduled(Poisoned):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    for algorithm in ("norm", "value"):
        module = Scheduled(at=(0, 0))  # the very first one: no complaint about the order of calls
        trainer = make_trainer(
            tmp_path, LoraCallback(nonfinite="skip", **OPTIONS),
            gradient_clip_val=0.1, gradient_clip_algorithm=algorithm,
        )  # fmt: skip
        trainer.fit(module, Ordered())
        assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2 / 5
        assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*left out, number")
def test_skip_gives_up_when_it_does_not_help(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraCallback(nonfinite="skip", **OPTIONS), max_epochs=9)
    with pytest.raises(NonfiniteError, match="10 steps in a row were not finite") as error:
        trainer.fit(Poisoned(at=(0, 3), onwards=True), Ordered())
    assert str(error.value).startswith("At global_step=12, epoch 3, batch 0")


@pytest.mark.filterwarnings("ignore:.*left out, number 1")
def test_the_count_goes_on_after_a_resume(tmp_path: Path, capsys: Any) -> None:
    class Often(Poisoned):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.at = (self.current_epoch, 1)
            return super().training_step(batch, batch_idx)

    def fit(epochs: int, ckpt_path: Any = None) -> int:
        saver = ModelCheckpoint(tmp_path, save_last=True)
        callback = LoraCallback(nonfinite="skip", **OPTIONS)
        make_trainer(tmp_path, callback, saver, max_epochs=epochs).fit(
            Often(), Ordered(), ckpt_path=ckpt_path
        )
        return callback._nonfinite_guard.skipped

    assert fit(1) == 1
    assert fit(3, "last") == 3
    assert "3 optimizer steps were left out" in capsys.readouterr().out


def test_steps_that_lightning_does_not_see(tmp_path: Path, monkeypatch: Any) -> None:
    class Raw(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    monkeypatch.setattr(nonfinite, "MAX_LOSSES", 3)
    with pytest.warns(UserWarning, match=r"3 backward passes without .* \(lora.nonfinite\)"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(Raw(), Data())


@pytest.mark.filterwarnings("ignore:.*left out, number 1")
def test_skip_with_manual_optimization(tmp_path: Path) -> None:
    class Manual(Poisoned):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.AdamW(self.embed.parameters(), lr=1e-2),
                torch.optim.SGD(self.head.parameters(), lr=0.1),
            ]

    module = Manual(kind="input")
    callback = LoraCallback(nonfinite="skip", **OPTIONS)
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(module, Ordered())
    assert callback._nonfinite_guard.skipped == 2
    assert all(p.isfinite().all() for p in module.parameters())
    with pytest.raises(NonfiniteError, match="global_step=12, epoch 1, batch 2"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS), max_epochs=2).fit(Manual(), Ordered())


@pytest.mark.filterwarnings("ignore:.*left out, number 1")
def test_skip_with_adalora(tmp_path: Path) -> None:
    module = Poisoned(kind="gradient")
    config = AdaLoraConfig(init_r=3, target_r=1, tinit=1, tfinal=2, deltaT=1)
    callback = LoraCallback(config, nonfinite="skip")
    make_trainer(tmp_path, callback, max_epochs=3).fit(module, Ordered())
    assert all(p.isfinite().all() for p in module.parameters())
    allocator = callback._rank_schedule.allocator
    assert allocator is not None
    assert (allocator.steps, allocator.settled, callback._nonfinite_guard.skipped) == (12, True, 1)


# -- gradient scaler -----------------------------------------------------------------------------------


def scaled(scale: float) -> MixedPrecision:
    plugin = MixedPrecision("bf16-mixed", "cpu")  # the CPU's half precision
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return plugin


class Fused(Poisoned):
    """An optimizer that unscales in its own step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


@pytest.mark.parametrize("kind", [Poisoned, Fused])
def test_inf_gradients_are_the_scalers_business(tmp_path: Path, kind: type) -> None:
    module, plugin = kind(kind="gradient"), scaled(64.0)
    callback = LoraCallback(**OPTIONS)
    make_trainer(tmp_path, callback, max_epochs=2, plugins=[plugin]).fit(module, Ordered())
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 32.0  # halved once, and the run went on
    assert callback._nonfinite_guard.skipped == 0
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", [Poisoned, Fused])
def test_a_scale_that_has_come_down_is_not(tmp_path: Path, kind: type) -> None:
    module = kind(at=(1, 0), kind="gradient", onwards=True)
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS), max_epochs=9, plugins=[scaled(4.0)])
    with pytest.raises(NonfiniteError, match="epoch 1, batch 2: 4 of 8 gradients"):  # 4, 2, then 1
        trainer.fit(module, Ordered())
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*left out, number 1")
@pytest.mark.parametrize("kind", [Poisoned, Fused])
@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_noticed_under_a_scaler(
    tmp_path: Path, kind: type, poison: str
) -> None:
    with pytest.raises(NonfiniteError, match=f"epoch 1, batch 2: the loss is {poison}"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS), max_epochs=2, plugins=[scaled(64.0)]).fit(
            kind(kind=poison), Ordered()
        )
    module, callback = kind(kind=poison), LoraCallback(nonfinite="skip", **OPTIONS)
    trainer = make_trainer(tmp_path, callback, max_epochs=2, plugins=[scaled(64.0)])
    trainer.fit(module, Ordered())
    assert callback._nonfinite_guard.skipped == 1
    steps = [state["step"] for state in trainer.optimizers[0].state.values()]
    assert {int(step) for step in steps} == {7}
    assert all(p.isfinite().all() for p in module.parameters())


# -- two processes -------------------------------------------------------------------------------------


class OnRankOne(Poisoned):
    """The loss of one process is inf, the gradients are finite everywhere."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 0:
            self.at = (9, 9)
        return super().training_step(batch, batch_idx)


def both_policies(folder: Path, way: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for policy in ("skip", "stop"):
        strategy: Any = DDPStrategy(static_graph=True)
        if way == "FSDP2":
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        seed_everything(3, verbose=False)
        module = OnRankOne(at=(1, 1), kind="inf")
        callback = LoraCallback(
            r=1,  # FSDP2: one of the two processes has an empty part of lora_A
            target_modules=["embed", "body.2"],
            modules_to_save=["head"],
            nonfinite=policy,  # type: ignore[arg-type]
        )
        trainer = make_trainer(folder, callback, max_epochs=2, devices=2, strategy=strategy)
        try:
            trainer.fit(module, Ordered())
        except NonfiniteError as error:
            found["text"] = str(error)
        else:
            found["skipped"] = callback._nonfinite_guard.skipped
            found["state"] = {
                name: full_tensor(p.detach())
                for name, p in named_parameters(module)
                if p.requires_grad
            }
    # Together: gloo's threads abort a process that leaves while another still talks to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*left out, number 1")
def test_all_processes_do_the_same(tmp_path: Path) -> None:
    states = []
    for way in ("DDP", "FSDP2"):
        zero, one = on_processes(2, both_policies, tmp_path, way)
        said = "At global_step=3, epoch 1, batch 1: {}. The step was not made"
        assert one["text"].startswith(said.format("the loss is inf"))
        other = "another process has a loss or gradient that is not finite"
        assert zero["text"].startswith(said.format(other))
        assert zero["skipped"] == one["skipped"] == 1
        assert_same_state(zero["state"], one["state"])
        assert len(zero["state"]) == 6
        states.append(zero["state"])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


# -- options -------------------------------------------------------------------------------------------


def test_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nonfinite='stopp': known .* Did you mean 'stop'"):
        LoraCallback(nonfinite="stopp")  # type: ignore[arg-type]
    pair = [LoraCallback(adapter_name="a"), LoraCallback(adapter_name="b", nonfinite="skip")]
    with pytest.raises(ConfigError, match="differ in nonfinite: 'stop' for adapter 'a', 'skip'"):
        make_trainer(tmp_path, *pair).fit(Net(), Data())
    module = Net()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="not possible with LBFGS"):
        make_trainer(tmp_path, LoraCallback(r=2, nonfinite="skip")).fit(module, Data())


def test_one_look_for_each_step(tmp_path: Path, monkeypatch: Any) -> None:
    """One fused reduction a step, also with several callbacks and accumulation."""
    calls = []
    original = nonfinite.get_total_norm
    monkeypatch.setattr(
        nonfinite, "get_total_norm", lambda *a: calls.append(len(a[0])) or original(*a)
    )
    pair = [LoraCallback(r=2, adapter_name="a"), LoraCallback(r=2, adapter_name="b")]
    make_trainer(tmp_path, *pair, accumulate_grad_batches=2).fit(Net(), Data())
    assert calls == [2 + 12, 2 + 12]
