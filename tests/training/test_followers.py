"""A teacher that follows its student goes on to do so when adapters come (BYOL, MoCo, DINO).

The truth is what the user's own loop says: the teacher is the moving average of what the student
computes with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lora_lightning import (
    LoraCallback,
    load_adapter,
    load_from_checkpoint,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unload,
)
from lora_lightning.engine import followers
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.traversal import named_adapted_layers
from tests.helpers.moving_modules import Moving, data, everything, saved, trainer

M = 0.8
pytestmark = pytest.mark.filterwarnings("ignore:.*trainable tensors had no gradient")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


class Byol(Moving):
    """A copied teacher, moved by `t.data = ...`."""

    def build(self) -> None:
        self.net = net()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        for s, t in zip(self.net.parameters(), self.target.parameters(), strict=True):
            t.data = M * t.data + (1 - M) * s.data

    def output(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1) - self.target(x).detach()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class ByStateDict(Byol):
    """As timm does it."""

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        for t, s in zip(
            self.target.state_dict().values(), self.net.state_dict().values(), strict=True
        ):
            t.copy_(M * t + (1 - M) * s)


class ByName(Byol):
    """In place, by name."""

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        own = dict(self.net.named_parameters())
        for name, t in self.target.named_parameters():
            t.lerp_(own[name], 1 - M)


class Free(Byol):
    """The teacher is not frozen: it is left out of the optimizer and computed without gradient."""

    def build(self) -> None:
        self.net = net()
        self.target = copy.deepcopy(self.net)

    def output(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.target(x)
        return self.net(x + 0.1) - target


class Averaged(Byol):
    """torch's own average of a module, frozen or not."""

    frozen = False

    def build(self) -> None:
        self.net = net()
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(M))
        if self.frozen:
            self.average.requires_grad_(False)

    def move(self, y: Tensor) -> None:
        self.average.update_parameters(self.net)

    def output(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.average(x)
        return self.net(x + 0.1) - target


class FrozenAverage(Averaged):
    frozen = True


class WithBuffers(Averaged):
    """The equal average of all buffers as well."""

    def build(self) -> None:
        self.net = net()
        self.average = AveragedModel(self.net, use_buffers=True)


class OfOneLayer(FrozenAverage):
    """The student is a single layer, and the average that lies in another module, too."""

    def build(self) -> None:
        self.net = nn.Linear(8, 4)
        average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(M))
        self.averages = nn.ModuleDict({"net": average}).requires_grad_(False)

    @property
    def average(self) -> Any:
        return self.averages["net"]


class TargetNetwork(Free):
    """Values are taken over at once, every other step (DQN)."""

    def move(self, y: Tensor) -> None:
        if self.global_step % 2:
            self.target.load_state_dict(self.net.state_dict())


class InParts(Byol):
    """Backbone and head by themselves, the teacher's in a ModuleDict."""

    def build(self) -> None:
        self.net, self.head = net(), nn.Sequential(nn.Linear(4, 4))
        self.momentum = nn.ModuleDict(
            {"head": copy.deepcopy(self.head), "backbone": copy.deepcopy(self.net)}
        ).requires_grad_(False)

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        for mine, its in ((self.net, "backbone"), (self.head, "head")):
            for s, t in zip(mine.parameters(), self.momentum[its].parameters(), strict=True):
                t.data.mul_(M).add_(s.data, alpha=1 - M)

    def output(self, x: Tensor) -> Tensor:
        target = self.momentum["head"](self.momentum["backbone"](x)).detach()
        return self.head(self.net(x + 0.1)) - target


class Moco(Byol):
    """A teacher that is built as the student is, and takes its values over."""

    def build(self) -> None:
        self.net, self.target = net(), net()
        for s, t in zip(self.net.parameters(), self.target.parameters(), strict=True):
            t.data.copy_(s.data)
            t.requires_grad = False


class Dino(Byol):
    """A teacher with values of its own."""

    def build(self) -> None:
        self.net, self.target = net(), net().requires_grad_(False)


class LateDino(Dino):
    """The same, which moves from the second epoch on."""

    def move(self, y: Tensor) -> None:
        if self.current_epoch:
            super().move(y)


class Distillation(Dino):
    """A frozen network that nobody moves."""

    def move(self, y: Tensor) -> None:
        """Not at all."""


COPIES = [
    Byol,
    ByStateDict,
    ByName,
    InParts,
    Moco,
    Free,
    TargetNetwork,
    Averaged,
    FrozenAverage,
    WithBuffers,
    OfOneLayer,
]
FOLLOWING = [*COPIES, Dino, LateDino]
TYPES: dict[str, Callable[[], LoraCallback]] = {
    "all-linear": lambda: LoraCallback(r=2),
    "by name": lambda: LoraCallback(r=2, target_modules=["0"]),
    "student": lambda: LoraCallback(r=2, module="net"),
    "head": lambda: LoraCallback(r=2, target_modules=["0"], modules_to_save=["2"]),
    "dora": lambda: LoraCallback(r=2, use_dora=True),
    "pattern": lambda: LoraCallback(r=2, rank_pattern={"net.2": 3}),
}


def fit(
    make: type[Moving],
    folder: Path,
    step: int | None = None,
    seed: int = 0,
    lora: Callable[[], LoraCallback] = TYPES["all-linear"],
    callbacks: tuple[Callback, ...] = (),
) -> Moving:
    torch.manual_seed(seed)
    module = make()
    ckpt = None if step is None else str(folder / f"step={step}.ckpt")
    run = trainer(folder if step is None else folder / f"again{step}", lora())
    run.callbacks.extend(callbacks)
    run.fit(module, data(), ckpt_path=ckpt)
    return module


def all_tensors(module: Moving) -> dict[str, Tensor]:
    return {n: t for n, t in everything(module).items() if not n.endswith("applied")}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def effective(module: nn.Module) -> list[Tensor]:
    """The weights that a network computes with, in float64."""
    merged = copy.deepcopy(module).double()
    for _, layer in named_adapted_layers(merged):
        layer.active_adapters = [*layer.adapters]
    merge_and_unload(merged)
    return [p.detach() for p in merged.parameters()]


def teacher(module: Any) -> nn.Module:
    found = [m for n, m in module.named_modules() if n in PLACES]
    return found[0]


PLACES = ("target", "momentum.backbone", "average.module", "averages.net.module")


class Watch(Callback):
    """The moving average of what the student computes with, by its definition."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = self.average = effective(pl_module.target)  # type: ignore[arg-type]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        # The module moves its teacher before the step that it makes here
        now = effective(pl_module.net)
        self.average = [M * a + (1 - M) * s for a, s in zip(self.average, now, strict=True)]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return float(torch.cat([(a - b).flatten() for a, b in zip(one, other, strict=True)]).norm())


@pytest.mark.slow
@pytest.mark.parametrize("make", [Byol, ByStateDict, ByName, Moco, Free])
@pytest.mark.parametrize("lora", TYPES)
def test_a_copied_teacher_follows_what_its_student_computes_with(
    make: type[Moving], lora: str, tmp_path: Path
) -> None:
    watch = Watch()
    module = fit(make, tmp_path, lora=TYPES[lora], callbacks=(watch,))
    went = distance(watch.average, watch.start)
    assert went > 0.02
    # Factors are averaged, not their product: the same to first order.
    assert distance(effective(module.target), watch.average) < 0.15 * went


@pytest.mark.slow
@pytest.mark.parametrize("make", FOLLOWING, ids=lambda make: make.__name__)
@pytest.mark.parametrize("lora", TYPES)
def test_both_are_in_step(make: type[Moving], lora: str, tmp_path: Path) -> None:
    if make is InParts and lora in ("student", "head"):
        pytest.skip("half of the student is adapted")
    if make is OfOneLayer and lora not in ("all-linear", "dora"):
        pytest.skip("the options name layers inside of the student, which is one itself")
    seen: list[Any] = []
    tensors: list[list[Tensor]] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            one: Any = pl_module.net
            other = teacher(pl_module)
            for part in (one, other):
                seen.append([(n, p.shape) for n, p in part.named_parameters()])
                seen.append(list(part.state_dict()))
                tensors.append([t.clone() for t in part.state_dict().values()])
            asked_for = lora in ("by name", "head") and make in (Dino, LateDino)
            if asked_for or make in (Free, TargetNetwork, Averaged, WithBuffers):
                return
            for _ in range(2):
                assert [n for n, p in other.named_parameters() if p.requires_grad] == []
                set_adapter(pl_module, "default")

    fit(make, tmp_path, lora=TYPES[lora], callbacks=(Look(),))
    assert seen[:2] == seen[2:]
    if make in COPIES:
        assert all(map(torch.equal, *tensors))
    assert any("adapters" in name for name in seen[1])


@pytest.mark.slow
@pytest.mark.parametrize("make", [*FOLLOWING, Distillation], ids=lambda make: make.__name__)
@pytest.mark.parametrize("lora", ["all-linear", "dora", "head"])
def test_taken_up_again_under_another_seed(make: type[Moving], lora: str, tmp_path: Path) -> None:
    if make is OfOneLayer and lora == "head":
        pytest.skip("the student is one layer and has no head")
    straight = all_tensors(fit(make, tmp_path, lora=TYPES[lora]))
    for seed, step in enumerate((3, 4, 6), 1):
        assert_same(all_tensors(fit(make, tmp_path, step, seed, TYPES[lora])), straight)


def test_without_the_teachers_adapters_it_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: what is carried is not in the file."""
    import lora_lightning.training.checkpoint_io.baseline as baseline

    straight = all_tensors(fit(Byol, tmp_path / "one"))
    monkeypatch.setattr(baseline, "carried_tensors", lambda *args, **kwargs: [])
    fit(Byol, tmp_path)
    again = all_tensors(fit(Byol, tmp_path, 3, 1))
    assert any(not torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.slow
@pytest.mark.parametrize("make", FOLLOWING, ids=lambda make: make.__name__)
def test_read_back_in_every_way(make: type[Moving], tmp_path: Path) -> None:
    trained = fit(make, tmp_path)
    now, file = all_tensors(trained), str(tmp_path / "step=8.ckpt")
    assert_same(all_tensors(load_from_checkpoint(make, file)), now)
    by_hand = make()
    load_adapter(by_hand, file, "default")
    assert_same(all_tensors(by_hand), now)
    fresh, started = make(), make()
    (seen,) = trainer(tmp_path / "b", LoraCallback(r=2)).test(trained, data(), verbose=False)
    for module, lora, ckpt in (
        (fresh, LoraCallback(r=2), file),
        (trained, LoraCallback(r=2), file),
        (started, LoraCallback(init_from=file), None),
    ):
        run = trainer(tmp_path / "c", lora)
        assert run.test(module, data(), ckpt_path=ckpt, verbose=False) == [seen]


def test_another_name_for_the_adapter(tmp_path: Path) -> None:
    trained = fit(Byol, tmp_path)
    module = Byol()
    load_adapter(module, str(tmp_path / "step=8.ckpt"), "style")
    x = torch.randn(3, 8)
    assert torch.equal(module.output(x), trained.output(x))


def test_the_students_part_alone_loads(tmp_path: Path) -> None:
    trained, part = fit(Byol, tmp_path), Byol().net
    with pytest.warns(UserWarning, match=r"has moved .*target.* no place"):
        load_adapter(part, str(tmp_path / "step=8.ckpt"))
    x = torch.randn(3, 8)
    assert torch.equal(part(x), trained.net(x))


def test_a_peft_folder_is_the_students(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trained = fit(Byol, tmp_path)
    save_adapter(trained, tmp_path / "folder")
    keys = load_file(tmp_path / "folder/adapter_model.safetensors")
    assert keys
    assert not any("target" in key for key in keys)
    assert "target" not in (tmp_path / "folder/adapter_config.json").read_text().replace(
        "target_modules", ""
    ).replace("target_parameters", "")


# -- what does not follow ----------------------------------------------------------------------


def adapted(module: nn.Module) -> list[str]:
    return [path for path, _ in named_adapted_layers(module)]


def test_nobody_moves_a_network_to_distil_from(tmp_path: Path) -> None:
    x = torch.randn(5, 8)
    before = Distillation().target(x)
    module = fit(Distillation, tmp_path)
    assert torch.equal(module.target(x), before)
    assert adapted(module) == ["net.0", "net.2"]
    for step in range(1, 9):
        assert not any("target" in key for key in saved(tmp_path / f"step={step}.ckpt"))
    assert adapted(load_from_checkpoint(Distillation, tmp_path / "step=8.ckpt")) == adapted(module)


def test_a_network_that_is_asked_for_by_name_trains(tmp_path: Path) -> None:
    def lora() -> LoraCallback:
        return LoraCallback(r=2, target_modules=["net.0", "target.0"])

    class Both(Distillation):
        def output(self, x: Tensor) -> Tensor:
            return self.net(x) - self.target(x)

    module = fit(Both, tmp_path, lora=lora)
    assert module.target[0].adapters["default"].lora_B.any()
    again = fit(Both, tmp_path, 3, 1, lora)
    assert_same(all_tensors(again), all_tensors(module))


def test_all_of_it_can_be_taken_off(tmp_path: Path) -> None:
    module = fit(Byol, tmp_path)
    assert len(adapted(module)) == 4
    x = torch.randn(5, 8)
    output = module.output(x)
    merged = copy.deepcopy(module)
    merge_and_unload(merged)
    torch.testing.assert_close(merged.output(x), output)
    unload(module)
    assert not any(
        isinstance(part, AdaptedLayer) for part in (*merged.modules(), *module.modules())
    )


class Stack(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def pairs(module: nn.Module) -> list[tuple[str, str, bool]]:
    return [(f.teacher, f.student, f.is_copy) for f in followers.find_followers(module)]


def test_which_modules_follow() -> None:
    one, frozen = net(), net().requires_grad_(False)
    twin = copy.deepcopy(one).requires_grad_(False)
    assert pairs(Stack(one=one, twin=twin)) == [("twin", "one", True)]
    assert pairs(Stack(one=one, frozen=frozen)) == [("frozen", "one", False)]
    assert pairs(Stack(inner=Stack(one=one), twin=twin)) == [("twin", "inner.one", True)]
    # Nothing is like it, it is not frozen, nothing else trains, it is the same
    assert pairs(Stack(one=one, other=nn.Sequential(nn.Linear(8, 4)).requires_grad_(False))) == []
    assert pairs(Stack(one=one, two=net())) == []
    assert pairs(Stack(frozen=frozen, twin=twin)) == []
    assert pairs(Stack(one=one, again=one)) == []
    # The first layers of a stack, frozen, and siblings that are no networks
    layers = nn.ModuleList([net().requires_grad_(False), net(), net()])
    assert pairs(Stack(layers=layers)) == []
    q, k = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    assert pairs(Stack(q=q, k=k)) == []


def test_which_free_modules_are_copies() -> None:
    one = net()
    (found,) = followers.find_followers(Stack(one=one, two=copy.deepcopy(one)))
    assert (found.teacher, found.student, found.is_free) == ("two", "one", True)
    clones = nn.ModuleList([copy.deepcopy(one) for _ in range(3)])
    assert pairs(Stack(layers=clones)) == []
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 3)
    assert pairs(Stack(encoder=encoder)) == []


def test_a_copy_of_a_single_layer_follows() -> None:
    linear = nn.Linear(4, 4)
    assert pairs(Stack(s=linear, t=copy.deepcopy(linear).requires_grad_(False))) == [
        ("t", "s", True)
    ]


def test_the_run_says_who_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Byol, tmp_path)
    out = capsys.readouterr().out
    assert out.count("target is a frozen copy of net: it carries the same adapters") == 1
    assert "trainable 88 of" in out  # the student's alone
