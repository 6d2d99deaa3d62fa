"""Optimizers and schedules of every make: adapters in the right group, no empty run."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler

from lora_lightning import LoraCallback, LoraConfig, delete_adapter, inject_adapter, set_adapter
from lora_lightning.errors import OptimizerError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.training.optimizers import frozen_left_out
from tests.helpers.lightning_modules import (
    KEYS,
    OPTIONS,
    Data,
    Net,
    NetWithoutOptimizer,
    make_trainer,
    trained,
)
from tests.helpers.tensors import adapter_tensors


def four_groups(module: Any) -> torch.optim.Optimizer:
    parts = (module.norm, module.embed, module.body, module.head)
    groups = [{"params": p.parameters(), "lr": 1e-2 / (i + 1)} for i, p in enumerate(parts)]
    return torch.optim.AdamW(groups)


def lambda_lr(optimizer: Any) -> Any:
    return lr_scheduler.LambdaLR(
        optimizer, [lambda step, k=k: 1 / (1 + k * step) for k in range(4)]
    )  # type: ignore[misc]


def sequential_lr(optimizer: Any) -> Any:
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    rest = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return lr_scheduler.SequentialLR(optimizer, [warmup, rest], [2])


@pytest.mark.parametrize("schedule", [lambda_lr, sequential_lr])
def test_empty_groups_are_kept(tmp_path: Path, schedule: Any) -> None:
    """Schedules count the groups: one that is left without a parameter may not go."""

    class Grouped(Net):
        def configure_optimizers(self) -> Any:
            optimizer = four_groups(self)
            return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    seed_everything(1, verbose=False)
    trainer, straight = trained(tmp_path, Grouped(), max_epochs=2)
    assert [len(g["params"]) for g in trainer.optimizers[0].param_groups] == [0, 2, 2, 2]
    rates = [g["lr"] for g in trainer.optimizers[0].param_groups]
    alone = four_groups(Net())
    steps = schedule(alone)
    for _ in range(8):
        alone.step()
        steps.step()
    assert rates == [g["lr"] for g in alone.param_groups]
    seed_everything(1, verbose=False)
    trainer, _ = trained(tmp_path, Grouped())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Grouped()
    make_trainer(tmp_path, LoraCallback(**OPTIONS), max_epochs=2).fit(
        resumed, Data(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in straight.state_dict().items())


def matrices(module: Any, wanted: bool = True) -> list[nn.Parameter]:
    return [p for p in module.parameters() if (p.ndim == 2) == wanted]


needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon: torch 2.9"
)


@needs_muon
def test_muon(tmp_path: Path) -> None:
    """It refuses what is no matrix, frozen biases too, as it is made, and others as it steps."""

    class OnlyMuon(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Muon(self.parameters(), lr=1e-2)  # type: ignore[attr-defined]

    module = OnlyMuon()
    make_trainer(tmp_path, LoraCallback(r=2, target_modules=["embed", "body.2"])).fit(
        module, Data()
    )
    assert module.embed.adapters["default"].lora_B.any()

    class Matrices(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Muon(matrices(self), lr=1e-2)  # type: ignore[attr-defined]

    with pytest.raises(OptimizerError) as error:
        trained(tmp_path, Matrices())
    assert str(error.value).startswith(
        "head.adapters.default.module.bias [3] trains and is no matrix, but Muon, the only"
    )


@needs_muon
def test_muon_beside_another(tmp_path: Path) -> None:
    class Both(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            muon = torch.optim.Muon(matrices(self), lr=1e-2)  # type: ignore[attr-defined]
            return muon, torch.optim.AdamW(matrices(self, False), lr=1e-2)

    trainer, module = trained(tmp_path, Both())
    held = [[p.ndim for p in o.param_groups[0]["params"]] for o in trainer.optimizers]
    assert held == [[2] * 5, [1]]
    assert not torch.equal(module.state_dict()["head.bias"], module.head.bias)


def test_manual_optimization_with_toggled_optimizers(tmp_path: Path) -> None:
    """toggle_optimizer sets requires_grad of all that optimizers hold: the base may not wake up."""

    class Toggles(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            one = torch.optim.SGD(self.embed.parameters(), lr=0.1)
            rest = [*self.body.parameters(), *self.head.parameters()]
            return one, torch.optim.Adam(rest, lr=1e-2)

    _, module = trained(tmp_path, Toggles())
    assert [n for n, p in named_parameters(module) if p.requires_grad] == KEYS
    base = Net().state_dict()
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in base.items())
    assert all(module.state_dict()[key].any() for key in KEYS)


def test_adapters_after_the_optimizer(tmp_path: Path) -> None:
    """What is put on a module in on_train_start is in no optimizer, and would never move."""

    class Late(Net):
        def on_train_start(self) -> None:
            inject_adapter(self, LoraConfig(r=2, target_modules=["embed"]), "late")
            set_adapter(self, ["default", "late"])

    with pytest.raises(OptimizerError, match=r"in no optimizer: embed\.adapters\.late\.lora_A"):
        trained(tmp_path, Late())

    class Replaces(Net):
        def on_train_start(self) -> None:
            delete_adapter(self, "default")
            inject_adapter(self, LoraConfig(**OPTIONS))

    with pytest.raises(OptimizerError, match="a tensor that is not the module's"):
        trained(tmp_path, Replaces())


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
    "LBFGS": lambda self: torch.optim.LBFGS(self.parameters(), lr=0.01),
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
    assert all(v.abs().sum() > 0 for v in adapter_tensors(module).values())


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


class Perceptual(LightningModule):
    """Super-resolution: outputs are compared by a network that is frozen only by its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
            self.features = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        y = self.net(x + torch.randn_like(x))
        return (self.features(y) - self.features(x)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.02)


NET = ["net.0", "net.2"]
FEATURES = ["features.0", "features.2"]
LEFT_OUT: dict[str, tuple[dict[str, Any], list[str]]] = {  # options, where adapters train
    "default": ({}, NET),
    "all layers": ({"target_modules": "all-layers"}, NET),
    "biases": ({"bias": "all"}, NET),
    "DoRA": ({"use_dora": True}, NET),
    "by name": ({"target_modules": [*NET, *FEATURES]}, [*NET, *FEATURES]),
    "by its module": ({"module": "features"}, FEATURES),  # where the optimizer has nothing of it
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_the_optimizers_leave_out_stays_as_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, trains = LEFT_OUT[name]
    module, fresh = Perceptual(), Perceptual()
    trainer = make_trainer(tmp_path, LoraCallback(r=2, **options), max_epochs=3)
    trainer.fit(module, Data())
    names = {id(p): n for n, p in module.named_parameters()}
    (optimizer,) = trainer.optimizers
    held = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
    layers = {n.partition(".adapters")[0].removesuffix(".bias") for n in held}
    assert layers == {*trains}
    x = torch.randn(5, 8)
    moved = not torch.equal(module.eval().features(x), fresh.features(x))
    assert moved == (trains != NET)
    assert all(p.grad is None for n, p in module.features.named_parameters() if trains == NET)
    out = " ".join(capsys.readouterr().out.split())
    said = "in no optimizer that configure_optimizers returns, so that adapters there do not train"
    assert (f"{said}: features.0, features.2;" in out) == (trains == NET)


def test_what_was_left_out_is_in_checkpoints_and_resumes(tmp_path: Path) -> None:
    """As the next run finds it, whose optimizers may be others."""
    straight = make_trainer(tmp_path / "a", LoraCallback(r=2), max_epochs=2)
    module = Perceptual()
    seed_everything(1)
    straight.fit(module, Data())
    seed_everything(1)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    make_trainer(tmp_path, LoraCallback(r=2), saver, max_epochs=1).fit(Perceptual(), Data())
    again = Perceptual()
    resumed = make_trainer(tmp_path, LoraCallback(r=2), max_epochs=2)
    resumed.fit(again, Data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for key, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    both = Perceptual()
    both.configure_optimizers = lambda: torch.optim.Adam(both.parameters())  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, LoraCallback(r=2), max_epochs=1)
    trainer.fit(both, Data())
    assert sum(len(g["params"]) for o in trainer.optimizers for g in o.param_groups) == 8
    both.configure_optimizers = lambda: torch.optim.Adam(both.net.parameters())  # type: ignore[method-assign]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(both, Data())
    assert sum(len(g["params"]) for o in trainer.optimizers for g in o.param_groups) == 4


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


def half_frozen() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    return layer


def held(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_other_threads_are_not_concerned() -> None:
    original = Optimizer.add_param_group
    inside, made = Event(), Event()
    found: list[int] = []

    def narrowed() -> None:
        layer = half_frozen()
        with frozen_left_out() as meant_for:
            inside.set()
            made.wait(10)
            found.append(len(held(SGD(layer.parameters()))))
        found.append(len(meant_for))

    thread = Thread(target=narrowed)
    thread.start()
    inside.wait(10)
    assert Optimizer.add_param_group is not original  # it is at work
    assert len(held(SGD(half_frozen().parameters()))) == 2
    made.set()
    thread.join()
    assert found == [1, 1]
    assert Optimizer.add_param_group is original


def test_one_after_the_other() -> None:
    """Two modules that are configured at a time: the method of torch is back in the end."""
    original = Optimizer.add_param_group
    first_inside, go_on = Event(), Event()

    def first() -> None:
        with frozen_left_out():
            first_inside.set()
            go_on.wait(10)

    def second() -> None:
        with frozen_left_out():
            pass

    threads = [Thread(target=first)]
    threads[0].start()
    first_inside.wait(10)
    threads.append(Thread(target=second))
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()  # it waits
    go_on.set()
    for thread in threads:
        thread.join()
    assert Optimizer.add_param_group is original
