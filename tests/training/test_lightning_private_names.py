"""Each private name of Lightning that this package uses is there and does what is assumed of it.

Nothing but `lora_lightning/training/_lightning.py` touches one, and no class of Lightning is changed,
as the last tests check.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchmetrics import MeanMetric

import lora_lightning
from lora_lightning.training import _lightning as private
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.paths import child_environment

PACKAGE = Path(lora_lightning.__file__).parent
FILE = Path(private.__file__)


@pytest.fixture(autouse=True)
def what_to_look_at() -> None:
    """Shown by pytest as captured output where a test fails."""
    print(
        f"Lightning {lightning.__version__} may have changed. Look at the accessor that this test "
        f"is named after, in {FILE}; find in Lightning's source what its private name has become."
    )


class Asked(Callback):
    """Asks `question(trainer, module)` at the end of every training batch."""

    def __init__(self, question: Any) -> None:
        self.question = question
        self.answers: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.answers.append(self.question(trainer, pl_module))


def during_fit(folder: Path, question: Any, data: Any = None, **options: Any) -> list[Any]:
    """What is answered in each of the four batches of an epoch, unless options say otherwise."""
    asked = Asked(question)
    module = options.pop("module", None) or Net()
    make_trainer(folder, asked, *options.pop("callbacks", ()), **options).fit(
        module, Data() if data is None else data
    )
    return asked.answers


# -- modules and callbacks -------------------------------------------------------------------------


def test_trainer_of(tmp_path: Path) -> None:
    assert private.trainer_of(Net()) is None
    assert private.trainer_of(nn.Linear(1, 1)) is None
    found = during_fit(tmp_path, lambda trainer, m: private.trainer_of(m) is trainer)
    assert found == [True] * 4


def test_state_key() -> None:
    assert private.state_key(Asked(None), name="a", r=8) == "Asked{'name': 'a', 'r': 8}"


def test_averaged_model(tmp_path: Path) -> None:
    averaging = WeightAveraging()
    assert private.averaged_model(averaging) is None
    make_trainer(tmp_path, averaging, max_steps=1).fit(Net(), Data())
    assert isinstance(private.averaged_model(averaging), AveragedModel)
    assert private.averaged_model(Asked(None)) is None


# -- loops -----------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Three batches, which is not known before."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))] * 3)


class WithState(DataLoader):
    """Has a state of its own, as torchdata's StatefulDataLoader."""

    loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"place": 7}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def test_data_fetcher(tmp_path: Path) -> None:
    assert private.data_fetcher(make_trainer(tmp_path)) is None
    done = during_fit(tmp_path, lambda trainer, _: private.data_fetcher(trainer).done)
    assert done == [False, False, False, True]


def test_fetched_ahead(tmp_path: Path) -> None:
    def count(trainer: Trainer, _: Any) -> int:
        return len(private.fetched_ahead(private.data_fetcher(trainer)))

    assert during_fit(tmp_path, count) == [0] * 4
    assert during_fit(tmp_path, count, DataLoader(Stream(), batch_size=None)) == [1, 1, 0]


def test_train_iterators(tmp_path: Path) -> None:
    assert private.train_iterators(make_trainer(tmp_path)) == []
    loaders = {"a": Data().train_dataloader(), "b": [Data().val_dataloader()]}

    class TwoLoaders(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"], batch_idx)

    def kinds(trainer: Trainer, _: Any) -> list[type]:
        return [type(iterator) for iterator in private.train_iterators(trainer)]

    expected = [type(iter(loader)) for loader in (loaders["a"], loaders["b"][0])]
    assert during_fit(tmp_path, kinds, loaders, module=TwoLoaders()) == [expected] * 4


def test_states_of_loaders(tmp_path: Path) -> None:
    loader = WithState(Data().dataset, batch_size=16)

    def resume(trainer: Trainer, _: Any) -> Any:
        trainer.save_checkpoint(tmp_path / "middle.ckpt")
        loops = torch.load(tmp_path / "middle.ckpt")["loops"]["fit_loop"]
        saved = private.take_saved_loader_states(loops)
        assert private.take_saved_loader_states(loops) == []
        private.save_loader_states(loops, [{"place": 8}])
        other = make_trainer(tmp_path)
        other.fit_loop.load_state_dict(loops)
        to_load = private.take_loader_states(other)
        assert private.take_loader_states(other) == []
        private.load_loader_states(trainer, to_load)
        return saved, loader.loaded

    found = during_fit(tmp_path, resume, loader, limit_train_batches=1)
    assert found == [([{"place": 7}], {"place": 8})]


def test_wrapped_sampler() -> None:
    sampler = RandomSampler(range(4))
    wrapper = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)
    assert vars(wrapper.dataset)[private.WRAPPED_SAMPLER] is sampler


def test_all_callbacks(tmp_path: Path) -> None:
    asked = Asked(None)
    trainer = make_trainer(tmp_path, asked)
    private.all_callbacks(trainer).append(asked)  # the list itself
    assert private.all_callbacks(trainer).count(asked) == 2


def test_train_data(tmp_path: Path) -> None:
    def length(trainer: Trainer, _: Any) -> int:
        return len(private.train_data(trainer))

    assert during_fit(tmp_path, length) == [4] * 4
    given = DataLoader(Data().dataset, batch_size=32)
    assert during_fit(tmp_path, length, given) == [2] * 2


def test_given_validation_data(tmp_path: Path) -> None:
    trainer, given = make_trainer(tmp_path), Data().val_dataloader()
    trainer.fit(Net(), Data().train_dataloader(), given)
    assert private.given_validation_data(trainer) is given
    trainer = make_trainer(tmp_path)
    trainer.fit(Net(), Data())
    assert private.given_validation_data(trainer) is None


def test_accumulates_and_last_batch(tmp_path: Path) -> None:
    def ask(trainer: Trainer, _: Any) -> tuple[bool, bool]:
        return private.accumulates(trainer), private.is_last_batch(trainer)

    found = during_fit(tmp_path, ask, limit_train_batches=3, accumulate_grad_batches=2)
    assert found == [(True, False), (False, False), (False, True)]


def test_validates_after_batch(tmp_path: Path) -> None:
    def ask(trainer: Trainer, _: Any) -> bool:
        return private.validates_after_batch(trainer)

    assert during_fit(tmp_path, ask) == [False, False, False, True]
    assert during_fit(tmp_path, ask, val_check_interval=2) == [False, True, False, True]


def test_stop_restarting(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit_loop.restarting = True
    private.stop_restarting(trainer.fit_loop)
    assert not trainer.fit_loop.restarting
    assert trainer.fit_loop.epoch_loop.restarting
    assert trainer.fit_loop.epoch_loop.val_loop.restarting
    trainer.fit_loop.restarting = False  # why the setter will not do
    assert trainer.fit_loop.restarting


class Logging(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean(float(batch_idx))
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log("number", float(batch_idx), on_epoch=True, on_step=True, batch_size=2)
        return super().training_step(batch, batch_idx)


def test_logged_results(tmp_path: Path) -> None:
    def ask(trainer: Trainer, _: Any) -> Any:
        results = private.logged_results(trainer)
        assert results == private.logged_results(trainer.fit_loop.epoch_loop)
        number, mean = (
            next(r for r in results.values() if r.meta.name == name) for name in ("number", "mean")
        )
        assert number.is_tensor
        assert number.meta.is_mean_reduction
        assert number.meta.on_epoch
        assert not mean.is_tensor
        return (
            float(private.last_value(number)), float(private.last_value(mean)),
            float(number.value), float(number.cumulated_batch_size),
        )  # fmt: skip

    found = during_fit(tmp_path, ask, module=Logging(), limit_train_batches=3)
    assert found == [(0, 0, 0, 2), (1, 1, 2, 4), (2, 2, 6, 6)]
    assert private.logged_results(make_trainer(tmp_path).fit_loop.epoch_loop) == {}


def test_saved_and_restored_results(tmp_path: Path) -> None:
    """Put back in a Trainer that trains on from there, they are what they would have been."""

    def save(trainer: Trainer, _: Any) -> Any:
        return copy.deepcopy(private.saved_results(trainer.fit_loop.epoch_loop))

    found = during_fit(tmp_path, save, module=Logging(), limit_train_batches=3)
    assert [entry["name"] for entry in found[1]][:2] == ["mean", "number"]
    torch.save(found[1], tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=True)[1]["key"] == "training_step.number"

    class GoesOn(Logging):
        def on_train_start(self) -> None:
            private.restore_results(self, copy.deepcopy(found[1]))

    again = during_fit(tmp_path, save, module=GoesOn(), limit_train_batches=1)
    (number,) = (entry for entry in again[0] if entry["name"] == "number")
    tensors = {name: float(tensor) for name, tensor in number["tensors"].items()}
    assert tensors == {"value": 2.0, "cumulated_batch_size": 6}  # 0 and 1 before, and 0


def test_result_options(tmp_path: Path) -> None:
    """Logged again with the same options, a restored result is taken for the same one."""

    def ask(trainer: Trainer, _: Any) -> Any:
        results = private.logged_results(trainer).values()
        return {r.meta.name: private.result_options(r) for r in results}

    options = during_fit(tmp_path, ask, module=Logging(), limit_train_batches=1)[0]["number"]
    assert (options["plain"]["fx"], options["plain"]["on_step"]) == ("training_step", True)
    assert options["reduce_fx"] == (False, "mean")
    assert (options["sync_dist"], options["rank_zero_only"]) == (False, False)


def test_restore_metric() -> None:
    metric, other = MeanMetric(), MeanMetric()
    metric.update(3.0)
    other.update(1.0)
    other.compute()  # which it remembers
    private.restore_metric(other, metric.update_count, metric.metric_state)
    assert float(other.compute()) == 3
    assert other.update_count == 1


def test_logs_this_batch_and_logged_step(tmp_path: Path) -> None:
    def ask(trainer: Trainer, _: Any) -> tuple[bool, int]:
        return private.logs_this_batch(trainer), private.logged_step(trainer)

    found = during_fit(tmp_path, ask, log_every_n_steps=2)
    assert found == [(False, 0), (True, 1), (False, 2), (True, 3)]
    found = during_fit(tmp_path, ask, log_every_n_steps=1, accumulate_grad_batches=2)
    assert [step for _, step in found] == [0, 0, 1, 1]


def test_what_a_checkpoint_says_of_the_loops(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, val_check_interval=2, limit_train_batches=3)
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loops = torch.load(tmp_path / "end.ckpt")["loops"]["fit_loop"]
    count = {"ready": 3, "started": 3, "processed": 3, "completed": 3}
    batches = private.saved_batch_progress(loops)
    assert batches["current"] == batches["total"] == count
    validation = private.saved_validation_progress(loops)
    assert validation["total"] == dict.fromkeys(count, 4)
    assert validation["current"].keys() == count.keys()
    trainer = make_trainer(tmp_path)
    private.count_logged_step(loops)
    trainer.fit_loop.load_state_dict(loops)
    assert private.logged_step(trainer) == 4


# -- signals and processes -------------------------------------------------------------------------


def test_cluster_environment(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = make_trainer(tmp_path)
    assert isinstance(private.cluster_environment(trainer), LightningEnvironment)
    assert not hasattr(trainer.strategy, "cluster_environment")  # the public way, for one device
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    found = private.cluster_environment(make_trainer(tmp_path))
    assert isinstance(found, SLURMEnvironment)
    assert found.auto_requeue
    assert found.requeue_signal is None or isinstance(found.requeue_signal, signal.Signals)


def test_lightnings_signal_handlers(tmp_path: Path) -> None:
    def ask(trainer: Trainer, _: Any) -> tuple[int, list[Any]]:
        own, others = private.lightnings_signal_handlers(trainer, signal.SIGTERM)
        return len(own), others

    users = [lambda *_: None]
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert during_fit(tmp_path, ask, limit_train_batches=1) == [(1, [])]
        signal.signal(signal.SIGTERM, users[0])
        assert during_fit(tmp_path, ask, limit_train_batches=1) == [(1, users)]
        trainer = make_trainer(tmp_path)
        assert private.lightnings_signal_handlers(trainer, signal.SIGTERM) == ([], [])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_save_and_requeue(tmp_path: Path, monkeypatch: Any) -> None:
    from lightning.pytorch.trainer.connectors import signal_connector

    commands: list[list[str]] = []
    monkeypatch.setattr(signal_connector, "call", lambda command: commands.append(command) or 0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    during_fit(
        tmp_path,
        lambda trainer, _: private.save_and_requeue(trainer, signal.SIGUSR1),
        limit_train_batches=1,
    )
    assert commands == [["scontrol", "requeue", "12"]]
    assert (tmp_path / "hpc_ckpt_1.ckpt").is_file()


def test_starts_processes(tmp_path: Path) -> None:
    def launcher(strategy: str) -> Any:
        return make_trainer(tmp_path, devices=2, strategy=strategy).strategy.launcher

    assert all(map(private.starts_processes, map(launcher, ("ddp_spawn", "ddp_fork"))))
    assert not private.starts_processes(launcher("ddp"))
    assert not private.starts_processes(None)


# -- checkpoints -----------------------------------------------------------------------------------


def test_last_checkpoint(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)

    def ask(trainer: Trainer, _: Any) -> tuple[bool, bool, str]:
        before = private.has_saved(saver)
        private.save_last_checkpoint(saver, trainer)
        return before, private.has_saved(saver), saver.last_model_path

    found = during_fit(tmp_path, ask, callbacks=[saver], limit_train_batches=1)
    assert found == [(False, True, str(tmp_path / "last.ckpt"))]
    assert (tmp_path / "last.ckpt").is_file()


def test_override_link(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last="link", filename="one")
    seen: list[tuple[Any, ...]] = []
    private.override_link(saver, lambda *given: seen.append(given))
    trainer = make_trainer(tmp_path, saver, limit_train_batches=1)
    trainer.fit(Net(), Data())
    assert seen == [(trainer, str(tmp_path / "one.ckpt"), str(tmp_path / "last.ckpt"))]


def test_background_plugin(tmp_path: Path) -> None:
    plugin = AsyncCheckpointIO(TorchCheckpointIO())
    assert private.works_in_background(plugin)
    assert not private.works_in_background(TorchCheckpointIO())
    assert private.background_executor(plugin) is None
    plugin.save_checkpoint({}, tmp_path / "empty.ckpt")
    order: list[bool] = []
    private.background_executor(plugin).submit(
        lambda: order.append((tmp_path / "empty.ckpt").is_file())
    )
    private.fail_in_background(plugin, ValueError("seen late"))
    with pytest.raises(ValueError, match="seen late"):
        plugin.teardown()
    assert order == [True]


def test_replace_wrapped() -> None:
    first, second = TorchCheckpointIO(), TorchCheckpointIO()
    wrapper = AsyncCheckpointIO(first)
    wrapper.checkpoint_io = second
    assert wrapper.checkpoint_io is first  # why the setter will not do
    private.replace_wrapped(wrapper, second)
    assert wrapper.checkpoint_io is second
    assert isinstance(wrapper, CheckpointIO)


# -- strategies and precision ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "name", "arguments"),
    [
        (FSDPStrategy, private.SETUP_MODEL, ["model"]),
        (DeepSpeedStrategy, private.SETUP_MODEL, ["model"]),
        (
            DeepSpeedStrategy,
            private.SETUP_MODEL_AND_OPTIMIZER,
            ["model", "optimizer", "lr_scheduler"],
        ),
    ],
)
def test_methods_that_are_overridden(strategy: Any, name: str, arguments: list[str]) -> None:
    """The strategy's setup calls them on the instance, with these arguments."""
    assert list(inspect.signature(vars(strategy)[name]).parameters) == ["self", *arguments]
    assert f"self.{name}(" in inspect.getsource(strategy)


def test_setup_model_is_that_of_the_class() -> None:
    class Strategy:
        def _setup_model(self, model: Any) -> Any:
            return "class's", model

        def _setup_model_and_optimizer(self, *given: Any) -> Any:
            return "engine", given

    strategy: Any = Strategy()
    strategy._setup_model = strategy._setup_model_and_optimizer = lambda *_: "override's"
    assert private.setup_model(strategy, 1) == ("class's", 1)
    assert private.setup_model_and_optimizer(strategy, 1, 2, 3) == ("engine", (1, 2, 3))


def test_writes_folders() -> None:
    assert private.writes_folders(FSDPStrategy(state_dict_type="sharded"))
    assert not private.writes_folders(FSDPStrategy(state_dict_type="full"))
    assert private.writes_folders(ModelParallelStrategy(save_distributed_checkpoint=True))
    assert not private.writes_folders(ModelParallelStrategy(save_distributed_checkpoint=False))


def test_collective_timeout() -> None:
    limit = timedelta(seconds=7)
    for kind in (DDPStrategy, FSDPStrategy, ModelParallelStrategy):
        assert private.collective_timeout(kind(timeout=limit)) == limit
    assert private.collective_timeout(SingleDeviceStrategy()) is None


def test_has_completed_config() -> None:
    source = inspect.getsource(DeepSpeedStrategy)
    assert source.count("self._config_initialized = ") == 2  # False when made, True in setup
    strategy: Any = object.__new__(DeepSpeedStrategy)
    strategy._config_initialized = False
    assert not private.has_completed_config(strategy)
    strategy._config_initialized = True
    assert private.has_completed_config(strategy)


def test_call_inside_wrapper(tmp_path: Path) -> None:
    order: list[str] = []

    class Wrapper(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *args: Any) -> Any:
            order.append("wrapper")
            return self.inner(*args)

    class Probed(Net):
        def probe(self) -> str:
            order.append("method")
            return "answer"

    def ask(trainer: Trainer, module: Any) -> Any:
        trainer.strategy.model = Wrapper(module)
        answer = private.call_inside_wrapper(trainer.strategy, module, "probe")
        trainer.strategy.model = module
        return answer

    assert during_fit(tmp_path, ask, module=Probed(), limit_train_batches=1) == ["answer"]
    assert order == ["wrapper", "method"]


def test_is_quantizing_hook() -> None:
    from lightning.fabric.plugins.precision import bitsandbytes

    hook = partial(bitsandbytes._quantize_on_load_hook, print)
    assert private.is_quantizing_hook(hook)
    assert not private.is_quantizing_hook(partial(print))
    assert "partial(_quantize_on_load_hook, " in inspect.getsource(bitsandbytes)


# -- nothing else ----------------------------------------------------------------------------------


def test_a_test_for_each() -> None:
    names = [n.name for n in ast.parse(FILE.read_text()).body if isinstance(n, ast.FunctionDef)]
    own = Path(__file__).read_text()
    assert [name for name in names if f"private.{name}" not in own] == []


def test_each_says_since_when() -> None:
    for node in ast.parse(FILE.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            assert "Since " in text or "since " in text, f"{node.name} in {FILE}"


def private_names_of(folder: Path) -> set[str]:
    """All attributes, functions and classes with an underscore that a package's files name."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (getattr(node, "attr", None), getattr(node, "name", None))
            found |= {name for name in names if isinstance(name, str) and is_private(name)}
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_in(tree: ast.AST) -> set[str]:
    """What a file defines itself: functions, classes, variables, and what it sets on `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            found |= {node.attr} if on_self else set()
    return found


def named_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The names that a file reads or sets on objects, imports or has as strings, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value  # getattr(x, "_name"), a key of an override
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name.rpartition(".")[2]


OTHERS = {  # that Lightning names as well
    *(name for owner in (nn.Module, torch.Tensor, torch) for name in dir(owner)),
    *vars(nn.Module()),
    "_orig_mod",  # torch.compile's
    "_enabled",  # of our layers
}
OURS = {
    name
    for path in PACKAGE.rglob("*.py")
    if path != FILE
    for name in defined_in(ast.parse(path.read_text()))
}
USED = {name for _, name in named_in(ast.parse(FILE.read_text())) if is_private(name)}
LIGHTNINGS = (private_names_of(Path(lightning.__file__).parent) - OTHERS - OURS) | USED


def uses(source: str) -> list[str]:
    """`line: name` of every private name of Lightning that `source` touches.

    Left out are the names that the file defines itself.
    """
    tree = ast.parse(source)
    names = LIGHTNINGS - defined_in(tree)
    return [f"{line}: {name}" for line, name in named_in(tree) if name in names]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_other_file_touches_one(path: Path) -> None:
    if path not in (FILE, PACKAGE / "utilities/_torch.py"):  # DataLoader has an _iterator, too
        assert uses(path.read_text()) == [], f"{path}: put an accessor into {FILE}"


@pytest.mark.parametrize(
    "line",
    [
        "trainer.fit_loop._data_fetcher",
        "getattr(module, '_trainer', None)",
        "self.strategy._setup_model = None",
        "from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher",
        "self._generate_state_key()",
    ],
)
def test_the_search_finds_one(line: str) -> None:
    assert len(uses(line)) == 1
    assert FILE.exists()
    assert uses(FILE.read_text()) != []


def overridden(owner: type) -> list[str]:
    """Private methods of a class of Lightning that a class of ours overrides."""
    inherited = {
        name
        for base in owner.__mro__
        if base.__module__.startswith("lightning.")
        for name in vars(base)
    }
    inherited.discard("_abc_impl")  # Python's, of every abstract class
    return [name for name in vars(owner) if is_private(name) and name in inherited]


def test_no_class_overrides_a_private_method() -> None:
    for info in pkgutil.walk_packages([str(PACKAGE)], "lora_lightning."):
        module = importlib.import_module(info.name)
        for owner in vars(module).values():
            if isinstance(owner, type) and owner.__module__.startswith("lora_lightning."):
                assert not overridden(owner), f"{owner}: {overridden(owner)}"


def test_the_search_for_overrides_finds_one() -> None:
    class Strategy(FSDPStrategy):
        def _setup_model(self, model: Any) -> Any:
            return model

    assert overridden(Strategy) == ["_setup_model"]


# -- nothing of Lightning is changed ---------------------------------------------------------------

CLASSES = '''
import importlib, pkgutil, sys, types
import lightning.pytorch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies.launchers import multiprocessing, subprocess_script
from tests.helpers.lightning_modules import Data, Net, make_trainer

KINDS = (types.FunctionType, property, staticmethod, classmethod)


def methods():
    """Every function of Lightning, and torch's of optimizers, as it is now."""
    names = [n for n in sys.modules if n.split(".")[0] == "lightning"] + ["torch.optim.optimizer"]
    return {
        (name, owner.__qualname__, key): value
        for name in names
        for owner in list(vars(sys.modules[name]).values())
        if isinstance(owner, type) and owner.__module__ == name
        for key, value in list(vars(owner).items())
        if isinstance(value, KINDS)
    }


def changed(before):
    after = methods()
    return sorted(key for key in before if after.get(key) is not before[key])


if __name__ == "__main__":
    folder = sys.argv[1]
    before = methods()
    assert len(before) > 1000
    import lora_lightning
    for info in pkgutil.walk_packages(lora_lightning.__path__, "lora_lightning."):
        importlib.import_module(info.name)
    assert changed(before) == [], "imported"
    make_trainer(folder).fit(Net(), Data())
    make_trainer(folder, devices=2, strategy="ddp_fork").fit(Net(), Data())
    assert changed(before) == [], "run without LoraCallback"
    make_trainer(folder, lora_lightning.LoraCallback(r=2)).fit(Net(), Data())
    trainer = make_trainer(folder, lora_lightning.LoraCallback(r=2), devices=2, strategy="ddp_fork")
    trainer.fit(Net(), Data())
    assert changed(before) == [], "run with LoraCallback"
    multiprocessing._MultiProcessingLauncher.kill = lambda self, signum: None
    assert len(changed(before)) == 1, "the search can fail"
'''


@pytest.mark.slow
def test_lightnings_classes_stay_as_they_are(tmp_path: Path) -> None:
    script = tmp_path / "classes.py"
    script.write_text(CLASSES)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=child_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
