"""FSDP2 on two gloo processes: adapters sharded, files adapter-only, resume across strategies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from modules import Data, Net, run
from processes import on_processes
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

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
)
from lora_lightning.checkpoint_folders import read_checkpoint_folder
from lora_lightning.sharding import whole


class Quiet(Net):
    """Without what draws random numbers or batch statistics, so that processes can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.body[1] = nn.Identity()


class ShardedLater(Quiet):
    """Built in `__init__`, sharded in `configure_model`."""

    def configure_model(self) -> None:
        shard(self)


class BuiltAndSharded(Quiet):
    """Built and sharded in `configure_model`, so that adapters come after sharding."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        build(self)
        shard(self)


def build(module: Any) -> None:
    if not hasattr(module, "embed"):
        for name, child in Quiet().named_children():
            module.add_module(name, child)


def shard(module: Any, **options: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(module.body, FSDPModule) or module.device_mesh is None:
        return
    mesh = module.device_mesh["data_parallel"]
    fully_shard(module.body, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)


def make_callback(**options: Any) -> LoraCallback:
    defaults = {"r": 2, "target_modules": ["embed", "body.2"], "modules_to_save": ["head"]}
    return LoraCallback(**{**defaults, **options})


def strategy(folder: bool) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=folder
    )


def fit(
    kind: Any,
    folder: Path,
    epochs: int,
    ckpt_path: Any = None,
    way: Any = "auto",
    config: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Adapters and moments after training, whole; 32 samples a step whatever the strategy."""
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    devices = 1 if way == "auto" else 2
    callback = make_callback() if config is None else LoraCallback(config)
    own_share = range(int(os.environ.get("RANK", 0)), 64, devices)
    loader = DataLoader(Data().dataset, 32 // devices, sampler=list(own_share))
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    settings = {"max_epochs": epochs, "strategy": way, "devices": devices}
    settings["use_distributed_sampler"] = False
    trainer = run(folder, callback, saver, **settings, **options)
    if kind is InitializedOnMeta:
        with trainer.init_module(empty_init=True):
            module = kind()
    else:
        module = kind()
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return whole_state(module, trainer.optimizers[0])


def whole_state(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    names = {id(p): name for name, p in module.named_parameters()}
    state = {k: whole(v).clone() for k, v in module.state_dict().items() if ".adapters." in k}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            state[f"{names[id(parameter)]}/{key}"] = whole(value).clone()
    return state


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class ShardedInBf16(ShardedLater):
    def configure_model(self) -> None:
        shard(self, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


class BuiltAndShardedInBf16(BuiltAndSharded):
    def configure_model(self) -> None:
        build(self)
        shard(self, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


class OnMeta(Quiet):
    """Built without memory; its base is loaded once it has some."""

    base = Quiet().state_dict()

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        with torch.device("meta"):
            build(self)
        shard(self)

    def base_state_dict(self) -> dict[str, torch.Tensor]:
        return self.base


class InitializedOnMeta(OnMeta):
    """Built by `trainer.init_module(empty_init=True)`, adapters before sharding."""

    def __init__(self) -> None:
        Quiet.__init__(self)

    def configure_model(self) -> None:
        shard(self)


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
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return fit(Quiet, folder / "alone", 4)


@pytest.fixture(scope="module")
def found(folder: Path, alone: Any) -> dict[str, Any]:
    first, second = on_processes(2, on_two, folder)
    for name in first:
        assert equal(first[name], second[name]), name
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
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_resume_is_exact(found: Any, kind: Any, form: str) -> None:
    name = f"{kind.__name__}-{form}"
    assert equal(found[name], found[f"{name} resumed"])


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
    assert equal(found["file from folder"], found["ShardedLater-folder"])


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
