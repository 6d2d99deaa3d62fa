"""FSDP1 on two gloo processes: the base sharded, adapters whole, files as of any other strategy.

FSDP1 needs CUDA; `OnCpu` is what lets it run without (Lightning asks for the exact type).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import wrap
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

from lora_lightning import LoraConfig, load_adapter, merge_adapter, save_adapter
from lora_lightning.checkpoint.sharded_folder import read_checkpoint_folder
from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.errors import AdapterStateError, ConfigError, LoraError
from lora_lightning.training.eva import ranks_of_checkpoint
from lora_lightning.training.strategies.fsdp1 import GradientAverage, check_fsdp
from lora_lightning.utilities.wrappers import plain_name
from tests.helpers.fsdp1_on_cpu import FORMS, UNITS, on_cpu
from tests.helpers.fsdp2_modules import Quiet
from tests.helpers.lightning_modules import BuiltInConfigureModel, Data, make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.sharded_runs import fit, make_callback, state_of
from tests.helpers.tensors import assert_same_state, same_state

WAYS: dict[str, dict[str, Any]] = {  # options of the Trainer, under FSDP1 and DDP alike
    "plain": {},
    "bf16-true": {"precision": "bf16-true"},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.05},
}


class OtherBasePerRank(Quiet):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.norm.bias.add_(int(os.environ["RANK"]))


class WrapsItself(Quiet):
    """Built in `__init__`, wrapped in `configure_model`."""

    def configure_model(self) -> None:
        self.body = wrap(self.body)


class BuildsAndWrapsItself(BuiltInConfigureModel):
    def configure_model(self) -> None:
        super().configure_model()
        if not isinstance(self.body, FullyShardedDataParallel):
            self.body = wrap(self.body)


class UsesHeadOnRankZero(Quiet):
    """An adapter that only one process needs in a step."""

    def forward(self, x: Any) -> Any:
        y = self.body(self.norm(self.embed(x)))
        return self.head(y) if os.environ.get("RANK", "0") == "0" else y[:, :3]


def train(
    folder: Path, way: Any, *callbacks: Any, epochs: int = 2, kind: Any = Quiet, **options: Any
) -> tuple[dict[str, Any], Any]:
    """Adapters and moments after training on two processes, and the Trainer."""
    seed_everything(7, verbose=False)
    module = kind()
    share = DataLoader(Data().dataset, 8, sampler=list(range(int(os.environ["RANK"]), 64, 2)))
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    settings = {
        "max_epochs": epochs,
        "strategy": way,
        "devices": 2,
        "use_distributed_sampler": False,
    }
    trainer = make_trainer(
        folder, *(callbacks or [make_callback()]), saver, **{**settings, **options}
    )
    trainer.fit(module, share, share)
    return state_of(trainer), trainer


def on_two(folder: Path) -> dict[str, Any]:
    """What every test below looks at."""
    found: dict[str, Any] = {}
    alone = folder / "alone/epoch=1.ckpt"
    for form, options in FORMS.items():
        for name, start in {
            form: None,
            f"{form} resumed": folder / form / "epoch=1.ckpt",
            f"{form} from one device": alone,
        }.items():
            state = fit(Quiet, folder / form, 4, start, on_cpu(**options))
            found[name] = {plain_name(key): value for key, value in state.items()}
    found["ddp from folder"] = fit(Quiet, folder / "ddp", 4, folder / "folder/epoch=1.ckpt", "ddp")
    for name, options in WAYS.items():
        found[f"fsdp {name}"], trainer = train(folder / "fsdp", on_cpu(**UNITS), **options)
        found[f"ddp {name}"], _ = train(folder / "ddp2", "ddp", **options)
        if name == "plain":
            found["unit"] = unit_of(trainer)
            module = trainer.lightning_module
            if trainer.is_global_zero:  # nobody else needs to take part
                save_adapter(module, folder / "peft")
                with pytest.raises(AdapterStateError) as merged:
                    merge_adapter(module)
                assert "split the weight of 'embed' over the processes" in str(merged.value)
            loader = Data().test_dataloader()
            tested = trainer.test(module, loader, verbose=False)[0]
            restored = make_trainer(folder, make_callback()).test(
                Quiet(), loader, ckpt_path=folder / "fsdp/epoch=1.ckpt", verbose=False
            )[0]
            found["tested"] = {key: torch.tensor(tested[key]) for key in tested}
            found["tested on one device"] = {key: torch.tensor(restored[key]) for key in tested}
    checkpointed = on_cpu(activation_checkpointing_policy={nn.Sequential}, **UNITS)
    found["fsdp recomputed"], _ = train(folder / "recomputed", checkpointed)
    for name, way in {"fsdp": on_cpu(**UNITS), "ddp": "ddp"}.items():
        dora = make_callback(use_dora=True)
        found[f"{name} dora"], _ = train(folder / name, way, dora)
    found["wraps itself"], _ = train(folder / "itself", on_cpu(), kind=WrapsItself)
    for name, way in {"fsdp": on_cpu(), "ddp": "ddp_find_unused_parameters_true"}.items():
        found[f"{name} unused"], _ = train(folder / name, way, kind=UsesHeadOnRankZero)
    found["refused"] = {
        "bias": refusal(folder, make_callback(bias="all", modules_to_save=None)),
        "late": refusal(folder, kind=BuildsAndWrapsItself),
        "averaging": refusal(folder, make_callback(), WeightAveraging(avg_fn=get_ema_avg_fn(0.9))),
        "base": refusal(folder, kind=OtherBasePerRank),
    }
    synced = on_cpu(sync_module_states=True, **UNITS)  # all get that of rank 0
    with pytest.raises(ValueError, match="requires them to be on GPU"):  # torch's, when it wraps
        train(folder / "synced", synced, kind=OtherBasePerRank)
    GradientAverage.__post_init__ = lambda self: None  # type: ignore[method-assign]
    found["broken"], _ = train(folder / "broken", on_cpu(**UNITS))
    return found


def refusal(folder: Path, *callbacks: Any, **options: Any) -> str:
    with pytest.raises(LoraError) as caught:
        train(folder / "refused", on_cpu(**UNITS), *callbacks, **options)
    return str(caught.value)


def unit_of(trainer: Any) -> dict[str, Any]:
    """The flat tensors of the units: of the base only, frozen, and each process has its half."""
    handles = trainer.model._all_handles
    flat = [handle.flat_param for handle in handles]
    names = [name for f in flat for name in f._fqns]
    sizes = [(f._unpadded_unsharded_size.numel(), f._sharded_size.numel()) for f in flat]
    return {
        "units": torch.tensor(len(flat)),
        "adapters inside": torch.tensor(sum(".adapters." in name for name in names)),
        "train": torch.tensor(any(f.requires_grad for f in flat)),
        "halved": torch.tensor([part <= whole // 2 + 1 for whole, part in sizes]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("fsdp1")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return fit(Quiet, folder / "alone", 4)


@pytest.fixture(scope="module")
def both(folder: Path, alone: Any) -> list[dict[str, Any]]:
    return on_processes(2, on_two, folder)


@pytest.fixture(scope="module")
def found(both: list[dict[str, Any]]) -> dict[str, Any]:
    first, second = both
    for name in first.keys() - {"broken", "refused"}:
        assert same_state(first[name], second[name]), name
    return first


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_resume_is_exact(found: dict[str, Any], form: str) -> None:
    assert_same_state(found[form], found[f"{form} resumed"])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_files_hold_adapters_only(found: dict[str, Any], folder: Path, form: str) -> None:
    path = folder / form / "epoch=3.ckpt"
    saved = read_checkpoint_folder(path) if path.is_dir() else torch.load(path, weights_only=True)
    assert path.is_dir() == (form == "folder")
    adapters = {key: value for key, value in found[form].items() if "/" not in key}
    assert_same_state(saved["state_dict"], adapters)


@pytest.mark.slow
def test_from_and_to_other_strategies(found: dict[str, Any], alone: Any) -> None:
    """Same as one device with the whole batch, also after changing over in the middle."""
    names = [name for form in FORMS for name in (form, f"{form} from one device")]
    for name in [*names, "ddp from folder"]:
        assert found[name].keys() == alone.keys(), name
        for key in alone:  # sums in another order
            torch.testing.assert_close(
                found[name][key], alone[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_same_as_ddp_bit_for_bit(found: dict[str, Any], way: str) -> None:
    if way == "accumulated":  # DDP sums first and averages then
        for key, value in found[f"ddp {way}"].items():
            torch.testing.assert_close(found[f"fsdp {way}"][key], value)
        return
    assert_same_state(found[f"fsdp {way}"], found[f"ddp {way}"])
    state = found[f"fsdp {way}"]
    assert all(state[key].dtype == torch.float32 for key in state if "lora_" in key)  # moments too


@pytest.mark.slow
def test_ways_differ(found: dict[str, Any]) -> None:
    """So that the comparisons above say something."""
    assert not same_state(found["fsdp plain"], found["fsdp clipped"])
    assert not same_state(found["fsdp plain"], found["fsdp bf16-true"])


@pytest.mark.slow
def test_base_is_sharded_and_frozen(found: dict[str, Any]) -> None:
    unit = found["unit"]
    assert unit["units"] == 2
    assert unit["halved"].all()
    assert not unit["adapters inside"]
    assert not unit["train"]


@pytest.mark.slow
def test_wrapping_in_configure_model(found: dict[str, Any], folder: Path) -> None:
    assert_same_state(found["wraps itself"], found["ddp plain"])
    base, own = (
        torch.load(folder / name / "epoch=1.ckpt", weights_only=True)[KEY]["base"]
        for name in ("alone", "itself")
    )
    assert base == own  # that of whole tensors, not of one process's parts


@pytest.mark.slow
def test_an_adapter_that_one_process_uses(found: dict[str, Any]) -> None:
    assert_same_state(found["fsdp unused"], found["ddp unused"])


@pytest.mark.slow
def test_other_ways_to_compute_the_same(found: dict[str, Any]) -> None:
    """Activation checkpointing, and an adapter that reads the base's weight."""
    assert_same_state(found["fsdp recomputed"], found["ddp plain"])
    assert_same_state(found["fsdp dora"], found["ddp dora"])
    assert any("magnitude" in name for name in found["fsdp dora"])


@pytest.mark.slow
def test_saved_by_one_process(found: dict[str, Any], folder: Path) -> None:
    other = Quiet()
    load_adapter(other, folder / "peft")
    trained = {key: value for key, value in found["fsdp plain"].items() if "/" not in key}
    assert_same_state(trained, {k: v for k, v in other.state_dict().items() if k in trained})


@pytest.mark.slow
def test_evaluation_after_fit(found: dict[str, Any]) -> None:
    for key, value in found["tested on one device"].items():
        torch.testing.assert_close(found["tested"][key], value)


@pytest.mark.slow
def test_negative_control_without_the_average_diverges(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert not same_state(first["broken"], second["broken"])


@pytest.mark.parametrize("begun", [True, False], ids=["", "negative control"])
def test_gradients_are_averaged_after_a_backward_that_failed(
    monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Out of memory in one run, say: the next Trainer's first backward pass is averaged again."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    average = GradientAverage(weights[:1])
    reduced: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced.append)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)

    def fail(_: Any) -> None:
        raise MemoryError

    failing = weights[1].register_post_accumulate_grad_hook(fail)
    with pytest.raises(MemoryError):  # the last one to be made is the first to get a gradient
        (weights[1].exp() * weights[0].exp()).sum().backward()
    failing.remove()
    assert average._queued
    assert not reduced
    if begun:
        average.begin()
    (weights[0] * weights[1]).sum().backward()
    assert len(reduced) == begun


@pytest.mark.slow
def test_refusals(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert "Use bias='none', or ModelParallelStrategy. (lora.bias)" in refused["bias"]
    assert "body were wrapped in FSDP before adapters could be attached" in refused["late"]
    assert "WeightAveraging swaps whole models" in refused["averaging"]
    assert "The base of rank 1 is not that of rank 0" in refused["base"]


def test_ranks_of_eva_cannot_change_after_the_setup() -> None:
    callback = make_callback(r=3, init_lora_weights="eva")
    found = LoraConfig(r=3, rank_pattern={"embed": 5})
    saved = {"config": found.to_dict(), "peft_type": "LORA"}
    with pytest.raises(ConfigError, match="OnCpu restores checkpoints into adapters that it has"):
        ranks_of_checkpoint(callback, on_cpu(), saved)
    callback.config = found
    assert ranks_of_checkpoint(callback, on_cpu(), saved) is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_orig_params": False}, "hides the adapters from the optimizer"),
        ({"ignored_states": [nn.Linear(1, 1)]}, "Name modules: ignored_modules"),
    ],
)
def test_options_that_adapters_exclude(tmp_path: Path, options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_fsdp(on_cpu(**options))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.filterwarnings("ignore:.*torch.distributed.*barrier")
def test_lightnings_own_strategy(tmp_path: Path) -> None:
    """On one GPU, where FSDP does not shard: trains, saves adapters only, resumes exactly."""

    def go(folder: str, epochs: int, ckpt_path: Any = None) -> dict[str, Any]:
        seed_everything(7, verbose=False)
        saver = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        settings = {"accelerator": "gpu", "devices": 1, "strategy": "fsdp", "max_epochs": epochs}
        trainer = make_trainer(tmp_path, make_callback(), saver, **settings)
        trainer.fit(Quiet(), DataLoader(Data().dataset, 16), ckpt_path=ckpt_path)
        return {key: value.cpu() for key, value in state_of(trainer).items()}

    straight = go("straight", 4)
    saved = torch.load(tmp_path / "straight/epoch=1.ckpt", weights_only=True)
    assert all(".adapters." in key for key in saved["state_dict"])
    assert_same_state(straight, go("resumed", 4, tmp_path / "straight/epoch=1.ckpt"))
