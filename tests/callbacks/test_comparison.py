"""Validation without and with the adapter: the numbers, the verdict, and what stays untouched."""

from __future__ import annotations

import csv
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console

from lora_lightning import LoraCallback, compare_with_base
from lora_lightning.callbacks import Comparison, comparison
from lora_lightning.errors import ConfigError
from tests.helpers.lightning_modules import BuiltInConfigureModel, Data, Net, make_trainer
from tests.helpers.processes import on_processes


class Metered(Net):
    """Loss and accuracy; its base is what `Net()` gives."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = self(batch[0])
        loss = torch.nn.functional.cross_entropy(scores, batch[1])
        self.log("val_loss", loss, sync_dist=True)
        self.log("val_accuracy", (scores.argmax(1) == batch[1]).float().mean(), sync_dist=True)


def truth(net: torch.nn.Module) -> dict[str, float]:
    """The metrics in float64."""
    x, y = Data().dataset.tensors
    net = net.double().eval()
    with torch.no_grad():
        scores = net(x.double())
    loss = torch.nn.functional.cross_entropy(scores, y)
    return {"val_loss": float(loss), "val_accuracy": float((scores.argmax(1) == y).double().mean())}


def fitted(folder: Path, module: LightningModule, *callbacks: Any, **options: Any) -> Any:
    lora = LoraCallback(r=4, target_modules=["2", "embed"])
    trainer = make_trainer(folder, lora, *callbacks, **{"max_epochs": 10, **options})
    trainer.fit(module, Data())
    return trainer


def test_base_and_tuned_are_what_they_are(tmp_path: Path) -> None:
    module = Metered()
    trainer = fitted(tmp_path, module)
    compared = compare_with_base(trainer)
    assert compared.base == pytest.approx(truth(Net()), rel=1e-5)
    assert compared.tuned == pytest.approx(truth(module), rel=1e-5)
    assert compared.tuned["val_loss"] < 0.9 * compared.base["val_loss"]
    assert compared.helped
    assert compared.verdict.startswith("the adapter lowers val_loss by ")


def test_a_comparison_that_forgets_to_disable_is_seen(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(comparison, "disable_adapter", lambda module: nullcontext())
    compared = compare_with_base(fitted(tmp_path, Metered()))
    assert compared.base != pytest.approx(truth(Net()), rel=1e-2)
    assert compared.verdict.startswith("the adapter changes nothing: val_loss stays ")


def test_nothing_else_changes(tmp_path: Path) -> None:
    module, logger = Metered(), CSVLogger(tmp_path)
    trainer = fitted(tmp_path, module, logger=logger, log_every_n_steps=1)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    callbacks, modes = list(trainer.callbacks), [m.training for m in module.modules()]
    rows = Path(logger.log_dir, "metrics.csv").read_text().count("\n")
    torch.manual_seed(5)
    compared = compare_with_base(trainer)
    drawn = torch.rand(3)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert trainer.callbacks == callbacks
    assert trainer.loggers == [logger]
    assert [m.training for m in module.modules()] == modes
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    with Path(logger.log_dir, "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert len(logged) == rows  # one more than before, beside the header
    last = {key: float(value) for key, value in logged[-1].items() if value}
    assert last["base/val_loss"] == pytest.approx(compared.base["val_loss"])
    assert last["tuned/val_accuracy"] == pytest.approx(compared.tuned["val_accuracy"])
    assert last["step"] == 40
    assert "val_loss" not in last
    trainer.fit_loop.max_epochs = 12
    trainer.fit(module, Data())  # it trains on


def test_both_passes_draw_the_same(tmp_path: Path) -> None:
    class Augmented(Metered):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)

    module = Augmented()
    trainer = fitted(tmp_path, module, max_epochs=1, limit_train_batches=1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    compared = compare_with_base(trainer, module, Data())
    assert compared.base == compared.tuned
    assert compared.helped is None


def test_data_that_fit_was_given(tmp_path: Path) -> None:
    data = Data()
    trainer = make_trainer(
        tmp_path, LoraCallback(r=2, target_modules=["embed"]), limit_val_batches=2
    )
    trainer.fit(Metered(), data.train_dataloader(), data.val_dataloader())
    compared = compare_with_base(trainer)  # limit_val_batches holds here as well
    x, y = (t[:32] for t in Data().dataset.tensors)
    loss = torch.nn.functional.cross_entropy(Net().eval()(x), y).detach()
    assert compared.base["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert compared.standard_error is None  # of two batches


def test_fast_dev_run(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Metered(), fast_dev_run=True)
    assert set(compare_with_base(trainer).base) == {"val_loss", "val_accuracy"}


def test_a_model_built_late_and_a_trained_copy(tmp_path: Path) -> None:
    lora = LoraCallback(r=4, target_modules=["embed"], modules_to_save=["head"])
    trainer = make_trainer(tmp_path, lora, max_epochs=3)
    trainer.fit(BuiltInConfigureModel(), Data())
    compared = compare_with_base(trainer)
    assert compared.base["val_loss"] == pytest.approx(truth(Net())["val_loss"], rel=1e-5)
    assert compared.lines()[1] == (
        "base: with head (modules_to_save) as before training, which is random where it was newly "
        "initialised"
    )


def test_what_a_checkpoint_monitors_decides(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")
    compared = compare_with_base(fitted(tmp_path, Metered(), saver))
    assert compared.headline == "val_accuracy"
    assert compared.mode == "max"
    assert compared.helped
    assert compared.verdict.startswith("the adapter raises val_accuracy by ")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["f1", "val_loss", "b_loss"], ("val_loss", "min")),
        (["val_wer"], ("val_wer", "min")),
        (["answer_accuracy"], ("answer_accuracy", "max")),  # its letters hold "wer"
        (["exact"], ("exact", None)),
    ],
)
def test_the_metric_that_decides(names: list[str], found: Any) -> None:
    assert comparison._headline(Trainer(logger=False, enable_checkpointing=False), names) == found


def test_an_error_leaves_the_adapter_on(tmp_path: Path) -> None:
    class Fails(Metered):
        fails = False

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.fails:
                raise ZeroDivisionError
            super().validation_step(batch, batch_idx)

    module = Fails()
    trainer = fitted(tmp_path, module)
    before, callbacks = module.eval()(torch.ones(1, 8)), list(trainer.callbacks)
    module.fails = True
    with pytest.raises(ZeroDivisionError):
        compare_with_base(trainer)
    assert torch.equal(module.eval()(torch.ones(1, 8)), before)
    assert trainer.callbacks == callbacks


class Silent(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Untested(Net):
    validation_step = LightningModule.validation_step  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:.*have no `validation_step`:UserWarning")
@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Untested, {}, r"Untested has no validation_step to compare with its base by. \(model\)"),
        (Silent, {}, r"the validation data are empty, or nothing is logged .* \(data.val\)"),
        (Net, {"limit_val_batches": 0}, r"are left out. \(trainer.limit_val_batches\)"),
    ],
)
def test_nothing_to_compare(tmp_path: Path, module: Any, options: Any, message: str) -> None:
    trainer = fitted(tmp_path, module(), max_epochs=1, **options)
    with pytest.raises(ConfigError, match=message):
        compare_with_base(trainer)


def test_no_adapter(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match="this Trainer has run none"):
        compare_with_base(trainer)
    trainer.fit(Net(), Data())
    with pytest.raises(ConfigError, match="Net has no adapter to compare with its base"):
        compare_with_base(trainer)


class WithoutValidation(Data):
    def val_dataloader(self) -> Any:
        return []


@pytest.mark.filterwarnings("ignore:Total length of `list`:UserWarning")
def test_no_validation_data(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraCallback(r=2, target_modules=["embed"]))
    trainer.fit(Net(), Data().train_dataloader())
    with pytest.raises(ConfigError, match=r"no validation data .* \(data.val;"):
        compare_with_base(trainer)
    trainer = make_trainer(tmp_path, LoraCallback(r=2, target_modules=["embed"]))
    trainer.fit(Net(), WithoutValidation())
    with pytest.raises(ConfigError, match=r"the validation data are empty"):
        compare_with_base(trainer)


def of(base: float, tuned: float, **options: Any) -> Comparison:
    options = {"headline": "loss", "mode": "min", **options}
    name = options["headline"]
    return Comparison({name: base}, {name: tuned}, **options)


@pytest.mark.parametrize(
    ("compared", "helped", "verdict"),
    [
        (of(2.0, 1.5), True, "the adapter lowers loss by 25.0 %"),
        (of(2.0, 1.5, standard_error=0.05), True, "the adapter lowers loss by 25.0 % +- 5.0 %"),
        (of(2.0, 2.5), False, "the adapter raises loss by 25.0 %, which is worse"),
        (
            of(2.0, 1.9, standard_error=0.06),
            None,
            "no clear difference: loss changes by 5.0 % +- 6.0 %",
        ),
        (of(2.0, 2.0), None, "the adapter changes nothing: loss stays 2"),
        (of(2.0, math.nan), None, "loss is not finite: 2 before, nan after"),
        (of(0.0, 1.5, headline="x", mode=None), None, "the adapter raises x by 1.5"),
        (of(0.0, 0.5), False, "the adapter raises loss by 0.5, which is worse"),  # no share
        (of(0.4, 0.1), True, "the adapter lowers loss by 75.0 %"),
        (
            of(0.067, 0.795, headline="acc", mode="max"),
            True,
            "the adapter raises acc by 72.8 points (0.067 -> 0.795)",
        ),
        (
            of(0.5, 0.4, headline="f1", mode="max", standard_error=0.01),
            False,
            "the adapter lowers f1 by 10.0 points +- 2.0 (0.500 -> 0.400), which is worse",
        ),
        (
            of(0.5, 0.51, headline="f1", mode="max", standard_error=0.01),
            None,
            "no clear difference: f1 changes by 1.0 points +- 2.0",
        ),
    ],
)
def test_verdicts(compared: Comparison, helped: bool | None, verdict: str) -> None:
    assert compared.helped is helped
    assert compared.verdict == verdict


def test_standard_error_is_that_of_paired_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(50, generator=generator, dtype=torch.float64) * 100
    change = torch.randn(50, generator=generator, dtype=torch.float64)
    pairs = [[(float(v), 8.0) for v in values] for values in (base, base + change)]
    assert comparison._standard_error(*pairs) == pytest.approx(float(change.std() / 50**0.5))
    assert comparison._standard_error([(0.0, 0.0)] * 4, [(0.0, 0.0)] * 4) is None  # nothing counts


def test_standard_error_of_a_run(tmp_path: Path) -> None:
    """From what validation logs, against the losses of single batches."""
    module = Metered()
    compared = compare_with_base(fitted(tmp_path, module))
    x, y = Data().dataset.tensors

    def losses(net: Any) -> torch.Tensor:
        each = torch.nn.functional.cross_entropy(
            net.double().eval()(x.double()), y, reduction="none"
        )
        return each.reshape(4, 16).mean(1)

    difference = (losses(module) - losses(Net())).detach()
    assert compared.standard_error == pytest.approx(float(difference.std() / 2), rel=1e-4)


def test_the_table_fits_a_terminal() -> None:
    names = ["val_loss", "val_perplexity", "val_accuracy"]
    base = dict.fromkeys(names, 123.456)
    compared = Comparison(base, dict.fromkeys(names, 0.0123456), "val_loss", "min", title="t")
    console = Console(width=80)
    with console.capture() as captured:
        console.print(compared.table())
    lines = captured.get().splitlines()
    assert len(lines) == 8  # nothing is broken
    assert "│ val_loss       │ 123.5 │ 0.01235 │ -123.4 (-100.0 %) │" in lines


def test_shares_change_in_points_in_the_table() -> None:
    base, tuned = (
        {"acc": 0.067, "loss": 0.5, "count": 3.0},
        {"acc": 0.795, "loss": 0.4, "count": 6.0},
    )
    changes = Comparison(base, tuned, "loss").table().columns[3]
    assert [*changes.cells] == ["+72.8 points", "-0.1 (-20.0 %)", "+3 (+100.0 %)"]


def test_a_new_head_makes_the_base_row_chance() -> None:
    compared = of(0.1, 0.8, headline="acc", copies=["net.head", "norm"], new=["net.head"])
    assert compared.lines()[1:3] == [
        "base: its net.head is new and untrained, so its row is chance",
        "base: with norm (modules_to_save) as before training, which is random where it was newly "
        "initialised",
    ]


def compared_on_two(folder: str) -> list[Any]:
    strategy = {"strategy": "ddp", "devices": 2, "logger": CSVLogger(folder)}
    trainer = fitted(Path(folder), Metered(), **strategy)
    compared = compare_with_base(trainer)
    return [compared.base, compared.tuned, trainer.global_rank]


@pytest.mark.slow
def test_ddp(tmp_path: Path) -> None:
    (base, tuned, _), other = on_processes(2, compared_on_two, str(tmp_path))
    assert other == [base, tuned, 1]
    assert base == pytest.approx(truth(Net()), rel=1e-5)
    assert tuned["val_loss"] < 0.95 * base["val_loss"]
    (path,) = tmp_path.rglob("metrics.csv")
    assert path.read_text().splitlines()[0].count("base/val_loss") == 1


def compared_sharded(folder: str, meta: bool) -> list[Any]:
    from tests.helpers.fsdp2_modules import BuiltAndSharded, OnMeta

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    lora = LoraCallback(r=4, target_modules=["2", "embed"])
    options: Any = {"strategy": strategy, "devices": 2, "max_epochs": 10}
    trainer = make_trainer(Path(folder), lora, **options)
    module = OnMeta() if meta else BuiltAndSharded()
    trainer.fit(module, Data())
    compared = compare_with_base(trainer)
    last = trainer.callback_metrics["val_loss"]
    return [compared.base["val_loss"], compared.tuned["val_loss"], float(last)]


@pytest.mark.slow
@pytest.mark.parametrize("meta", [False, True])
def test_fsdp2(tmp_path: Path, meta: bool) -> None:
    from tests.helpers.fsdp2_modules import Quiet

    first, second = on_processes(2, compared_sharded, str(tmp_path), meta)
    # The module does not reduce over processes: the mean over them is that of all data.
    base, tuned = ((a + b) / 2 for a, b in zip(first[:2], second[:2], strict=True))
    assert base == pytest.approx(truth(Quiet())["val_loss"], rel=1e-5)
    assert tuned < 0.95 * base


@pytest.mark.slow
def test_processes_of_each_call(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Metered(), strategy="ddp_fork", devices=2)
    compared = compare_with_base(trainer, data=Data())
    assert compared.base == pytest.approx(truth(Net()), rel=1e-5)
    assert compared.tuned["val_loss"] < 0.95 * compared.base["val_loss"]
    with pytest.raises(ConfigError, match="from Python the argument `data`"):
        compare_with_base(trainer)
