"""Traps of Lightning and torch for adapters, each with the statement of the trap.

In the order of events: setup, checkpoints, optimizers, command line, several calls, compilation.
What cannot occur has a test that shows why not.
"""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.model_summary import summarize
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lora_lightning import (
    LoraCallback,
    LoraConfig,
    active_adapters,
    adapter_names,
    delete_adapter,
    inject_adapter,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    set_adapter,
)
from lora_lightning.errors import (
    AdapterMismatchError,
    AdapterStateError,
    CheckpointError,
    OptimizerError,
    TargetError,
)
from lora_lightning.training.checks.training import check_hyperparameters
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
KEYS = [
    *(f"{path}.adapters.default.{name}" for path in ("embed", "body.2") for name in ("lora_A", "lora_B")),
    *(f"head.adapters.default.module.{name}" for name in ("weight", "bias")),
]  # fmt: skip


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def trained(folder: Path, module: Any = None, **options: Any) -> tuple[Trainer, Any]:
    trainer = make_trainer(folder, LoraCallback(**OPTIONS), **options)
    module = module or Net()
    trainer.fit(module, Data())
    return trainer, module


# -- 1 order of events -----------------------------------------------------------------------------------


def test_callback_from_configure_callbacks(tmp_path: Path) -> None:
    """A module may bring the callback itself, after the Trainer was made."""

    class Brings(NetWithoutOptimizer):
        def configure_callbacks(self) -> Any:
            return [LoraCallback(**OPTIONS)]

    module, trainer = Brings(), make_trainer(tmp_path)
    trainer.fit(module, Data())
    assert adapter_names(module) == ["default"]
    assert type(trainer.optimizers[0]) is torch.optim.AdamW


def test_checkpoint_callbacks_come_last(tmp_path: Path) -> None:
    """Lightning puts them behind LoraCallback, whatever the list says: they see the final state."""
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path), LoraCallback(**OPTIONS))
    kinds = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds == ["LoraCallback", "ModelCheckpoint"]


@pytest.mark.parametrize("kind", [Net, BuiltInSetup, BuiltInConfigureModel])
def test_exception_without_teardown(tmp_path: Path, kind: type) -> None:
    """After an exception Lightning calls no Callback.teardown: the next fit finds what is left."""

    class Fails(kind):  # type: ignore[misc,valid-type]
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fails and batch_idx == 2:
                raise ValueError("the user's own")
            return super().training_step(batch, batch_idx)

    module, trainer = Fails(), make_trainer(tmp_path, LoraCallback(**OPTIONS))
    with pytest.raises(ValueError, match="the user's own"):
        trainer.fit(module, Data())
    module.fails = False
    trainer.fit(module, Data())
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(saved(tmp_path / "a.ckpt")["state_dict"]) == sorted(KEYS)


def test_configure_model_is_called_again_and_again(tmp_path: Path) -> None:
    """Once for every entry point: what has grown stays, also where the user's body runs twice."""

    class Counts(BuiltInConfigureModel):
        calls = 0

        def configure_model(self) -> None:
            self.calls += 1
            super().configure_model()

    trainer, module = trained(tmp_path, Counts())
    before = copy.deepcopy(module.state_dict())
    trainer.validate(module, Data(), verbose=False)
    trainer.test(module, Data(), verbose=False)
    module.configure_model()
    assert module.calls == 4
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_hook_that_is_not_overridden_stays_so(tmp_path: Path) -> None:
    """Lightning calls configure_model and others only where they are overridden."""
    _, module = trained(tmp_path)
    assert not is_overridden("configure_model", module)


# -- 2 checkpoints -----------------------------------------------------------------------------------------


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


class WithHparams(Net):
    """Keeps its arguments; one of them is a class, which torch does not load."""

    def __init__(self, width: int = 16, scale: float = 1.0, act: Any = None) -> None:
        super().__init__(width)
        self.save_hyperparameters(ignore=[] if act else ["act"])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


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


# -- 3 optimizers ------------------------------------------------------------------------------------------


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
    assert not torch.equal(module.head.adapters["default"].module.bias, module.head.bias)


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
    assert [n for n, p in module.named_parameters() if p.requires_grad] == KEYS
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


# -- 4 command line ----------------------------------------------------------------------------------------

QUIET = [
    "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--trainer.max_epochs=1",
]  # fmt: skip
SHORT = ["--trainer.callbacks+=LoraCallback", "--trainer.callbacks.r=2"]


def cli(verb: str, *arguments: str, model: type = Net, **options: Any) -> LightningCLI:
    """LightningCLI as it is, with no section for LoRA."""
    return LightningCLI(
        model, Data, args=[verb, *QUIET, *arguments], save_config_callback=None,
        seed_everything_default=0, **options,
    )  # fmt: skip


def lora(made: LightningCLI) -> LoraCallback:
    return next(c for c in made.trainer.callbacks if isinstance(c, LoraCallback))  # type: ignore[attr-defined]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])  # LightningCLI objects to pytest's own arguments
    return tmp_path


def test_plain_cli_with_a_yaml_entry(in_folder: Path) -> None:
    (in_folder / "a.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: lora_lightning.LoraCallback\n"
        "      init_args: {r: 2, target_modules: [embed, body.2], nonfinite: skip}\n"
    )
    made = cli("fit", "--config", "a.yaml")
    assert lora(made).config.target_modules == ["embed", "body.2"]
    assert lora(made).guard.policy == "skip"
    assert adapter_names(made.model) == ["default"]


def test_plain_cli_with_short_names(in_folder: Path) -> None:
    assert lora(cli("fit", *SHORT)).config.r == 2
    nested = ["--trainer.callbacks+=LoraCallback", "--trainer.callbacks.config=LoraConfig"]
    assert lora(cli("fit", *nested, "--trainer.callbacks.config.r=3")).config.r == 3


@pytest.mark.filterwarnings("ignore:.*will be overridden by .LightningCLI")
@pytest.mark.parametrize("kind", [Net, NetWithoutOptimizer])
def test_plain_cli_builds_the_optimizer_before_the_trainer(in_folder: Path, kind: type) -> None:
    """`--optimizer` is made from the base's parameters, when no adapter exists yet."""
    made = cli(
        "fit", *SHORT, "--optimizer=torch.optim.Adam", "--optimizer.lr=0.01", "--lr_scheduler=ExponentialLR",
        "--lr_scheduler.gamma=0.5", model=kind,
    )  # fmt: skip
    (optimizer,) = made.trainer.optimizers
    names = {id(p): name for name, p in made.model.named_parameters()}
    held = [names[id(p)] for p in optimizer.param_groups[0]["params"]]
    assert len(held) == 6
    assert all(".adapters." in name for name in held)
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert all(made.model.state_dict()[name].any() for name in held)


@pytest.mark.filterwarnings("ignore:.*will be overridden by .LightningCLI")
def test_plain_cli_with_a_model_that_is_not_built_yet(in_folder: Path) -> None:
    """The CLI's own limit (pytorch-lightning#19110): leave --optimizer out, LoraCallback has one."""
    with pytest.raises(ValueError, match="empty parameter list"):
        cli("fit", *SHORT, "--optimizer=torch.optim.Adam", model=BuiltInConfigureModel)
    cli("fit", *SHORT, model=BuiltInConfigureModel)


def test_plain_cli_resumes_and_evaluates(in_folder: Path) -> None:
    """It reads the file with weights_only=True whatever one says, and takes hparams out of it."""
    cli("fit", *SHORT, model=WithHparams)
    (path,) = in_folder.rglob("*.ckpt")
    made = cli("fit", *SHORT, "--ckpt_path", str(path), "--trainer.max_epochs=2", model=WithHparams)
    assert made.trainer.global_step == 8
    cli("test", *SHORT, "--ckpt_path", str(path), model=WithHparams)
    other = ["--trainer.callbacks+=LoraCallback", "--trainer.callbacks.r=3"]
    with pytest.raises(AdapterMismatchError, match=r"r: 2 in the checkpoint, 3 here \(lora\.r\)"):
        cli("validate", *other, "--ckpt_path", str(path), model=WithHparams)


def test_the_config_that_the_cli_saves_can_be_read(in_folder: Path) -> None:
    """SaveConfigCallback dumps every option; what is no plain value breaks the run."""
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    LightningCLI(Net, Data, args=["fit", *QUIET, *SHORT, *logger], seed_everything_default=0)
    (path,) = in_folder.rglob("config.yaml")
    made = cli("fit", "--config", str(path), *QUIET)
    assert lora(made).config == LoraConfig(r=2)


# -- 5 several calls ---------------------------------------------------------------------------------------


def test_same_trainer_with_a_second_module(tmp_path: Path) -> None:
    """What is remembered of the first must not be taken for the second."""
    trainer, first = trained(tmp_path)
    before = copy.deepcopy(first.state_dict())
    second = Net()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(second, Data())
    assert all(second.state_dict()[key].any() for key in KEYS)
    assert all(torch.equal(before[key], value) for key, value in first.state_dict().items())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    state = saved(tmp_path / "b.ckpt")["state_dict"]
    assert sorted(state) == sorted(KEYS)
    assert all(torch.equal(state[key], second.state_dict()[key]) for key in KEYS)


def test_a_trainer_without_the_callback(tmp_path: Path) -> None:
    """It knows of no adapters: the base is missing in the file, and Lightning names the callback."""
    saver = ModelCheckpoint(tmp_path, filename="a")
    make_trainer(tmp_path, LoraCallback(**OPTIONS), saver).fit(Net(), Data())
    with pytest.raises(RuntimeError, match="Missing key"):
        make_trainer(tmp_path).validate(Net(), Data(), ckpt_path=tmp_path / "a.ckpt")
    lax = Net()
    lax.strict_loading = False  # then nothing is refused
    with pytest.warns(UserWarning, match=r"add the following callbacks: .*LoraCallback.*default"):
        make_trainer(tmp_path).validate(lax, Data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


class Compiled(Net):
    """Two of its children are what torch.compile returned, a target and a trained copy among them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")  # type: ignore[assignment]
        self.head = torch.compile(self.head, backend="eager")  # type: ignore[assignment]


def go(kind: type, folder: Path, epochs: int, ckpt_path: Any = None) -> dict[str, Any]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    module, saver = kind(), ModelCheckpoint(folder, save_last=True)
    trainer = make_trainer(folder, LoraCallback(**OPTIONS), saver, max_epochs=epochs)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    return {k.replace("_orig_mod.", ""): v for k, v in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
@pytest.mark.parametrize("resumes", [Net, Compiled])
@pytest.mark.parametrize("starts", [Net, Compiled])
def test_compiled_submodules(tmp_path: Path, starts: type, resumes: type) -> None:
    """`self.net = torch.compile(self.net)` puts `_orig_mod.` into every key and path."""
    torch._dynamo.reset()
    straight = go(Net, tmp_path / "straight", 3)
    go(starts, tmp_path / "broken", 1)
    content = saved(tmp_path / "broken/last.ckpt")
    assert sorted(content["state_dict"]) == sorted(KEYS)
    assert not any("_orig_mod" in name for name in content["lora_lightning"]["base"])
    resumed = go(resumes, tmp_path / "broken", 3, "last")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_twin_names_as_they_are_would_not_be_found(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lora_lightning.layers.traversal.WRAPPED", ())
    with pytest.raises(TargetError, match=r"'head' matched nothing.*_orig_mod"):
        trained(tmp_path, Compiled())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_compiled_after_growth_and_as_a_folder(tmp_path: Path) -> None:
    """Compiled modules in adapted ones, adapted ones compiled: files and folders fit both."""
    torch._dynamo.reset()
    _, module = trained(tmp_path, Compiled())
    module.embed = torch.compile(module.embed, backend="eager")
    trainer, module = trained(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(saved(tmp_path / "a.ckpt")["state_dict"]) == sorted(KEYS)
    save_adapter(module, tmp_path / "folder")
    assert "_orig_mod" not in (tmp_path / "folder/adapter_config.json").read_text()
    x = torch.randn(4, 8)
    expected = module.eval()(x)
    for kind in (Net, Compiled):
        for path in ("a.ckpt", "folder"):
            fresh = kind()
            load_adapter(fresh, tmp_path / path)
            assert torch.equal(fresh.eval()(x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_compiled_as_a_whole(tmp_path: Path) -> None:
    """`trainer.fit(torch.compile(module))`; self.log cannot be compiled, with or without adapters."""
    torch._dynamo.reset()

    class Quiet(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    module, trainer = Quiet(), make_trainer(tmp_path, LoraCallback(**OPTIONS))
    trainer.fit(torch.compile(module, backend="eager"), Data())  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(saved(tmp_path / "a.ckpt")["state_dict"]) == sorted(KEYS)
    assert all(module.state_dict()[key].any() for key in KEYS)


def test_pytorch_lightning_package(tmp_path: Path) -> None:
    """Its classes are not those of `lightning`: isinstance and is_overridden fail across the two."""
    pl = pytest.importorskip("pytorch_lightning")

    class Theirs(pl.LightningModule):  # type: ignore[name-defined,misc]
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                torch.manual_seed(0)
                self.net = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def fit(folder: Path, epochs: int, ckpt_path: Any = None) -> Any:
        pl.seed_everything(5 if ckpt_path is None else 6, verbose=False)
        module = Theirs()
        saver = pl.callbacks.ModelCheckpoint(folder, save_last=True)
        trainer = pl.Trainer(
            max_epochs=epochs, default_root_dir=folder, callbacks=[LoraCallback(r=2), saver],
            logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        loader = DataLoader(Data().dataset, 16, shuffle=True)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return module

    straight = fit(tmp_path / "straight", 4)
    fit(tmp_path / "broken", 2)
    resumed = fit(tmp_path / "broken", 4, "last")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in straight.state_dict().items())
    state = saved(tmp_path / "broken/last.ckpt")["state_dict"]
    assert sorted(state) == ["net.adapters.default.lora_A", "net.adapters.default.lora_B"]
    loaded, x = load_from_checkpoint(Theirs, tmp_path / "broken/last.ckpt"), torch.randn(4, 8)
    assert torch.equal(loaded(x), straight(x))


# -- 6 gradient checkpointing ------------------------------------------------------------------------------


class Checkpointed(Net):
    """Recomputes a part of its forward in backward."""

    reentrant, whole = True, True

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)
        hidden = checkpoint(self.inside, x, use_reentrant=self.reentrant)
        return self.head(hidden)

    def inside(self, x: Tensor) -> Tensor:
        return self.body(self.norm(self.embed(x)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_gradient_checkpointing(tmp_path: Path) -> None:
    """With frozen inputs it gives no gradient: none at all is an error, some a warning."""
    with pytest.raises(AdapterStateError, match=r"does not depend on any .*use_reentrant=False"):
        trained(tmp_path, Checkpointed())
    module = Checkpointed()
    module.whole = False
    with pytest.warns(UserWarning, match=r"4 of 6 trainable tensors had no gradient.*reentrant"):
        trained(tmp_path, module)
    seed_everything(1, verbose=False)
    module = Checkpointed()
    module.reentrant = False
    trained(tmp_path, module)
    seed_everything(1, verbose=False)
    _, plain = trained(tmp_path)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in plain.state_dict().items())


# -- what users switch on ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"limit_train_batches": 2, "limit_val_batches": 1}, 2),
        ({"overfit_batches": 1}, 1),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 8),
        ({"max_steps": 3, "max_epochs": -1}, 3),
        ({"val_check_interval": 0.5, "num_sanity_val_steps": -1}, 4),
        ({"profiler": "simple", "inference_mode": False}, 4),
        ({"detect_anomaly": True}, 4),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_of_the_trainer(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    trainer, module = trained(tmp_path, **options)
    assert trainer.global_step == steps
    assert all(module.state_dict()[key].any() for key in KEYS)
    base = Net().state_dict()
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in base.items())


@pytest.mark.filterwarnings("ignore:You are trying to .self.log.* but .Trainer.barebones")
def test_barebones(tmp_path: Path) -> None:
    module = Net()
    trainer = Trainer(
        barebones=True, accelerator="cpu", max_epochs=1, callbacks=[LoraCallback(**OPTIONS)]
    )
    trainer.fit(module, Data())
    assert all(module.state_dict()[key].any() for key in KEYS)


def test_options_are_logged(tmp_path: Path) -> None:
    """Lightning logs the hyperparameters of modules and data, not those of callbacks."""
    import yaml

    def hparams(**options: Any) -> dict[str, Any]:
        logger = CSVLogger(tmp_path)
        trained(tmp_path, WithHparams(), logger=logger, **options)
        logger.save()
        file = Path(logger.log_dir) / "hparams.yaml"
        return yaml.safe_load(file.read_text()) if file.exists() else {}

    logged = hparams()
    assert (logged["width"], logged["scale"]) == (16, 1.0)
    assert logged["lora"]["default"]["r"] == 2
    assert logged["lora"]["default"]["type"] == "LORA"
    assert logged["lora"]["default"]["target_modules"] == ["embed", "body.2"]
    assert "lora" not in hparams(enable_autolog_hparams=False)


def test_model_summary(tmp_path: Path) -> None:
    _, module = trained(tmp_path)
    table = str(summarize(module, max_depth=-1))
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    kinds = {row[1]: row[2] for row in rows if len(row) > 2}
    assert kinds["embed"] == "AdaptedLinear"
    assert kinds["embed.adapters.default"] == "LoraAdapter"
    assert kinds["head.adapters.default"] == "ModulesToSaveCopy"
    assert re.search(r"^163 +Trainable params", table, re.MULTILINE)
    assert re.search(r"^499 +Non-trainable params", table, re.MULTILINE)
