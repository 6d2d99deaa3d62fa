"""State that hooks keep up is in a checkpoint as the uninterrupted run has it, whoever writes it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

from lora_lightning import LoraCallback
from lora_lightning.layers.traversal import named_parameters
from tests.helpers.lightning_modules import OPTIONS, Data, Net, make_trainer
from tests.helpers.resumable_run import differences

HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")
Log = list[tuple[str, str]]


class Counts(Net):
    """Keeps a count, a random walk and an average of what trains in each of three hooks."""

    def __init__(self, log: Log | None = None) -> None:
        super().__init__()
        self.log_of_hooks: Any = [] if log is None else log
        for hook in HOOKS:
            self.register_buffer(f"{hook}_count", torch.zeros(()))
            self.register_buffer(f"{hook}_walk", torch.zeros(()))
        self.register_buffer("average", torch.zeros(3))

    def count(self, hook: str) -> None:
        self.log_of_hooks.append((hook, "module"))
        setattr(self, f"{hook}_count", getattr(self, f"{hook}_count") + 1)  # not in place
        getattr(self, f"{hook}_walk").add_(torch.rand(()))
        head = self.head.adapters["default"].module if hasattr(self.head, "adapters") else self.head
        self.average.lerp_(head.bias.detach(), 0.1)

    def on_train_batch_end(self, *args: Any) -> None:
        self.count("on_train_batch_end")

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.count("on_validation_end")

    def on_train_epoch_end(self) -> None:
        self.count("on_train_epoch_end")


class Follows(Callback):
    """Listed after whoever saves; its state goes into checkpoints."""

    def __init__(self, log: Log, name: str = "follows") -> None:
        self.log_of_hooks, self.name, self.seen = log, name, 0

    def note(self, trainer: Any, hook: str) -> None:
        if not trainer.sanity_checking:
            self.log_of_hooks.append((hook, self.name))
            self.seen += 1

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.note(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "on_train_epoch_end")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def saver(hook: str, path: Path) -> Callback:
    """A callback of the user's own that saves once, after six batches or in the second epoch."""

    def save(trainer: Any, *args: Any) -> None:
        late = trainer.current_epoch == 1 and trainer.fit_loop.total_batch_idx >= 5
        if late and not path.exists():
            trainer.save_checkpoint(path)

    hooks: dict[str, Any] = {hook: save}
    return LambdaCallback(**hooks)


def model_checkpoint(hook: str, folder: Path) -> Callback:
    when: dict[str, dict[str, Any]] = {
        "on_train_batch_end": {"every_n_train_steps": 6},
        "on_validation_end": {"every_n_epochs": 2, "save_on_train_epoch_end": False},
        "on_train_epoch_end": {"every_n_epochs": 2, "save_on_train_epoch_end": True},
    }
    return ModelCheckpoint(folder, filename="saved", save_top_k=-1, **when[hook])


def fit(folder: Path, callbacks: list[Any], log: Log, ckpt_path: Path | None = None) -> Any:
    seed_everything(3 if ckpt_path is None else 99, verbose=False)
    module, follows = Counts(log), Follows(log)
    trainer = make_trainer(folder, *callbacks, follows, max_epochs=3)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    return {"module": module.state_dict(), "follows": follows.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("who", ["first of all", "callback", "ModelCheckpoint", "module"])
def test_what_hooks_keep_up_is_saved(tmp_path: Path, hook: str, who: str) -> None:
    path = tmp_path / "saved.ckpt"
    lora = [LoraCallback(**OPTIONS)]
    callbacks: list[Any] = {
        "first of all": [saver(hook, path), *lora],
        "callback": [*lora, saver(hook, path)],
        "ModelCheckpoint": [*lora, model_checkpoint(hook, tmp_path)],
        "module": lora,
    }[who]
    if who == "module":
        own = getattr(Counts, hook)

        def saves_last(self: Any, *args: Any) -> None:
            own(self, *args)
            saver(hook, path).__dict__[hook](self.trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Counts, hook, saves_last)
            log: Log = []
            straight = fit(tmp_path, callbacks, log)
    else:
        log = []
        straight = fit(tmp_path, callbacks, log)
    assert path.exists()
    resumed = fit(tmp_path / "again", [LoraCallback(**OPTIONS)], [], path)
    assert differences(straight, resumed) == []
    without: Log = []
    fit(tmp_path / "without", [LoraCallback(**OPTIONS)], without)
    assert log == without  # each hook once, in the order of a run that saves nothing


def test_two_that_save_in_one_turn(tmp_path: Path) -> None:
    """The second one, too, is run before the first one's file is written; neither runs twice."""
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    callbacks: list[Any] = [saver("on_train_batch_end", first)]
    callbacks += [LoraCallback(**OPTIONS), saver("on_train_batch_end", second)]
    log: Log = []
    straight = fit(tmp_path, callbacks, log)
    assert len(log) == 2 * (12 + 3 + 3)
    for path in (first, second):
        resumed = fit(tmp_path / path.stem, [LoraCallback(**OPTIONS)], [], path)
        assert differences(straight, resumed) == []


def test_a_failing_hook_is_not_run_again(tmp_path: Path) -> None:
    """What is saved on an exception is the state then; hooks that did not run stay out."""
    path = tmp_path / "broken.ckpt"

    class Breaks(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("disk on fire")

        def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None:
            trainer.save_checkpoint(path)

    log: Log = []
    with pytest.raises(RuntimeError, match="disk on fire"):
        fit(tmp_path, [LoraCallback(**OPTIONS), Breaks()], log)
    assert path.exists()
    assert log == []


TRAINED_HEAD = "head.adapters.default.module.weight"


class Keeps(Callback):
    def __init__(self) -> None:
        self.copies: list[Any] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        then = pl_module.head.weight.detach().clone()
        self.copies.append((copy.deepcopy(pl_module), then))
        self.copies.append((pickle.loads(pickle.dumps(pl_module)), then))


def test_copies_made_in_a_hook_and_callbacks_after_it(tmp_path: Path) -> None:
    """Modules are copied in hooks (the best one so far); callbacks go on to other Trainers."""
    log: Log = []
    follows, keeps = Follows(log), Keeps()
    module = Counts([])
    make_trainer(tmp_path, LoraCallback(**OPTIONS), keeps, follows).fit(module, Data())
    for one, then in keeps.copies:
        assert torch.equal(one.head.weight, then)
        assert one.head.weight is dict(named_parameters(one))[TRAINED_HEAD]
    assert torch.equal(dict(named_parameters(module))[TRAINED_HEAD], then)
    assert len({float(then.sum()) for _, then in keeps.copies}) > 1
    assert log.count(("on_train_batch_end", "follows")) == 4
    plain = make_trainer(tmp_path, pickle.loads(pickle.dumps(keeps)), follows)
    plain.fit(Counts([]), Data())
    make_trainer(tmp_path, follows, LoraCallback(**OPTIONS)).fit(Counts([]), Data())
    assert log.count(("on_train_batch_end", "follows")) == 12


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("options", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 12}])
@pytest.mark.parametrize("hook", HOOKS)
def test_restarting_is_what_lightning_says(tmp_path: Path, hook: str, options: Any) -> None:
    """`trainer.fit_loop.restarting` in a resumed run, as modules ask for it in their hooks."""

    class Asks(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Any = set()

        def ask(self, where: str) -> None:
            self.seen.add((where, self.trainer.current_epoch, self.trainer.fit_loop.restarting))

        def on_train_start(self) -> None:
            self.ask("start")

        def on_train_epoch_start(self) -> None:
            self.ask("epoch start")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.ask("step")
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.ask("epoch end")

    seen = []
    for callbacks in ([], [LoraCallback(**OPTIONS)]):
        folder = tmp_path / str(len(callbacks))
        path = folder / "saved.ckpt"
        make_trainer(folder, *callbacks, saver(hook, path), **options).fit(Asks(), Data())
        module = Asks()
        make_trainer(folder, *callbacks, **options).fit(module, Data(), ckpt_path=path)
        seen.append(module.seen)
    assert any(restarting for *_, restarting in seen[0]) or hook != "on_train_batch_end"
    if hook != "on_train_epoch_end" or "max_steps" not in options:  # Lightning repeats that epoch
        assert seen[1] == seen[0]
