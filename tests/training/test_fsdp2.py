"""FSDP2 on two gloo processes: adapters sharded, files adapter-only, resume across strategies."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # comes with torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemReader

import lora_lightning.training.module_hooks
from lora_lightning import (
    AdaLoraConfig,
    Ia3Config,
    LohaConfig,
    LokrConfig,
    LoraCallback,
    LoraConfig,
    OftConfig,
    ShiraConfig,
    VeraConfig,
    disable_adapter,
    inject_adapter,
    load_adapter,
    save_adapter,
)
from lora_lightning.checkpoint.integrity import damaged_parts
from lora_lightning.checkpoint.sharded_folder import read_checkpoint_folder
from lora_lightning.errors import CheckpointError, LoraError
from lora_lightning.training.summary import checkpoint_lines
from lora_lightning.utilities.dtensor import full_tensor
from tests.helpers.fsdp2_modules import (
    BodyOnly,
    BuiltAndSharded,
    BuiltAndShardedInBf16,
    DDPWithOwnSeeds,
    Factored,
    FSDPWithOwnSeeds,
    FullDisk,
    InitializedOnMeta,
    Llama,
    LlamaLate,
    LoadsLess,
    LosesABuffer,
    NobodyLoads,
    OnMeta,
    OtherBase,
    OtherBasePerRank,
    OwnUnitHead,
    PlainSGD,
    Quiet,
    ShardedInBf16,
    ShardedLater,
    TensorParallel,
    Unsharded,
    WithDropout,
    strategy,
)
from tests.helpers.lightning_modules import Data, make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.sharded_runs import fit, make_callback, whole_state
from tests.helpers.tensors import assert_same_state, same_state

T = {"target_modules": ["embed", "body.2"]}
TYPES = {
    "dora": LoraConfig(r=2, use_dora=True, **T),
    "biases": LoraConfig(r=2, lora_bias=True, bias="lora_only", **T),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", **T),
    "loha": LohaConfig(r=2, **T),
    "lokr": LokrConfig(r=2, **T),
    "oft": OftConfig(oft_block_size=4, r=0, **T),
    "ia3": Ia3Config(target_modules=["embed", "body.2"], feedforward_modules=[]),
    "vera": VeraConfig(r=2, target_modules=["body.2"]),
    "shira": ShiraConfig(r=1, target_modules=["body.2"]),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, **T),
}

# -- everything that needs two processes, in one start of them -------------------------------------

FORMS = [(kind, form) for kind in (ShardedLater, BuiltAndSharded) for form in ("folder", "file")]


def on_two(folder: Path) -> dict[str, Any]:
    """What every test below looks at."""
    found: dict[str, Any] = {}
    alone = folder / "alone/epoch=1.ckpt"
    for kind, form in FORMS:
        name = f"{kind.__name__}-{form}"
        place = folder / name

        def go(epochs: int, ckpt_path: Any, kind: Any = kind, place: Path = place) -> Any:
            way = strategy(folder=place.name.endswith("folder"))
            return fit(kind, place, epochs, ckpt_path, way)

        found[name] = go(4, None)
        found[f"{name} resumed"] = go(4, place / "epoch=1.ckpt")
        found[f"{name} from one device"] = go(4, alone)
    written = folder / "ShardedLater-folder/epoch=1.ckpt"
    found["ddp from folder"] = fit(Quiet, folder / "ddp", 4, written, "ddp")
    unlike = folder / "unlike"  # DDP hands rank 0's base to all
    found["unlike"] = fit(OtherBasePerRank, unlike, 4, way="ddp")
    found["unlike resumed"] = fit(OtherBasePerRank, unlike, 4, unlike / "epoch=1.ckpt", "ddp")
    found["file from folder"] = fit(
        ShardedLater, folder / "file", 4, written, strategy(folder=False)
    )
    for name, config in TYPES.items():
        for kind in (ShardedLater, BuiltAndSharded):
            label = f"{name}-{kind.__name__}"
            found[label] = fit(kind, folder / label, 2, way=strategy(folder=True), config=config)
    for kind in (ShardedInBf16, BuiltAndShardedInBf16, OnMeta, InitializedOnMeta):
        label = kind.__name__
        found[label] = fit(kind, folder / label, 4, way=strategy(folder=True))
    found["bf16-true"] = fit(
        OnMeta, folder / "bf16", 4, way=strategy(folder=True), precision="bf16-true"
    )
    for form in ("folder", "file"):
        place = folder / f"sgd-{form}"
        for name, path in ((place.name, None), (f"{place.name} resumed", place / "epoch=1.ckpt")):
            found[name] = fit(PlainSGD, place, 4, path, strategy(folder=form == "folder"))
    for kind in (Llama, LlamaLate):
        way = strategy(folder=True)
        found[kind.__name__] = fit(kind, folder / kind.__name__, 2, way=way, config=LoraConfig(r=4))
    return {
        "runs": found,
        "mid-epoch": in_mid_epoch(folder / "mid-epoch"),
        "broken": left_full_tensor(folder / "broken"),
        "saving": saving(folder / "saving"),
        "second trainer": second_trainer(folder / "second"),
        "refusals": refusals(folder),
        "evaluation": evaluate(folder),
        "starts": starts(folder),
        "disabled": disabled(folder),
    }


class Estimating(WithDropout):
    """Asks for the length of the run, as schedules over the whole of it do."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 8
        return super().configure_optimizers()


def in_mid_epoch(folder: Path) -> dict[str, Any]:
    """Shuffled data and dropout, straight and resumed after 3 of 4 steps of the first epoch."""
    found = {}
    for form, kind in {"folder": WithDropout, "file": WithDropout, "length": Estimating}.items():
        for name, path in (("", None), (" resumed", folder / f"{form}/step=3.ckpt")):
            seed_everything(7 if path is None else 123, verbose=False)
            module, way = kind(), strategy(folder=form == "folder")
            place = folder / f"{form}{name}"
            saver = ModelCheckpoint(place, "{step}", every_n_train_steps=3, save_top_k=-1)
            callback = make_callback(lora_dropout=0.3)
            trainer = make_trainer(folder, callback, saver, max_epochs=2, strategy=way, devices=2)
            trainer.fit(module, Data(8).train_dataloader(), ckpt_path=path)
            found[f"{form}{name}"] = whole_state(module, trainer.optimizers[0])
    return found


def left_full_tensor(folder: Path) -> dict[str, Any]:
    """What two processes train where nobody shards adapters that came after sharding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_lightning.training.module_hooks, "shard_adapters", lambda _: None)
        # A head that trains in full would stay whole where FSDP looks for its part: an error.
        config = LoraConfig(r=2, **T)
        return fit(BuiltAndSharded, folder, 2, way=strategy(folder=True), config=config)


def second_trainer(folder: Path) -> bool:
    """Whether a module whose adapters a run left gathered goes through another one."""
    module, loader = BuiltAndSharded(), Data().val_dataloader()
    options = {"devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
    for way in (strategy(folder=True), strategy(folder=False)):
        saver = ModelCheckpoint(folder, save_last="link")
        trainer = make_trainer(folder, make_callback(), saver, strategy=way, **options)
        trainer.fit(module, loader)
        trainer.save_checkpoint(folder / "after.ckpt")  # a file over the folder of the first
        trainer.test(module, loader, ckpt_path=folder / "after.ckpt", verbose=False)
    return (folder / "after.ckpt").is_file()


def saving(folder: Path) -> dict[str, Any]:
    """What is gathered for a file, and what is left when a disk is full."""
    from torch.distributed.tensor import DTensor

    found: dict[str, Any] = {"gathered": 0}
    plain = DTensor.full_tensor

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        found["gathered"] += self.numel()
        return plain(self, *args, **kwargs)

    for form in ("file", "folder"):
        module, way = ShardedLater(), strategy(folder=form == "folder", kind=FullDisk)
        trainer = make_trainer(folder, make_callback(), strategy=way, devices=2, max_epochs=2)
        trainer.fit(module, Data().val_dataloader())
        DTensor.full_tensor = counting if form == "file" else plain
        path = folder / f"{form}.ckpt"
        trainer.save_checkpoint(path)
        DTensor.full_tensor = plain
        trainer.fit_loop.epoch_progress.current.completed = 7  # what the failing one would say
        way.full = True
        with pytest.raises(OSError, match="No space left"):
            trainer.save_checkpoint(path)
        torch.distributed.barrier()
        if form == "folder":
            kept = read_checkpoint_folder(path)
            found["damaged"] = damaged_parts(kept)
            progress = kept["loops"]["fit_loop"]["epoch_progress"]
            found["completed"] = progress["current"]["completed"]
            found["visible"] = sorted(p.name for p in folder.iterdir() if p.name[0] != ".")
        torch.distributed.barrier()
        way.ranks = (0,)  # which writes what is not split
        with pytest.raises((OSError, CheckpointError)) as error:
            trainer.save_checkpoint(path)
        found["alone"] = str(error.value)
        way.full = False
        trainer.save_checkpoint(path)
    found["hidden"] = sorted(p.name for p in folder.iterdir() if p.name[0] == ".")
    return found


def starts(folder: Path) -> dict[str, Any]:
    """Start values of A with another seed on each rank, and what they are on rank 0 alone."""
    os.environ.pop("PL_GLOBAL_SEED")  # with which Lightning would seed all
    found = {}
    for name, way in (
        ("fsdp", strategy(folder=True)),
        ("fsdp, broken", strategy(folder=True, kind=FSDPWithOwnSeeds)),
        ("ddp", "ddp"),
        ("ddp, broken", DDPWithOwnSeeds()),
    ):
        torch.manual_seed(torch.distributed.get_rank())
        spy = Spy(**make_callback().config.to_dict())
        module = ShardedLater()
        make_trainer(folder, spy, strategy=way, devices=2, limit_val_batches=0).validate(
            module, Data().val_dataloader(), verbose=False
        )
        found[name], found[f"{name}, undisturbed"] = spy.start, spy.undisturbed
    torch.manual_seed(0)
    alone = Quiet()
    inject_adapter(alone, make_callback().config)
    found["rank 0"] = alone.embed.adapters["default"].lora_A.detach()
    return found


class Spy(LoraCallback):
    """Looks at A and at the random state once A is attached, before DDP hands A to all."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        configure_model = pl_module.configure_model  # the adapter is attached around the module's

        def configure_and_look() -> None:
            before = torch.get_rng_state()
            configure_model()
            self.undisturbed = torch.equal(before, torch.get_rng_state())
            self.start = full_tensor(pl_module.embed.adapters["default"].lora_A.detach()).clone()

        pl_module.configure_model = configure_and_look


def evaluate(folder: Path) -> list[float]:
    """The loss on all samples with the adapters of a checkpoint, of each kind."""
    losses = []
    for kind, form in FORMS:
        path = folder / f"{kind.__name__}-{form}" / "epoch=1.ckpt"
        options = {"strategy": strategy(folder=True), "use_distributed_sampler": False}
        trainer = make_trainer(folder, make_callback(), devices=2, **options)
        loader = Data(64).val_dataloader()
        losses += [
            evaluate(kind(), loader, ckpt_path=path, verbose=False)[0][f"{name}_loss"]
            for name, evaluate in (("val", trainer.validate), ("test", trainer.test))
        ]
    return losses


class Disabling(Callback):
    """Compute with adapters, without, and with them again, in forwards that no backward follows."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        x = Data(8).dataset.tensors[0]
        with torch.no_grad():
            self.adapted = pl_module(x).clone()
            for _ in range(2):
                with disable_adapter(pl_module):
                    self.base = pl_module(x).clone()
            self.again = pl_module(x).clone()


def disabled(folder: Path) -> dict[str, Any]:
    """What `Disabling` finds, and the base by itself."""
    found: dict[str, Any] = {}
    for kind in (ShardedLater, BuiltAndSharded, BuiltAndShardedInBf16):
        seed_everything(7, verbose=False)
        plain = Quiet()
        seed_everything(7, verbose=False)
        asks, options = Disabling(), {"strategy": strategy(folder=True), "devices": 2}
        module = kind()
        trainer = make_trainer(
            folder / kind.__name__, make_callback(), asks, max_steps=3, **options
        )
        trainer.fit(module, Data())
        with torch.no_grad():
            expected = plain(Data(8).dataset.tensors[0])
        found[kind.__name__] = expected, asks.base, asks.adapted, asks.again
    return found


def refusals(folder: Path) -> dict[str, str]:
    """What is said to the user, by what is wrong."""
    found = {}

    def attempt(kind: Any, *args: Any, **options: Any) -> None:
        try:
            fit(kind, folder / "refused", 4, *args, **{"way": strategy(folder=True), **options})
        except (LoraError, ValueError) as error:
            found[f"{kind.__name__} {' '.join(options)}".strip()] = str(error)

    for kind in (BodyOnly, Unsharded, TensorParallel, OwnUnitHead, OtherBasePerRank):
        attempt(kind)
    for kind in (NobodyLoads, LoadsLess, LosesABuffer):
        attempt(kind)
    attempt(OnMeta, config=LoraConfig(bias="lora_only", **T))
    attempt(ShardedLater, other=WeightAveraging())
    attempt(Factored, folder / "factored/epoch=1.ckpt")
    attempt(ShardedLater, way=ModelParallelStrategy())
    attempt(ShardedLater, precision="bf16-true", config=LoraConfig(bias="lora_only", **T))
    attempt(ShardedLater, config=LoraConfig(init_lora_weights="eva", **T))
    found["eva"] = found.pop("ShardedLater config")
    for form in ("folder", "file"):
        path = folder / f"ShardedLater-{form}" / "epoch=1.ckpt"
        attempt(OtherBase, path)
        found[f"other base, {form}"] = found.pop("OtherBase")
        attempt(ShardedLater, path, config=LoraConfig(r=3, **T))
        found[f"other rank, {form}"] = found.pop("ShardedLater config")
    try:
        module = ShardedLater()
        trainer = make_trainer(folder, make_callback(), strategy=strategy(folder=True), devices=2)
        trainer.validate(module, Data().val_dataloader(), verbose=False)
        save_adapter(module, folder / "peft")
    except LoraError as error:
        found["save_adapter"] = str(error)
    damaged = folder / "damaged.ckpt"
    if torch.distributed.get_rank() == 0:
        flip_a_bit(folder / "ShardedLater-folder/epoch=1.ckpt", damaged)
    torch.distributed.barrier()
    attempt(ShardedLater, damaged)
    found["damaged"] = found.pop("ShardedLater")
    return found


def flip_a_bit(source: Path, damaged: Path) -> None:
    """One bit of a value that the second process wrote."""
    shutil.copytree(source, damaged)
    b = read_checkpoint_folder(source)["state_dict"]["body.2.adapters.default.lora_B"]
    part = damaged / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[content.index(b[8:].numpy().tobytes())] ^= 1
    part.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Where all of it is written, once: under pytest-xdist several processes run this file."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sharded"
    with FileLock(f"{folder}.lock"):
        if not (folder / "ranks.pt").exists():
            try:
                write_all(folder)
            except AssertionError as error:
                # glibc's words for a fault in native code, which no Python can make: seen once in
                # a dozen runs, in torch's or gloo's gathering of a checkpoint. Once more, anew.
                if "double free or corruption" not in str(error):
                    raise
                print(f"a process ended in native code, and all is run once more: {error}")
                shutil.rmtree(folder)
                write_all(folder)
    return folder


def write_all(folder: Path) -> None:
    torch.save(fit(Quiet, folder / "alone", 4), folder / "alone.pt")
    fit(Factored, folder / "factored", 2)
    torch.save(dict(enumerate(on_processes(2, on_two, folder))), folder / "ranks.pt")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "alone.pt")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[int, Any]:
    return torch.load(folder / "ranks.pt")


@pytest.fixture(scope="module")
def found(ranks: Any) -> dict[str, Any]:
    """The runs, which end alike on both processes."""
    first, second = (ranks[rank]["runs"] for rank in (0, 1))
    for name in first:
        assert same_state(first[name], second[name]), name
    return first


def assert_close(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Up to the order in which two processes' gradients are summed."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_sharded_run_equals_one_device(found: Any, alone: Any, kind: Any, form: str) -> None:
    assert_close(found[f"{kind.__name__}-{form}"], alone)


@pytest.mark.slow
def test_negative_control_without_sharding_diverges(ranks: Any) -> None:
    first, second = (ranks[rank]["broken"] for rank in (0, 1))
    assert not torch.equal(
        first["embed.adapters.default.lora_B"], second["embed.adapters.default.lora_B"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_resume_is_exact(found: Any, kind: Any, form: str) -> None:
    name = f"{kind.__name__}-{form}"
    assert_same_state(found[name], found[f"{name} resumed"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "file", "length"])
def test_resume_in_mid_epoch_is_exact(ranks: Any, form: str) -> None:
    for rank in (0, 1):
        runs = ranks[rank]["mid-epoch"]
        assert_same_state(runs[form], runs[f"{form} resumed"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_resume_of_a_single_device_file(found: Any, alone: Any, kind: Any, form: str) -> None:
    assert_close(found[f"{kind.__name__}-{form} from one device"], alone)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_one_device_resumes_sharded_files(
    found: Any, alone: Any, folder: Path, tmp_path: Path, kind: Any, form: str
) -> None:
    path = folder / f"{kind.__name__}-{form}" / "epoch=1.ckpt"
    assert path.is_dir() == (form == "folder")
    with pytest.warns(UserWarning, match="was written by 2 processes, and 1 go on"):
        resumed = fit(Quiet, tmp_path, 4, path)
    assert_close(resumed, alone)


@pytest.mark.slow
def test_other_strategies_resume_folders(found: Any, alone: Any) -> None:
    assert_close(found["ddp from folder"], alone)
    assert_same_state(found["file from folder"], found["ShardedLater-folder"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_files_hold_adapters_only(found: Any, folder: Path, kind: Any, form: str) -> None:
    path = folder / f"{kind.__name__}-{form}" / "epoch=1.ckpt"
    if form == "folder":
        keys = FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {k.removeprefix("state_dict.") for k in keys if k.startswith("state_dict.")}
        checkpoint = read_checkpoint_folder(path)
    else:
        checkpoint = torch.load(path, weights_only=True)
        tensors = set(checkpoint["state_dict"])
    own = {key for key in found[f"{kind.__name__}-{form}"] if "/" not in key}
    assert tensors == own
    one_device = torch.load(folder / "alone/epoch=1.ckpt", weights_only=True)
    assert checkpoint.keys() == one_device.keys()
    assert checkpoint["lora_lightning"]["base"] == one_device["lora_lightning"]["base"]
    states = [c["optimizer_states"][0] for c in (checkpoint, one_device)]
    assert states[0]["state"].keys() == states[1]["state"].keys() == own
    assert states[0]["param_groups"] == states[1]["param_groups"]


@pytest.mark.slow
def test_every_adapter_type(found: Any, tmp_path: Path) -> None:
    for name, config in TYPES.items():
        on_one = fit(Quiet, tmp_path / name, 2, config=config)
        for kind in (ShardedLater, BuiltAndSharded):
            assert_close(found[f"{name}-{kind.__name__}"], on_one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ShardedInBf16, BuiltAndShardedInBf16])
def test_mixed_precision_keeps_fp32_masters(found: Any, alone: Any, kind: Any) -> None:
    state = found[kind.__name__]
    assert {value.dtype for value in state.values()} == {torch.float32}
    a = state["embed.adapters.default.lora_A"]
    assert not torch.equal(a, a.bfloat16().float())
    # Adam's first steps are 1e-2 whatever the gradient's size: a few signs differ in bf16.
    lost = [(state[key] - value).abs().max() for key, value in alone.items() if "/" not in key]
    assert 0 < max(lost) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OnMeta, InitializedOnMeta])
def test_base_on_meta(found: Any, alone: Any, folder: Path, kind: Any) -> None:
    assert_close(found[kind.__name__], alone)
    checkpoint = read_checkpoint_folder(folder / kind.__name__ / "last.ckpt")
    one_device = torch.load(folder / "alone/last.ckpt", weights_only=True)
    assert checkpoint["lora_lightning"]["base"] == one_device["lora_lightning"]["base"]


@pytest.mark.slow
def test_base_on_meta_in_bf16(found: Any, folder: Path) -> None:
    state = found["bf16-true"]
    adapters = {value.dtype for key, value in state.items() if "lora_" in key}
    assert adapters == {torch.float32}
    checkpoint = read_checkpoint_folder(folder / "bf16/last.ckpt")
    assert checkpoint["lora_lightning"]["base"]["embed.weight"][1] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "file"])
def test_an_optimizer_without_state_and_empty_groups(found: Any, form: str, tmp_path: Path) -> None:
    assert_same_state(found[f"sgd-{form}"], found[f"sgd-{form} resumed"])
    assert_close(found[f"sgd-{form}"], fit(PlainSGD, tmp_path, 4))


@pytest.mark.slow
def test_evaluation_of_sharded_checkpoints(ranks: Any, folder: Path) -> None:
    trainer = make_trainer(folder, make_callback())
    path = folder / "ShardedLater-folder/epoch=1.ckpt"
    (logged,) = trainer.validate(Quiet(), Data(64).val_dataloader(), ckpt_path=path, verbose=False)
    loss = logged["val_loss"]
    for rank in (0, 1):
        assert ranks[rank]["evaluation"] == pytest.approx([loss] * 2 * len(FORMS), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ShardedLater, BuiltAndSharded, BuiltAndShardedInBf16])
def test_disabled_it_is_the_base(ranks: Any, kind: Any) -> None:
    for rank in (0, 1):
        expected, base, adapted, again = ranks[rank]["disabled"][kind.__name__]
        if kind is BuiltAndShardedInBf16:  # computed in bf16
            torch.testing.assert_close(base.float(), expected, rtol=0, atol=0.02)
        else:
            assert torch.equal(base, expected)
        assert torch.equal(again, adapted)
        assert not torch.equal(adapted, base)


@pytest.mark.slow
def test_same_start_on_all_ranks(ranks: Any) -> None:
    """Whatever their seeds are; the negative controls share none of them."""
    expected = ranks[0]["starts"]["rank 0"]
    for rank in (0, 1):
        starts = ranks[rank]["starts"]
        assert torch.equal(starts["fsdp"], expected)
        assert torch.equal(starts["ddp"], expected)
        assert starts["fsdp, undisturbed"]
        assert starts["ddp, undisturbed"]
    assert not torch.equal(ranks[1]["starts"]["fsdp, broken"], expected)
    assert not torch.equal(ranks[1]["starts"]["ddp, broken"], expected)


@pytest.mark.slow
def test_rank_0_says_which_base_it_is_under_ddp(found: Any) -> None:
    assert_same_state(found["unlike"], found["unlike resumed"])


@pytest.mark.slow
def test_a_folder_is_loaded_without_a_trainer(folder: Path, found: Any) -> None:
    path = folder / "ShardedLater-folder/last.ckpt"
    model = Quiet()
    load_adapter(model, path)
    for key, value in found["ShardedLater-folder"].items():
        if "/" not in key:
            assert torch.equal(model.state_dict()[key], value)
    (line,) = checkpoint_lines(model, str(path), "", weights_only=False)
    assert "kB with optimizer state; the base is 1.8 kB" in line


@pytest.mark.slow
def test_an_index_that_runs_code_is_refused(folder: Path, found: Any, tmp_path: Path) -> None:
    shutil.copytree(folder / "ShardedLater-folder/last.ckpt", tmp_path / "evil.ckpt")
    pickled = pickle.dumps(shutil.copytree)
    (tmp_path / "evil.ckpt/.metadata").write_bytes(pickled)
    with pytest.raises(CheckpointError, match=r"its index asks for shutil\.copytree"):
        read_checkpoint_folder(tmp_path / "evil.ckpt")


@pytest.mark.slow
def test_transformers_model(found: Any, tmp_path: Path) -> None:
    on_one = fit(Llama, tmp_path, 2, config=LoraConfig(r=4))
    assert_close(found["Llama"], on_one)
    assert_close(found["LlamaLate"], on_one)


@pytest.mark.slow
def test_nothing_of_the_base_is_gathered(ranks: Any, found: Any) -> None:
    adapters = [v for k, v in found["ShardedLater-file"].items() if "/" not in k]
    for rank in (0, 1):  # values and two moments
        assert ranks[rank]["saving"]["gathered"] == 3 * sum(v.numel() for v in adapters)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(ranks: Any) -> None:
    for rank in (0, 1):
        saving = ranks[rank]["saving"]
        assert (saving["damaged"], saving["completed"]) == ([], 2)
        assert saving["visible"] == ["file.ckpt", "folder.ckpt"]
        assert saving["hidden"] == []
    assert ranks[0]["saving"]["alone"] == "No space left on device"
    assert "could not be written by another process" in ranks[1]["saving"]["alone"]


@pytest.mark.slow
def test_second_trainer_and_a_file_over_a_folder(ranks: Any) -> None:
    assert ranks[0]["second trainer"]


REFUSALS = {
    "BodyOnly": "configure_model leaves 'embed' out of fully_shard",
    "Unsharded": "configure_model leaves 'embed' out of fully_shard",
    "TensorParallel": "'body.2.weight' is split over processes by tensor parallelism",
    "ShardedLater way": "tensor_parallel_size=2: adapters do not follow weights",
    "NobodyLoads": "Define `base_state_dict(self)` on the LightningModule",
    "LoadsLess": "not the base of this module:\n  missing: embed.weight",
    "OtherBasePerRank": "The base of rank 1 is not that of rank 0",
    "LosesABuffer": "'norm.table' is a buffer that no state dict holds",
    "OnMeta config": "bias='lora_only' and 'all' keep the base's own biases aside",
    "ShardedLater other": "WeightAveraging copies the whole module",
    "Factored": "it cannot be split over processes as the parameter is",
    "save_adapter": "spread over several processes. Load it in one process",
    "OwnUnitHead": "fully_shard made a unit of its own, which cannot be copied",
    "ShardedLater precision config": "can have one dtype only",
    "eva": "init_lora_weights='eva' chooses ranks by the data",
    "other base, folder": "norm.bias: other values",
    "other base, file": "norm.bias: other values",
    "other rank, folder": "r: 2 in the checkpoint, 3 here",
    "other rank, file": "r: 2 in the checkpoint, 3 here",
    "damaged": "state_dict/body.2.adapters.default.lora_B is not what was written",
}


@pytest.mark.slow
def test_refusals(ranks: Any) -> None:
    """Alike on both processes, so that none waits for the other."""
    said = ranks[0]["refusals"]
    assert said == ranks[1]["refusals"]
    assert said.keys() == REFUSALS.keys()
    for name, text in REFUSALS.items():
        assert text in said[name], name
