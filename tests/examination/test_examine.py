"""`examine` on a module that keeps its promises, and on one broken twin for each promise."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lora_lightning import ConfigError, LoraCallback, LoraConfig, examine
from lora_lightning.examination.examine import finding
from lora_lightning.examination.promises import PROMISES
from lora_lightning.examination.recipe import Recipe, quiet
from lora_lightning.examination.result import Examination, Finding
from lora_lightning.examination.runs import Runs
from lora_lightning.utilities.rng import random_state
from tests.helpers.lightning_modules import BuiltInConfigureModel, BuiltInSetup, Data, Net
from tests.helpers.messages import message_of
from tests.helpers.zoo.data import Points
from tests.helpers.zoo.supervised import Classifier, MaxNorm, MeanTeacher, SpectralNorm

CPU = {"accelerator": "cpu"}
ALL = ["trains", *PROMISES]


class Random(Net):
    """Dropout while it trains, so that the order of random numbers matters."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()


def lora(kind: type[LoraCallback] = LoraCallback, **options: Any) -> LoraCallback:
    return kind(**{"r": 2, "lora_dropout": 0.1, **options})


def found(
    name: str, module: Any, callback: LoraCallback, folder: Path, data: Any = Data
) -> Finding:
    """What is found of one promise."""
    recipe = Recipe(module, data, (callback,), folder, 4, CPU)
    with quiet():
        return finding(name, Runs(recipe))


@pytest.mark.slow
def test_a_module_that_keeps_every_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    before = str(random_state())
    callback = lora(modules_to_save=["head"])
    examination = examine(Net, Data, callback, trainer_options=CPU)
    assert [row.name for row in examination.rows] == ALL
    assert {row.name: row.reason for row in examination.rows if row.holds is not True} == {}
    assert examination.holds
    assert str(random_state()) == before
    assert list(tmp_path.iterdir()) == []
    assert callback.log is None  # a recipe: only copies of it ran
    shown = capsys.readouterr().out
    assert shown.count("│ yes   │") == len(ALL)
    for words in ("8 optimizer steps", "resume within an epoch", "validate, test, predict"):
        assert words in shown


def test_what_cannot_be_examined_says_why(capsys: Any) -> None:
    class Within(Net):
        def __init__(self, width: int) -> None:
            super().__init__(width)

    batches = {"batches": 1, "trainer_options": CPU, "show": False}
    examination = examine(lambda: Within(8), Data, lora(init_lora_weights=False), **batches)
    reasons = {row.name: row.reason for row in examination.rows if row.holds is None}
    assert examination.holds
    assert capsys.readouterr().out == ""
    assert set(reasons) == {
        "starts as the base",
        "resume within an epoch",
        "evaluation in a fresh process",
        "load_from_checkpoint",
    }
    assert "as was asked for" in reasons["starts as the base"]
    assert "no middle" in reasons["resume within an epoch"]
    assert "Define make_module and make_data by name" in reasons["evaluation in a fresh process"]
    assert "call self.save_hyperparameters()" in reasons["load_from_checkpoint"]


@pytest.mark.slow
def test_what_the_module_moves_itself_is_named() -> None:
    folder = {"trainer_options": CPU, "show": False}
    row = examine(SpectralNorm, Points, lora(), **folder)["base untouched"]
    assert row.holds
    assert row.reason.startswith("the module itself moves network.0.parametrizations.weight.0._u")
    assert row.reason.endswith("(43 numbers); all else as in a fresh module")


def test_a_run_that_is_refused_or_fails() -> None:
    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise KeyError("my own mistake")

    for module, callback, words in (
        (Net, lora(target_modules=["nothing"]), "TargetError: "),
        (Failing, lora(), "KeyError: 'my own mistake'"),
    ):
        examination = examine(module, Data, callback, trainer_options=CPU, show=False)
        assert not examination.holds
        assert examination["trains"].holds is False
        assert examination["trains"].reason.startswith(words)
        assert {row.holds for row in examination.rows[1:]} == {None}


def test_wrong_arguments() -> None:
    module = Net()
    for arguments, words in (
        ((module, Data, lora()), "make_module is a Net; give a function"),
        ((Net, Data(), lora()), "make_data is a Data; give a function"),
        ((Net, None, lora()), "make_data is a NoneType; give a function"),
        ((Net, Data, LoraConfig(r=2)), "given ['LoraConfig'] as its callbacks"),
        ((lora(), Net, Data), "given ['class Data'] as its callbacks"),
        ((lambda: module, Data, lora()), "the same module twice"),
        ((lambda: 3, Data, lora()), "make_module returned a int"),
        ((Net, Data, []), "no LoraCallback"),
    ):
        assert words in message_of(ConfigError, examine, *arguments, show=False)
    assert "(batches)" in message_of(ConfigError, examine, Net, Data, lora(), batches=0)
    examination = Examination((Finding("trains", True, ""),))
    assert "Did you mean 'trains'?" in message_of(ConfigError, examination.__getitem__, "train")


class Timed(BuiltInConfigureModel):
    """Builds its layers late, and logs what no two runs have alike."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("time", time.perf_counter())
        return super().training_step(batch, batch_idx)


class NoTestData(Data):
    def test_dataloader(self) -> Any:
        raise ValueError("there are none")


@pytest.mark.slow
def test_a_base_that_the_trainer_casts() -> None:
    options = {**CPU, "precision": "bf16-true"}
    found = examine(Net, Data, lora(), trainer_options=options, show=False)
    assert {row.name: row.reason for row in found.rows if row.holds is not True} == {}


@pytest.mark.slow
def test_layers_that_are_built_later() -> None:
    found = examine(Timed, NoTestData, lora(), trainer_options=CPU, show=False)
    assert {row.name: row.reason for row in found.rows if row.holds is not True} == {}
    assert found["base untouched"].reason.startswith("all 11 tensors")
    assert (
        "but for what no two runs have alike: metric time" in found["resume within an epoch"].reason
    )
    assert found["evaluation by ckpt_path"].reason == "validate, predict"  # as without adapters


class LateTeacher(BuiltInSetup):
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not hasattr(self, "teacher"):
            self.teacher = copy.deepcopy(self.body).requires_grad_(False)

    def on_train_batch_end(self, *args: Any) -> None:
        for student, teacher in zip(self.body.parameters(), self.teacher.parameters(), strict=True):
            teacher.data.lerp_(student.data, 0.5)


def test_a_teacher_that_setup_builds_is_seen(tmp_path: Path) -> None:
    row = found("what moves still moves", LateTeacher, lora(), tmp_path)
    assert row.holds, row.reason
    assert row.reason.startswith("teacher.")


def test_layers_that_load_from_checkpoint_does_not_build(tmp_path: Path) -> None:
    row = found("load_from_checkpoint", BuiltInSetup, lora(), tmp_path)
    assert row.holds is None
    assert row.reason.startswith("where setup() builds layers, load_from_checkpoint has none: ")


@pytest.mark.slow
def test_loaders_in_place_of_a_data_module() -> None:
    for make_data in (Data().train_dataloader, OwnLoaders.nothing):
        module = Net if make_data is not OwnLoaders.nothing else OwnLoaders
        examination = examine(module, make_data, lora(), trainer_options=CPU, show=False)
        wrong = {row.name: row.reason for row in examination.rows if row.holds is False}
        assert wrong == {}
        assert examination["evaluation by ckpt_path"].holds


class OwnLoaders(Net):
    @staticmethod
    def nothing() -> None:
        return None

    def train_dataloader(self) -> Any:
        return Data().train_dataloader()

    def val_dataloader(self) -> Any:
        return Data().val_dataloader()


# -- broken twins ----------------------------------------------------------------------------------


class StartsElsewhere(LoraCallback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for name, parameter in pl_module.named_parameters():
            if "lora_B" in name:
                nn.init.ones_(parameter)


class Still(MeanTeacher):
    """Its teacher follows the base's parameters by name, which do not train."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        own = dict(self.network.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            if name in own and "adapters" not in name:
                parameter.data.lerp_(own[name].data, 0.1)


class MovesBase(LoraCallback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        pl_module.embed.weight.data[0, 0] += 1e-6


class Deaf(LoraCallback):
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        dict(pl_module.named_parameters())["head.adapters.default.lora_A"].grad = None


class HoldsOther(LoraCallback):
    """Exchanges what the optimizer holds, and is back before the callback's own check."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        group = trainer.optimizers[0].param_groups[0]
        self.group, self.right = group, group["params"]
        group["params"] = self.wrong(self.right, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        self.group["params"] = self.right
        super().on_train_batch_start(*args)

    def wrong(self, right: list[Any], module: Any) -> list[Any]:
        raise NotImplementedError


class HoldsLess(HoldsOther):
    def wrong(self, right: list[Any], module: Any) -> list[Any]:
        return right[1:]


class HoldsTwice(HoldsOther):
    def wrong(self, right: list[Any], module: Any) -> list[Any]:
        return [*right, right[0]]


class HoldsBase(HoldsOther):
    def wrong(self, right: list[Any], module: Any) -> list[Any]:
        return [*right, module.embed.weight]


class Writing(LoraCallback):
    """Has `change` done to each checkpoint before it is written."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        writer: Any = trainer.strategy.checkpoint_io
        real = writer.save_checkpoint

        def save(checkpoint: Any, *args: Any, **kwargs: Any) -> None:
            checkpoint["state_dict"] = self.change(dict(checkpoint["state_dict"]), pl_module)
            real(checkpoint, *args, **kwargs)

        writer.save_checkpoint = save

    def change(self, state: dict[str, Tensor], module: LightningModule) -> dict[str, Tensor]:
        raise NotImplementedError


class DropsBuffer(Writing):
    def change(self, state: dict[str, Tensor], module: LightningModule) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if not name.endswith("._u")}


class WritesBase(Writing):
    def change(self, state: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
        return {**state, "embed.weight": module.embed.weight.data}


class WritesOlder(Writing):
    def change(self, state: dict[str, Tensor], module: LightningModule) -> dict[str, Tensor]:
        return {name: 0.999 * value for name, value in state.items()}


class DrawsWhenSaving(LoraCallback):
    def on_save_checkpoint(self, *args: Any) -> None:
        torch.rand(1)


class ForgetsRandomState(LoraCallback):
    """Goes on from other random numbers than were saved."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_start(trainer, *args)
        if trainer.ckpt_path:
            torch.rand(1)


class ForgetsMomentum(LoraCallback):
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        for state in checkpoint["optimizer_states"][0]["state"].values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])


class LoadsOtherwise(LoraCallback):
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        for name, parameter in pl_module.named_parameters():
            if "lora_B" in name:
                parameter.data *= 1.001


class OfThisProcess(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]) + os.getpid()


class OfThisTrainer(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]) + len(self.trainer.callbacks)


class OfItsCallback(Net):
    """Evaluates otherwise where it was loaded without a callback."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        callbacks = [c for c in self.trainer.callbacks if isinstance(c, LoraCallback)]
        return self(batch[0]) + len(callbacks)


TWINS: dict[str, tuple[str, Any, type[LoraCallback], str]] = {
    "starts elsewhere": ("starts as the base", Net, StartsElsewhere, "validate: val_loss"),
    "moves the base": ("base untouched", Net, MovesBase, "embed.weight (128 numbers)"),
    "no gradient": ("gradients reach every adapter", Net, Deaf, "head.adapters.default.lora_A"),
    "holds less": ("optimizers hold exactly what trains", Net, HoldsLess, "in none: "),
    "holds more": ("optimizers hold exactly what trains", Net, HoldsBase, "beside: embed.weight"),
    "holds twice": ("optimizers hold exactly what trains", Net, HoldsTwice, "twice in one: "),
    "drops a buffer": ("checkpoint complete", SpectralNorm, DropsBuffer, "not in it: "),
    "writes the base": ("checkpoint complete", Net, WritesBase, "though unchanged: embed.weight"),
    "writes other values": ("checkpoint complete", Net, WritesOlder, "not in it: "),
    "draws when saving": ("saving changes nothing", Net, DrawsWhenSaving, "values differ: "),
    "forgets random state": ("resume at an epoch's end", Net, ForgetsRandomState, "values differ"),
    "forgets it within": ("resume within an epoch", Net, ForgetsRandomState, "values differ: "),
    "forgets momentum": ("resume within an epoch", Classifier, ForgetsMomentum, "values differ: "),
    "loads otherwise": ("evaluation by ckpt_path", Net, LoadsOtherwise, "validate: val_loss"),
    "of this Trainer": ("evaluation by ckpt_path", OfThisTrainer, LoraCallback, "predict: "),
    "of this process": ("evaluation in a fresh process", OfThisProcess, LoraCallback, "predict: "),
    "of its callback": ("load_from_checkpoint", OfItsCallback, LoraCallback, "predict: "),
}


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS)
def test_every_promise_can_be_found_broken(twin: str, tmp_path: Path) -> None:
    name, module, callback, words = TWINS[twin]
    data: Callable[[], Any] = Data if issubclass(module, Net) else Points
    row = found(name, module, lora(callback), tmp_path, data)
    assert row.holds is False, row
    assert words in row.reason


def test_every_promise_has_a_broken_twin() -> None:
    assert {name for name, *_ in TWINS.values()} == {*PROMISES} - {"what moves still moves"}


def test_a_teacher_that_no_longer_follows_is_named(tmp_path: Path) -> None:
    options = {"exclude_modules": [r"teacher.0", "teacher.4"]}
    row = found("what moves still moves", Still, lora(**options), tmp_path, Points)
    assert row.holds is None
    assert "the module itself moves teacher.0.bias, teacher.0.weight, teacher.1.bias" in row.reason
    assert row.reason.endswith("here it does not: if it is to follow what trains, it does not")
    assert found("what moves still moves", MaxNorm, lora(), tmp_path, Points).holds


def test_what_differs_by_itself_is_no_fault(tmp_path: Path) -> None:
    row = found("resume at an epoch's end", Clocked, lora(), tmp_path)
    assert row.holds is None
    assert row.reason.startswith("two uninterrupted runs from the same seed differ, too, in ")


# -- what people's modules do, which is no fault of theirs ------------------------------------------


@dataclass
class Prediction:
    scores: np.ndarray
    label: Tensor


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value
        self.itself = self


class Predicts(Net):
    """Returns what `kind` makes of a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.save_hyperparameters()

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self(batch[0]).softmax(-1)
        return {
            "array": lambda: y.numpy(),
            "arrays": lambda: [y.numpy(), {"names": np.array(["a", "b"]), "mean": y.mean()}],
            "dataclass": lambda: Prediction(y.numpy(), y.argmax()),
            "object": lambda: Plain(y),
            "sparse": lambda: y.to_sparse(),
            "nothing": lambda: None,
        }[self.kind]()


EVALUATIONS = [
    "starts as the base", "evaluation by ckpt_path", "evaluation in a fresh process",
    "load_from_checkpoint",
]  # fmt: skip


def all_found(
    make: Any,
    folder: Path,
    names: list[str],
    callback: Any = None,
    data: Any = Data,
    **options: Any,
) -> dict[str, Finding]:
    callbacks = (lora() if callback is None else callback,)
    runs = Runs(Recipe(make, data, callbacks, folder, 4, {**CPU, **options}))
    with quiet():
        return {name: finding(name, runs) for name in names}


def array() -> Predicts:
    return Predicts("array")


@pytest.mark.slow
def test_predictions_of_a_fresh_process(tmp_path: Path) -> None:
    for row in all_found(array, tmp_path, EVALUATIONS).values():
        assert row.holds, row


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["arrays", "dataclass", "object", "sparse", "nothing"])
def test_predictions_of_every_kind(kind: str, tmp_path: Path) -> None:
    rows = all_found(lambda: Predicts(kind), tmp_path, EVALUATIONS[:2])
    assert all(row.holds for row in rows.values()), rows
    wrong = found("starts as the base", lambda: Predicts(kind), lora(StartsElsewhere), tmp_path)
    assert wrong.holds is False
    assert (kind == "nothing") != ("predict: predictions" in wrong.reason)


class TimesValidation(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("seconds", torch.tensor(time.perf_counter()))


@pytest.mark.slow
def test_a_validation_that_logs_a_time(tmp_path: Path) -> None:
    rows = all_found(TimesValidation, tmp_path, EVALUATIONS)
    for row in rows.values():
        assert row.holds, row
        assert "but for what no two evaluations have alike: validate: seconds (" in row.reason
    wrong = found("starts as the base", TimesValidation, lora(StartsElsewhere), tmp_path)
    assert wrong.holds is False


class WritesFiles(Net):
    """Samples beside the logs, and a look at the best checkpoint, as from Lightning's defaults."""

    def on_fit_end(self) -> None:
        for folder in (self.logger.log_dir, self.logger.save_dir):
            Path(folder, "sample.txt").write_text("a sample")
        assert isinstance(self.trainer.checkpoint_callback.best_model_path, str)


@pytest.mark.slow
def test_files_beside_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = examine(WritesFiles, Data, lora(), trainer_options=CPU, batches=1, show=False)["trains"]
    assert row.holds, row
    assert list(tmp_path.iterdir()) == []


class SavesSome(Net):
    def __init__(self, backbone: nn.Module, width: int = 8) -> None:
        super().__init__(width)
        self.save_hyperparameters(ignore=["backbone"])


class SavesObjects(Net):
    def __init__(self, part: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_arguments_that_are_not_saved_or_not_plain(tmp_path: Path) -> None:
    row = found("load_from_checkpoint", lambda: SavesSome(nn.Linear(2, 2)), lora(), tmp_path)
    assert row.holds is None
    assert "SavesSome does not save backbone: call self.save_hyperparameters()" in row.reason
    names = ["checkpoint complete", "resume at an epoch's end", "evaluation by ckpt_path"]
    rows = all_found(lambda: SavesObjects(nn.Linear(2, 2)), tmp_path / "b", names)
    assert rows.pop("checkpoint complete").holds
    for row in rows.values():
        assert row.holds is False
        assert (
            "beside tensors and plain values it holds torch.nn.modules.linear.Linear" in row.reason
        )
        assert row.reason.isprintable()


class ActNorm(Net):
    """What it scales by is found in its first forward: in Lightning's sanity check."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("known", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.known:
            self.scale.data = 1 / (x.detach().std(0) + 0.1)
            self.known += 1
        return super().forward(x * self.scale)


def test_a_start_that_depends_on_data(tmp_path: Path) -> None:
    rows = all_found(ActNorm, tmp_path, ["base untouched", "resume at an epoch's end"])
    assert all(row.holds for row in rows.values()), rows
    assert "the module itself moves scale, known" in rows["base untouched"].reason


class Encoder(Net):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.encoder(x[:, None])[:, 0])


def test_fused_kernels_of_torch(tmp_path: Path) -> None:
    row = found("starts as the base", Encoder, lora(target_modules=["linear1"]), tmp_path)
    assert row.holds, row
    if "but for rounding" not in row.reason:  # the same bits on this machine
        assert row.reason == "validate, test, predict"
    wrong = found("starts as the base", Encoder, lora(StartsElsewhere), tmp_path)
    assert wrong.holds is False


class Lookahead(torch.optim.SGD):
    """Every second step goes back half of the way; it does not save where it is."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.count = 0
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.count += 1
        params = [p for g in self.param_groups for p in g["params"]]
        for p, slow in zip(params, self.slow, strict=False):
            if self.count % 2 == 0:
                slow.add_(p.detach() - slow, alpha=0.5)
                p.data.copy_(slow)
        return loss


class LooksAhead(Net):
    def configure_optimizers(self) -> Any:
        return Lookahead([p for p in self.parameters() if p.requires_grad])


def test_what_returns_every_second_step_is_found(tmp_path: Path) -> None:
    names = ["what moves still moves", "resume within an epoch"]
    rows = all_found(LooksAhead, tmp_path, names)
    assert rows["what moves still moves"].holds
    assert rows["resume within an epoch"].holds is False


class Stops(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise AssertionError  # of a bare `assert`
        return super().training_step(batch, batch_idx)


def test_an_error_without_words_says_where() -> None:
    row = examine(Stops, Data, lora(), trainer_options=CPU, show=False)["trains"]
    assert "AssertionError: test_examine.py, line " in row.reason
    assert row.reason.endswith("in training_step: raise AssertionError  # of a bare `assert`")


class WithTarget(Net):
    """A target network (DQN): a free copy that the module moves, and that gets no gradient."""

    def __init__(self, all_of_it: bool) -> None:
        super().__init__()
        self.all_of_it = all_of_it
        self.target = copy.deepcopy(self.body)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for t, s in zip(self.target.parameters(), self.body.parameters(), strict=True):
                t.mul_(0.9).add_(s, alpha=0.1)
            wanted = self.target(batch[0][:, :1] * torch.ones(16))
        y = self.body(batch[0][:, :1] * torch.ones(16))
        return super().training_step(batch, batch_idx) + (y - wanted).square().mean()

    def configure_optimizers(self) -> Any:
        parts = (self,) if self.all_of_it else (self.embed, self.body, self.head)
        return torch.optim.Adam([p for part in parts for p in part.parameters()], lr=0.01)


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_target_network_gets_no_gradient(all_of_it: bool, tmp_path: Path) -> None:
    names = ["gradients reach every adapter", "optimizers hold exactly what trains"]
    rows = all_found(lambda: WithTarget(all_of_it), tmp_path, names)
    assert all(row.holds for row in rows.values()), rows
    words = ("in none of target", "as without adapters") if all_of_it else ("none of target",)
    row = rows[names[0] if all_of_it else names[1]]
    assert all(word in row.reason for word in words)
    assert "leave out" in row.reason or all_of_it


class Uncopied(LoraCallback):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lock = threading.Lock()


def test_options_that_are_the_examinations_own() -> None:
    for options, words in (
        ({"devices": 2, "strategy": "ddp"}, "trainer_options has devices, but"),
        ({"max_epochs": 1}, "has max_epochs"),
        ({"fast_dev_run": True, "callbacks": []}, "has fast_dev_run, callbacks"),
    ):
        arguments = {"trainer_options": options, "show": False}
        assert words in message_of(ConfigError, examine, Net, Data, lora(), **arguments)
    assert "that is enabled" in message_of(ConfigError, examine, Net, Data, lora(enabled=False))
    said = message_of(ConfigError, examine, Net, Data, lora(Uncopied))
    assert "A Uncopied cannot be copied (TypeError: cannot pickle '_thread.lock' object)" in said


def test_a_precision_that_only_a_trainer_knows(tmp_path: Path) -> None:
    row = all_found(Random, tmp_path, ["load_from_checkpoint"], precision="64-true")
    assert row["load_from_checkpoint"].holds is not False


class Clocked(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = int.from_bytes(os.urandom(4), "big") / 2**32
        return super().training_step(batch, batch_idx) * (1 + noise)
