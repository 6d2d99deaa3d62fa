"""AdaLoRA under LoraCallback: the budget falls on schedule, resumes, and ends as it should."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, adapter_state_dict
from lora_lightning.adapters.adalora import AdaLoraAdapter, AdaLoraConfig
from lora_lightning.engine.rank_allocation import adalora_adapters
from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import named_adapted_layers
from tests.helpers.adalora_of_peft import adalora_of_peft, short_name
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.tensors import adapter_tensors, assert_close_state, assert_same_state, trainable

CONFIG = {"init_r": 6, "target_r": 3, "target_modules": ["embed", "body.2"]}


def total_rank(model: nn.Module) -> int:
    return sum(
        int((layer.adapters["default"].lora_E != 0).sum())
        for _, layer in named_adapted_layers(model)
        if isinstance(layer.adapters["default"], AdaLoraAdapter)
    )


class Watch(Callback):
    """Total rank after every batch; scores stay finite, and what is masked for good stays zero."""

    def __init__(self, lora: LoraCallback) -> None:
        self.lora = lora
        self.ranks: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ranks.append(total_rank(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        allocator = self.lora._rank_schedule.allocator
        assert all(t.isfinite().all() for t in allocator.sensitivity.values())
        if allocator.settled:
            for path, mask in allocator.masks.items():
                assert not allocator.adapters[path].lora_E[~mask].any()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_total_rank_falls_to_the_target(tmp_path: Path, capsys: Any, accumulate: int) -> None:
    lora = LoraCallback(AdaLoraConfig(**CONFIG, tinit=2, tfinal=3 // accumulate))
    watch = Watch(lora)
    module = Net()
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 3 * accumulate}
    make_trainer(tmp_path, lora, watch, **options).fit(module, Data())
    ranks = watch.ranks[accumulate - 1 :: accumulate]
    assert len(ranks) == 12
    assert ranks[:2] == [12, 12]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[12 - 3 // accumulate - 1 :] == [6] * (3 // accumulate + 1)
    masks = lora._rank_schedule.allocator.masks
    embed, body = (int(masks[name].sum()) for name in ("embed", "body.2"))
    line = f"AdaLoRA kept a total rank of 6 of 12: body.2 {body}, embed {embed}"
    assert line in capsys.readouterr().out


def test_a_run_that_is_too_short(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ConfigError, match="leave none of 4 optimizer steps"):
        make_trainer(tmp_path, LoraCallback(AdaLoraConfig(**CONFIG, tinit=4))).fit(Net(), Data())
    with pytest.warns(UserWarning, match="ends after 4 optimizer steps, before .*step 9"):
        make_trainer(tmp_path, LoraCallback(AdaLoraConfig(**CONFIG, total_step=9))).fit(
            Net(), Data()
        )
    assert "ranks are not final: 4 of 9 steps" in capsys.readouterr().out
    endless = make_trainer(tmp_path, LoraCallback(AdaLoraConfig(**CONFIG)), max_epochs=-1)
    with pytest.raises(ConfigError, match=r"Set total_step, or max_steps.*\(lora.total_step\)"):
        endless.fit(Net(), Data())
    lora = LoraCallback(AdaLoraConfig(**CONFIG, tinit=40, tfinal=40))
    make_trainer(tmp_path, lora, fast_dev_run=True).fit(Net(), Data())


class Regression(LightningModule):
    """float64 throughout; `order` is how the user writes manual optimization."""

    def __init__(self, order: str = "automatic") -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
        self.net = nn.Sequential(*layers).double()
        self.order = order
        self.automatic_optimization = order == "automatic"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        if self.order == "automatic":
            return loss
        optimizer = self.optimizers()
        if self.order == "zero first":
            optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.order == "zero last":
            optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def regression_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.stack([x[:, :3].prod(1), x[:, 3].sin()], 1))


REGRESSION = {
    "init_r": 5,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 4,
    "deltaT": 2,
    "orth_reg_weight": 0.3,
    "target_modules": ["0", "2"],
}


@pytest.mark.parametrize("order", ["automatic", "zero first", "zero last"])
def test_trajectory_of_a_peft_loop(tmp_path: Path, order: str) -> None:
    """15 steps: loss term, clipping, importance, masks and optimizer, without a call by the user."""
    clip = 0.01 if order == "automatic" else None  # which Lightning leaves to the user otherwise
    module = Regression(order)
    lora = LoraCallback(AdaLoraConfig(**REGRESSION), module="net")
    snapshots: list[dict[str, Tensor]] = []

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.on_train_batch_end(trainer, pl_module)

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            state = adapter_state_dict(pl_module.net)
            snapshots.append({k: v.clone() for k, v in state.items()})

    loader = DataLoader(regression_data(), batch_size=12)
    make_trainer(tmp_path, lora, Keep(), max_epochs=3, gradient_clip_val=clip).fit(module, loader)
    assert len(snapshots) == 16

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Regression().net

        def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=nn.functional.mse_loss(self.net(x), y))

    options = {**REGRESSION, "target_modules": ["net.0", "net.2"]}
    theirs = adalora_of_peft(WithLoss(), **options)
    names = {k: short_name(k).removeprefix("net.") for k in trainable(theirs)}
    with torch.no_grad():
        for name, p in trainable(theirs).items():
            p.copy_(snapshots[0][names[name]])
    optimizer = torch.optim.AdamW(trainable(theirs).values(), lr=0.05)
    clipped = 0
    for step, batch in enumerate(list(loader) * 3, start=1):
        theirs.base_model(*batch).loss.backward()
        if clip:
            clipped += int(nn.utils.clip_grad_norm_(trainable(theirs).values(), clip) > clip)
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        tensors = {names[name]: p.detach() for name, p in trainable(theirs).items()}
        assert_close_state(tensors, snapshots[step], 1e-10)
    assert clip is None or clipped > 5
    assert sum(int((v != 0).sum()) for k, v in tensors.items() if k.endswith("lora_E")) == 4


def test_two_optimizers_with_a_part_each(tmp_path: Path) -> None:
    """A step of the schedule is a batch; each optimizer's own gradients are measured."""

    class Parts(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.net[i].parameters(), lr=0.05) for i in (0, 2)]

    class Scores(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            self.last = lora._rank_schedule.allocator.state()["sensitivity"] or self.last

    states, scores = [], Scores()
    for module in (Regression("zero first"), Parts("manual")):
        lora = LoraCallback(AdaLoraConfig(**REGRESSION), module="net")
        loader = DataLoader(regression_data(), batch_size=12)
        torch.manual_seed(0)
        make_trainer(tmp_path, lora, scores, max_epochs=3).fit(module, loader)
        assert lora._rank_schedule.allocator.steps == 15
        states.append({**adapter_state_dict(module.net), "scores": scores.last["0.lora_A"]})
    assert_close_state(*states, 1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(tmp_path: Path, fused: bool) -> None:
    """16-mixed: the term is not scaled with the loss, and a step left out is not measured."""

    class Scaled(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if self.global_step == 2 and self.with_inf else 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    states = []
    for scale in (1.0, 2.0**10, None):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        # bf16, the CPU's half precision; what is tested is the scaler.
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = scaler
        seed_everything(4, verbose=False)
        module = Scaled()
        module.with_inf = scaler is not None
        lora = LoraCallback(AdaLoraConfig(**CONFIG, init_lora_weights=False), nonfinite="ignore")
        make_trainer(tmp_path, lora, Watch(lora), max_epochs=2, plugins=[plugin]).fit(
            module, Data()
        )
        allocator = lora._rank_schedule.allocator
        assert allocator.steps == 8
        assert allocator.settled
        assert total_rank(module) == 6
        state = adapter_state_dict(module)
        assert all(t.isfinite().all() for t in state.values())
        states.append(state)
    assert_close_state(states[0], states[1], 1e-6)
    assert any((states[0][key] - states[2][key]).abs().max() > 1e-3 for key in states[0])


def test_averaged_weights_keep_the_final_ranks(tmp_path: Path) -> None:
    lora = LoraCallback(AdaLoraConfig(**CONFIG, tfinal=2))
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    module = Net()
    make_trainer(tmp_path, lora, averaging, max_epochs=2).fit(module, Data())
    assert total_rank(module) == 6


def test_a_frozen_adapter_has_no_schedule(tmp_path: Path, capsys: Any) -> None:
    frozen = LoraCallback(
        AdaLoraConfig(**CONFIG, tinit=40, init_lora_weights=False),
        adapter_name="frozen",
        trainable=False,
    )
    module = Net()
    make_trainer(tmp_path, frozen, LoraCallback(r=2)).fit(module, Data())
    assert frozen._rank_schedule.allocator is None
    assert "rank of" not in (text := capsys.readouterr().out)  # the line that a schedule ends with
    assert "not final" not in text
    assert all(adapter.lora_E.all() for adapter in adalora_adapters(module, "frozen").values())


def test_other_adapter_types_have_no_allocation(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, LoraCallback(r=2), saver).fit(Net(), Data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["lora_lightning"]["adapters"]["default"]["rank_allocation"] is None


def allocated(folder: Path, devices: int) -> list[Any]:
    """Adapters and masks after three epochs on this process's share of every batch."""
    torch.manual_seed(0)
    module = Regression()
    lora = LoraCallback(AdaLoraConfig(**REGRESSION), module="net")
    way = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    options = {"max_epochs": 3, "gradient_clip_val": 0.01, "use_distributed_sampler": False}
    mine = list(range(int(os.environ.get("LOCAL_RANK", 0)), 60, devices))
    loader = DataLoader(regression_data(), batch_size=12 // devices, sampler=mine)
    make_trainer(folder, lora, **way, **options).fit(module, loader)
    return [adapter_tensors(module), lora._rank_schedule.allocator.masks]


@pytest.mark.slow
def test_two_processes_allocate_the_same(tmp_path: Path) -> None:
    """On both, and the same as one process with their common batches."""
    alone = allocated(tmp_path, 1)
    first, second = on_processes(2, allocated, tmp_path, 2)
    for part in (0, 1):
        assert_same_state(first[part], second[part])
        assert_close_state(alone[part], first[part], 1e-10)


class Kill(Callback):
    """End the run after an epoch, as a crash would, without telling the Trainer its length."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epoch


def fit(
    folder: Path, *callbacks: Callback, ckpt_path: Any = None, epochs: int = 6, **options: Any
) -> tuple[dict[str, Tensor], LoraCallback]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    schedule = {"tinit": 3, "tfinal": 6, "deltaT": 3, "lora_dropout": 0.2}
    lora = LoraCallback(AdaLoraConfig(**CONFIG, **schedule))
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    module = Net()
    trainer = make_trainer(folder, lora, *callbacks, saver, max_epochs=epochs, **options)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    state = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{k}": v for i, s in state.items() for k, v in s.items() if torch.is_tensor(v)}
    return {**module.state_dict(), **moments}, lora


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(tmp_path: Path, accumulate: int) -> None:
    """Before anything was allocated, in the middle of the schedule, and when ranks are final."""
    options = {"accumulate_grad_batches": accumulate, "epochs": 6 * accumulate}
    straight, lora = fit(tmp_path / "straight", **options)
    assert lora._rank_schedule.allocator.settled
    for epoch in (1, 3, 5) if accumulate == 1 else (6,):
        _, broken = fit(tmp_path / "broken", Kill(epoch), **options)
        assert broken._rank_schedule.allocator.steps == 4 * epoch // accumulate
        resumed, lora = fit(
            tmp_path, ckpt_path=tmp_path / f"broken/epoch={epoch - 1}.ckpt", **options
        )
        assert_same_state(straight, resumed)
        assert lora._rank_schedule.allocator.steps == 24


def test_negative_control_without_the_allocation_differs(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path / "straight")
    fit(tmp_path / "broken", Kill(3))
    path = tmp_path / "broken/last.ckpt"
    saved = torch.load(path, weights_only=True)
    state = saved["lora_lightning"]["adapters"]["default"]["rank_allocation"]
    assert state["steps"] == 12
    assert not state["settled"]
    saved["lora_lightning"]["adapters"]["default"]["rank_allocation"] = None
    del saved["lora_lightning"]["content"]  # the hashes, which would notice this
    torch.save(saved, path)
    resumed, _ = fit(tmp_path / "broken", ckpt_path=path)
    assert any(not torch.equal(straight[key], resumed[key]) for key in straight)


def test_a_checkpoint_by_a_callback_before_ours(tmp_path: Path) -> None:
    """At the end of a batch, when we have not counted it yet."""

    class Early(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    lora = LoraCallback(AdaLoraConfig(**CONFIG, tinit=3, tfinal=6, deltaT=3, lora_dropout=0.2))
    seed_everything(7, verbose=False)
    make_trainer(tmp_path, Early(), lora, max_epochs=6).fit(Net(), Data())
    saved = torch.load(tmp_path / "early.ckpt", weights_only=True)
    state = saved["lora_lightning"]["adapters"]["default"]["rank_allocation"]
    assert state["steps"] == 12
    assert not all(mask.all() for mask in state["masks"].values())
    for path, mask in state["masks"].items():
        assert not saved["state_dict"][f"{path}.adapters.default.lora_E"][~mask].any()


def test_a_longer_run_keeps_the_ranks(tmp_path: Path) -> None:
    """Resumed for more epochs, and continued by a second fit of the same Trainer."""
    _, first = fit(tmp_path)
    masks = first._rank_schedule.allocator.masks
    _, second = fit(tmp_path, ckpt_path="last", epochs=8)
    assert second._rank_schedule.allocator.settled
    assert second._rank_schedule.allocator.total_step == 24
    assert_same_state(masks, second._rank_schedule.allocator.masks)

    lora = LoraCallback(AdaLoraConfig(**CONFIG))
    module = Net()
    trainer = make_trainer(tmp_path, lora, max_epochs=2)
    trainer.fit(module, Data())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, Data())
    assert lora._rank_schedule.allocator.steps == 16
    assert total_rank(module) == 6
