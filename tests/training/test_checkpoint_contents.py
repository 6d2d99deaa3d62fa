"""A checkpoint holds exactly what training changed, whoever changed it.

The truth is a run that nothing interrupted: one that is taken up again, under another seed and with
fresh modules, ends in the same bits, and what is read back computes the same.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lora_lightning import LoraCallback, TrainingProgress, load_adapter, load_from_checkpoint
from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.errors import AdapterMismatchError
from lora_lightning.training.checkpoint_io.baseline import Baseline
from tests.helpers.lightning_modules import OPTIONS, Data, Net, make_trainer
from tests.helpers.moving_modules import (
    MOVING,
    AddsEntry,
    Bank,
    Centred,
    Counted,
    DataAssigned,
    InPlace,
    Masked,
    Moving,
    data,
    everything,
    saved,
    trainer,
)
from tests.helpers.processes import on_processes

SPOTS = (3, 4)  # optimizer steps: in the middle of an epoch of four, and at its end


def fit(make: type[Moving], folder: Path, step: int | None = None, seed: int = 0) -> Moving:
    """A module after two epochs; `step` takes up the checkpoint of that step."""
    seed_everything(seed, verbose=False)
    module = make()
    ckpt = None if step is None else str(folder / f"step={step}.ckpt")
    where = folder if step is None else folder / f"again{step}"
    trainer(where).fit(module, data(), ckpt_path=ckpt)
    return module


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_taken_up(make: type[Moving], folder: Path) -> Moving:
    straight = fit(make, folder)
    for number, step in enumerate(SPOTS, 1):
        assert_same(everything(fit(make, folder, step, seed=number)), everything(straight))
    return straight


@pytest.mark.slow
@pytest.mark.parametrize("make", MOVING, ids=lambda make: make.__name__)
def test_taken_up_again_under_another_seed(make: type[Moving], tmp_path: Path) -> None:
    assert_taken_up(make, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("make", MOVING, ids=lambda make: make.__name__)
def test_read_back_in_every_way(make: type[Moving], tmp_path: Path) -> None:
    trained = fit(make, tmp_path)
    now, file = everything(trained), str(tmp_path / "step=8.ckpt")

    module = load_from_checkpoint(make, file)
    assert_same(everything(module), now)
    by_hand = make()
    load_adapter(by_hand, file)
    assert_same(everything(by_hand), now)

    fresh, started = make(), make()
    (seen,) = trainer(tmp_path / "a").test(fresh, data(), ckpt_path=file, verbose=False)
    assert seen == trainer(tmp_path / "b").test(trained, data(), verbose=False)[0]
    other = trainer(tmp_path / "c", LoraCallback(init_from=file))
    assert seen == other.test(started, data(), verbose=False)[0]
    # And in the process, and on the module, that it was trained in
    assert seen == trainer(tmp_path / "d").test(trained, data(), ckpt_path=file, verbose=False)[0]


# Not `Summed`: the state of each process has those of all metrics, for a resume.
@pytest.mark.parametrize("make", [DataAssigned, Centred, AddsEntry])
def test_what_moved_counts(
    make: type[Moving], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Baseline, "changed", lambda self, module: {})
    with pytest.raises(AssertionError):
        assert_taken_up(make, tmp_path)


def test_what_did_not_move_is_not_saved(tmp_path: Path) -> None:
    fit(DataAssigned, tmp_path)
    adapters = {"net.adapters.default.lora_A", "net.adapters.default.lora_B"}
    assert saved(tmp_path / "step=8.ckpt").keys() == {*adapters, "slow.bias"}
    fit(Moving, tmp_path / "still")
    assert saved(tmp_path / "still/step=8.ckpt").keys() == adapters


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
def test_a_cast_is_no_training(precision: Any, tmp_path: Path) -> None:
    trainer(tmp_path, precision=precision).fit(DataAssigned(), data())
    kept = [key for key in saved(tmp_path / "step=8.ckpt") if "adapters" not in key]
    assert kept == ["slow.bias"]


def test_the_run_says_what_has_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(DataAssigned, tmp_path)
    line = "the module itself has moved 16 B of its base, and checkpoints hold it: slow.bias"
    assert capsys.readouterr().out.count(line) == 1  # at the end
    fit(DataAssigned, tmp_path, 4)
    assert capsys.readouterr().out.count(line) == 2  # at the start, too
    fit(Moving, tmp_path / "still")
    assert "moved" not in capsys.readouterr().out


# -- the base, in one process --------------------------------------------------------------------


def test_a_second_fit_has_the_base_of_the_first(tmp_path: Path) -> None:
    module = fit(InPlace, tmp_path)
    trainer(tmp_path / "more").fit(module, data())
    one, two = (
        torch.load(tmp_path / file, weights_only=True)["lora_lightning"]["base"]
        for file in ("step=8.ckpt", "more/step=8.ckpt")
    )
    assert one == two
    assert_same(everything(load_from_checkpoint(InPlace, tmp_path / "more/step=8.ckpt")),
                everything(module))  # fmt: skip


def test_a_base_that_its_user_exchanges_is_another(tmp_path: Path) -> None:
    module = fit(InPlace, tmp_path)
    with torch.no_grad():
        module.net.weight.add_(1)
        module.slow.weight.add_(1)
    trainer(tmp_path / "more", max_epochs=1).fit(module, data())
    with pytest.raises(AdapterMismatchError, match=r"net.weight: other values"):
        trainer(tmp_path / "b").test(
            InPlace(), data(), ckpt_path=str(tmp_path / "more/step=4.ckpt"), verbose=False
        )


class Clipped(Moving):
    """WGAN's way: all that the head has, what is kept aside of the base as well."""

    def build(self) -> None:
        self.head = nn.Linear(4, 4)

    def output(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.head.parameters():
            parameter.data.clamp_(-0.1, 0.1)


def test_a_head_that_trains_and_whose_base_moves(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["net"], "modules_to_save": ["head"]}
    module = Clipped()
    run = trainer(tmp_path, LoraCallback(**options))
    run.fit(module, data())
    path, x = tmp_path / "step=8.ckpt", torch.ones(2, 8)
    expected = module.eval().output(x)
    assert torch.equal(load_from_checkpoint(Clipped, path).eval().output(x), expected)
    loaded = Clipped()
    load_adapter(loaded, path)
    assert torch.equal(loaded.eval().output(x), expected)
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in module.state_dict().items()
    }
    begun = Clipped()
    again = trainer(tmp_path / "again", LoraCallback(init_from=str(path)), max_epochs=0)
    again.fit(begun, data())
    assert torch.equal(begun.eval().output(x), expected)


class FollowedHead(Clipped):
    """A head that trains in full, and a frozen copy that follows all that it has."""

    def build(self) -> None:
        super().build()
        self.ema = copy.deepcopy(self.head).requires_grad_(False)

    def output(self, x: Tensor) -> Tensor:
        return super().output(x) + self.ema(self.net(x))

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        for s, t in zip(self.head.parameters(), self.ema.parameters(), strict=True):
            t.mul_(0.9).add_(s, alpha=0.1)


def test_a_copy_that_follows_a_head(tmp_path: Path) -> None:
    module, plain = FollowedHead(), FollowedHead()
    options = {"r": 2, "target_modules": ["net"], "modules_to_save": ["head"]}
    run = trainer(tmp_path, LoraCallback(**options))
    run.fit(module, data())
    x = torch.ones(2, 8)
    expected = module.eval().output(x)
    assert (module.ema.weight - plain.ema.weight).abs().max() > 1e-3
    loaded = load_from_checkpoint(FollowedHead, tmp_path / "step=8.ckpt").eval()
    assert torch.equal(loaded.output(x), expected)
    other = FollowedHead()
    load_adapter(other, tmp_path / "step=8.ckpt")
    assert torch.equal(other.eval().output(x), expected)


class MovesLate(InPlace):
    def move(self, y: Tensor) -> None:
        if self.global_step > 3:
            super().move(y)


def test_a_parameter_cannot_go_back_to_where_nobody_kept_it(tmp_path: Path) -> None:
    module = fit(MovesLate, tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"has moved slow\.\w+, slow\.\w+ of its base"):
        trainer(tmp_path / "b").test(module, data(), ckpt_path=str(tmp_path / "step=2.ckpt"))
    early = trainer(tmp_path / "c").test(
        MovesLate(), data(), ckpt_path=str(tmp_path / "step=2.ckpt"), verbose=False
    )
    assert early  # a module that is made anew has it


class CentreLate(Centred):
    def move(self, y: Tensor) -> None:
        if self.global_step > 3:
            super().move(y)


def test_a_buffer_goes_back(tmp_path: Path) -> None:
    module, file = fit(CentreLate, tmp_path), str(tmp_path / "step=2.ckpt")
    assert module.centre.any()
    trainer(tmp_path / "b").test(module, data(), ckpt_path=file, verbose=False)
    assert not module.centre.any()


def test_a_moved_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    class Wider(DataAssigned):
        def build(self) -> None:
            self.slow = nn.Linear(8, 1).requires_grad_(False)

    fit(DataAssigned, tmp_path)
    file = str(tmp_path / "step=8.ckpt")
    with pytest.raises(AdapterMismatchError, match=r"slow"):
        trainer(tmp_path / "b").test(Wider(), data(), ckpt_path=file)
    module = Wider()
    with pytest.raises(AdapterMismatchError, match=r"slow"):
        load_adapter(module, file)
    assert not hasattr(module.net, "adapters")


class InParts(DataAssigned):
    def build(self) -> None:
        super().build()
        self.part = nn.Sequential(self.net, nn.Tanh())
        self.part.register_buffer("mean", torch.zeros(4))
        del self.net

    def move(self, y: Tensor) -> None:
        super().move(y)
        self.part.mean = y.mean(0)

    def output(self, x: Tensor) -> Tensor:
        return self.part(x) - self.slow(x).detach() - self.part.mean


def test_a_part_of_the_module_is_told_what_is_left_out(tmp_path: Path) -> None:
    lora, module = LoraCallback(r=2, target_modules=["part.0"]), InParts()
    trainer(tmp_path, lora).fit(module, data())
    part = InParts().part
    with pytest.warns(UserWarning, match=r"moved slow\.bias of its base.*no place"):
        load_adapter(part, str(tmp_path / "step=8.ckpt"))
    assert torch.equal(part.mean, module.part.mean)
    assert part.mean.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(InParts(), str(tmp_path / "step=8.ckpt"))


def test_init_from_starts_a_run_of_the_same_base(tmp_path: Path) -> None:
    fit(DataAssigned, tmp_path)
    module = DataAssigned()
    lora = LoraCallback(init_from=str(tmp_path / "step=4.ckpt"))
    trainer(tmp_path / "next", lora, max_epochs=1).fit(module, data())
    again = load_from_checkpoint(DataAssigned, tmp_path / "next/step=4.ckpt")
    assert_same(everything(again), everything(module))


# -- hooks of the module that take away, rename or copy ------------------------------------------


class Hooked(Bank):
    """A module with a frozen layer that it does not want to see in files."""

    def build(self) -> None:
        super().build()
        self.big = nn.Linear(8, 4)

    def output(self, x: Tensor) -> Tensor:
        return super().output(x) + self.big(x)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return LightningModule.state_dict(self, *args, **kwargs)


class DropsBig(Hooked):  # Lightning's documentation on partial checkpoints
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {n: v for n, v in self._plain(*args, **kwargs).items() if not n.startswith("net")}


class Renames(Hooked):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"model.{n}": v for n, v in self._plain(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        plain = {name.removeprefix("model."): v for name, v in state_dict.items()}
        return super().load_state_dict(plain, strict)


class Halves(Hooked):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {n: v.half() for n, v in self._plain(*args, **kwargs).items()}


class KeepsNothing(Hooked):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {}

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:  # type: ignore[override]
        """Nothing is taken, nothing is returned."""


class LoadsOtherwise(Hooked):
    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        own = {n: torch.zeros_like(v) for n, v in state_dict.items() if "adapters" in n}
        return super().load_state_dict({"bank": self.bank * 0, **own}, strict=False)


class SavesLess(Hooked):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v for n, v in state.items() if n == "big.weight"}
        checkpoint["mine"] = 1


class SavesNone(Hooked):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].clear()
        del checkpoint["state_dict"], checkpoint["loops"]
        checkpoint.pop("optimizer_states", None)
        checkpoint["mine"] = 1


class SavesCast(Hooked):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["state_dict"].items():
            checkpoint["state_dict"][name] = value.half()
        checkpoint["mine"] = 1


class LoadsLess(Hooked):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        assert state["big.weight"].shape == (4, 8)  # it sees what it would see without adapters
        assert set(self._plain()) <= state.keys()
        checkpoint["state_dict"] = {"big.weight": state["big.weight"]}


class PopsOnLoad(Hooked):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [n for n in checkpoint["state_dict"] if "net" in n or "bank" in n]:
            del checkpoint["state_dict"][name]


HOOKED = [DropsBig, Renames, Halves, KeepsNothing, LoadsOtherwise]
HOOKED += [SavesLess, SavesNone, SavesCast, LoadsLess, PopsOnLoad]


@pytest.mark.slow
@pytest.mark.parametrize("make", HOOKED, ids=lambda make: make.__name__)
def test_no_hook_of_the_module_takes_anything_away(make: type[Hooked], tmp_path: Path) -> None:
    module = assert_taken_up(make, tmp_path)
    state = saved(tmp_path / "step=8.ckpt")
    assert torch.equal(state["net.adapters.default.lora_B"], module.net.adapters["default"].lora_B)
    assert not any("big" in name and "adapters" not in name for name in state)
    mine = torch.load(tmp_path / "step=8.ckpt", weights_only=True).get("mine")
    assert mine == (1 if "on_save_checkpoint" in vars(make) else None)


@pytest.mark.parametrize("make", [DropsBig, SavesNone, SavesCast], ids=lambda make: make.__name__)
def test_weights_only_checkpoints_too(make: type[Hooked], tmp_path: Path) -> None:
    module, run = make(), trainer(tmp_path)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert_same(everything(load_from_checkpoint(Hooked, tmp_path / "weights.ckpt")),
                everything(module))  # fmt: skip


def test_extra_state_goes_back_too(tmp_path: Path) -> None:
    module = fit(Counted, tmp_path)
    assert module.steps.count == 8
    trainer(tmp_path / "b").test(
        module, data(), ckpt_path=str(tmp_path / "step=3.ckpt"), verbose=False
    )
    assert module.steps.count == 3


def test_masked_weights_are_said_and_saved(tmp_path: Path) -> None:
    fit(Masked, tmp_path)
    assert not saved(tmp_path / "step=1.ckpt")["conv.weight"][..., 2].any()


# -- two processes -------------------------------------------------------------------------------


class Follows(DataAssigned):
    """The frozen layer follows what `net` computes with, which is the same on every process."""

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        effective = (self.net(torch.eye(8)) - self.net(torch.zeros(8))).T
        self.slow.weight.data = 0.9 * self.slow.weight.data + 0.1 * effective


def in_two(folder: Path) -> list[str]:
    def run(step: int | None, seed: int) -> dict[str, Any]:
        seed_everything(seed, verbose=False)
        module, where = Follows(), folder if step is None else folder / "again"
        ckpt = None if step is None else str(folder / f"step={step}.ckpt")
        two = trainer(where, strategy="ddp", devices=2)
        two.fit(module, data(), ckpt_path=ckpt)
        return everything(module)

    straight, again = run(None, 0), run(1, 1)
    return [name for name in straight if not torch.equal(straight[name], again[name])]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    assert on_processes(2, in_two, tmp_path) == [[], []]
    assert "slow.weight" in saved(tmp_path / "step=1.ckpt")


@pytest.mark.parametrize("weights_only", [False, True])
def test_another_trainer_has_the_module_by_now(tmp_path: Path, weights_only: bool) -> None:
    """What a Trainer saves is that of its run, whoever has evaluated the module in between."""
    seed_everything(0, verbose=False)
    module, run = Net(), make_trainer(tmp_path, LoraCallback(**OPTIONS), TrainingProgress())
    run.fit(module, Data())
    run.save_checkpoint(tmp_path / "before.ckpt", weights_only)
    other = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    other.predict(module, Data())
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only)
    assert module.trainer is other
    before, after = (torch.load(tmp_path / f"{name}.ckpt") for name in ("before", "after"))
    assert_same(after["state_dict"], before["state_dict"])
    assert after[KEY]["adapters"] == before[KEY]["adapters"]
    assert ("optimizer_states" in after) is not weights_only
    if not weights_only:
        assert after["loops"] == before["loops"]
        longer = make_trainer(tmp_path, LoraCallback(**OPTIONS), max_epochs=2)
        longer.fit(Net(), Data(), ckpt_path=tmp_path / "after.ckpt")
        assert longer.global_step == 2 * run.global_step
