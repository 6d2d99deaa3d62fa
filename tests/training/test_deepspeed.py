"""DeepSpeed at stages 1 and 2 on two gloo processes: as DDP, bit for bit, and files as its.

DeepSpeed under Lightning needs CUDA; `OnCpu` is what lets it run without. The package builds from
source and is not among the extras; without it only what is refused before it is used is tested.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader

from lora_lightning import AdaLoraConfig, LoraConfig
from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.training._lightning import SETUP_MODEL
from lora_lightning.training.optimizers import check_coverage
from lora_lightning.training.strategies.deepspeed import (
    WholeOptimizer,
    check_deepspeed,
    whole_optimizers,
)
from lora_lightning.training.strategies.optimizer_names import with_names, with_numbers
from lora_lightning.training.strategies.state_overrides import _DEEPSPEED
from tests.helpers.fsdp2_modules import Quiet, WithDropout
from tests.helpers.lightning_modules import Data, make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.sharded_runs import make_callback
from tests.helpers.tensors import assert_same_state, same_state

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


class OnCpu(DeepSpeedStrategy):
    def __init__(self, stage: int = 2, **options: Any) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # would be compiled on first use
        super().__init__(stage=stage, process_group_backend="gloo", **options)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class InGroups(Quiet):
    """One group a layer, the first without anything that trains; rates of their own."""

    def configure_optimizers(self) -> Any:
        parts = (self.norm, self.embed, self.body, self.head)
        groups = [{"params": p.parameters(), "lr": 0.1 / (i + 1)} for i, p in enumerate(parts)]
        optimizer = SGD(groups, momentum=0.9)
        first = lr_scheduler.LambdaLR(optimizer, [lambda n, k=k: 1 / (1 + k * n) for k in range(4)])  # type: ignore[misc]
        rest = lr_scheduler.CosineAnnealingLR(optimizer, 4)
        return [optimizer], [lr_scheduler.SequentialLR(optimizer, [first, rest], [1])]


class NoOptimizer(Quiet):
    """LoraCallback supplies a fused AdamW."""

    configure_optimizers = LightningModule.configure_optimizers  # type: ignore[assignment]


class OneGroupSGD(Quiet):
    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


class OtherBase(Quiet):
    def __init__(self) -> None:
        super().__init__()
        nn.init.ones_(self.embed.weight)


class WithoutHead(Quiet):
    def forward(self, x: Any) -> Any:
        return self.body(self.norm(self.embed(x)))[:, :3]


class BadGradient(Quiet):
    """On one process and in one step; the loss is finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        y = self(batch[0])
        if batch_idx == 2 and os.environ["RANK"] == "1":
            y.register_hook(lambda gradient: gradient * torch.inf)
        return nn.functional.cross_entropy(y, batch[1])


class Thaws(Quiet):
    def on_train_epoch_end(self) -> None:
        self.embed.weight.requires_grad_(True)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16-true"},
    "groups": {"kind": InGroups},
    "dora": {"callback": {"use_dora": True}},
    "fused": {"kind": NoOptimizer},
    "dropout": {"kind": WithDropout},
    "bias": {"callback": {"bias": "all", "modules_to_save": None}},
    "skip": {"kind": BadGradient, "callback": {"nonfinite": "skip"}},
    "clipped": {"gradient_clip_val": 0.05},
}


def train(
    folder: Path,
    way: Any,
    start: Any = None,
    kind: Any = Quiet,
    callback: Any = None,
    other: Any = (),
    **options: Any,
) -> tuple[dict[str, Any], Any]:
    """What is saved of the module after three epochs of four steps, and the Trainer."""
    seed_everything(7 if start is None else 123, verbose=False)
    module = options.pop("module", None) or kind()
    share = DataLoader(Data().dataset, 8, sampler=list(range(int(os.environ["RANK"]), 64, 2)))
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3)
    settings = {"strategy": way, "devices": 2, "use_distributed_sampler": False, "max_epochs": 3}
    trainer = make_trainer(
        folder, make_callback(**(callback or {})), saver, *other, **{**settings, **options}
    )
    trainer.fit(module, share, ckpt_path=start)
    state = module.state_dict()
    return {k: v.clone() for k, v in state.items() if ".adapters." in k}, trainer


def error_of(act: Any) -> str:
    with pytest.raises(BaseException) as caught:  # SIGTERM ends the process
        act()
    return f"{type(caught.value).__name__}: {caught.value}"


def on_one(folder: Path) -> dict[str, Any]:
    state, _ = train(folder / "one", OnCpu(), folder / "plain" / "step=12.ckpt", devices=1)
    return state


def on_two(folder: Path) -> dict[str, Any]:
    """What every test below looks at."""
    found: dict[str, Any] = {}
    for name, options in WAYS.items():
        found[name], trainer = train(folder / name, OnCpu(), **options)
        found[f"{name} ddp"], _ = train(folder / f"{name} ddp", "ddp", **options)
        middle = folder / name / "step=6.ckpt"
        found[f"{name} resumed"], _ = train(folder / "resumed", OnCpu(), middle, **options)
        if name == "bf16":
            named = named_parameters(trainer.lightning_module)
            found["dtypes"] = {(".adapters." in n, p.dtype) for n, p in named}
    found["stage 1"], _ = train(folder / "stage 1", OnCpu(1))
    round_robin = {"stage": 2, "round_robin_gradients": True}
    config = {"zero_optimization": round_robin, "zero_allow_untested_optimizer": True}
    found["round robin"], trainer = train(folder / "round robin", OnCpu(config=config))
    starts = {
        "stage 1 resumed": (OnCpu(1), "stage 1"),
        "from ddp": (OnCpu(), "plain ddp"),
        "to ddp": ("ddp", "plain"),
        "round robin to ddp": ("ddp", "round robin"),
    }
    for name, (way, before) in starts.items():
        found[name], _ = train(folder / name, way, folder / before / "step=6.ckpt")
    # The same module again: nothing of the first engine may be left on it.
    found["again"], _ = train(folder / "again", OnCpu(), module=trainer.lightning_module)
    start = folder / "plain" / "step=12.ckpt"
    found["again ddp"], _ = train(folder / "again", "ddp", module=restored(folder, start, "ddp")[0])
    for way in ("ddp", OnCpu()):
        found[f"tested {way if way == 'ddp' else 'zero'}"] = restored(folder, start, way)[1]
    middle = folder / "plain" / "step=6.ckpt"
    found["errors"] = {
        "base": error_of(lambda: train(folder, OnCpu(), middle, OtherBase)),
        "kind": error_of(lambda: train(folder, OnCpu(), middle, OneGroupSGD)),
        "rank": error_of(lambda: train(folder, OnCpu(), middle, callback={"r": 3})),
        "tested": error_of(lambda: restored(folder, middle, OnCpu(), OtherBase)),
        "gradient": error_of(lambda: train(folder, OnCpu(), kind=BadGradient)),
        "thaws": error_of(lambda: train(folder, OnCpu(), kind=Thaws)),
        "narrow": error_of(
            lambda: train(
                folder, OnCpu(), precision="bf16-true", callback={"autocast_adapter_dtype": False}
            )
        ),
    }
    with torch.device("meta"):
        empty = Quiet()
    found["errors"]["meta"] = error_of(lambda: train(folder, OnCpu(), module=empty))
    found["errors"]["terminated"] = error_of(
        lambda: train(folder / "taken", OnCpu(), other=[Terminated()])
    )
    found["terminated resumed"], _ = train(folder / "taken", OnCpu(), folder / "taken/last.ckpt")
    weights = ModelCheckpoint(folder, "weights", save_weights_only=True)
    train(folder, OnCpu(), other=[weights], max_epochs=1)
    found["errors"]["weights"] = error_of(lambda: train(folder, OnCpu(), folder / "weights.ckpt"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(folder / "headless", OnCpu(), kind=WithoutHead, gradient_clip_val=1.0)
    found["warnings"] = [str(w.message) for w in caught]
    return {**found, **negative_controls(folder, middle)}


class Terminated(Callback):
    """SIGTERM comes to one process in the middle of an epoch."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def restored(folder: Path, start: Path, way: Any, kind: Any = Quiet) -> tuple[Any, Any]:
    module = kind()
    trainer = make_trainer(
        folder, make_callback(), strategy=way, devices=2, use_distributed_sampler=False
    )
    return module, trainer.test(module, Data().test_dataloader(), ckpt_path=start, verbose=False)


def negative_controls(folder: Path, middle: Path) -> dict[str, Any]:
    """Broken on purpose: moments are not restored; the engine casts adapters."""
    found: dict[str, Any] = {}
    load, setup = WholeOptimizer.load_state_dict, _DEEPSPEED[SETUP_MODEL]
    WholeOptimizer.load_state_dict = lambda self, _: self.zero.refresh_fp32_params()  # type: ignore[method-assign]
    found["broken without moments"], _ = train(folder / "broken", OnCpu(), middle)
    WholeOptimizer.load_state_dict = load  # type: ignore[method-assign]
    _DEEPSPEED[SETUP_MODEL] = lambda self, module, model: model
    found["broken cast"], _ = train(folder / "broken", OnCpu(), precision="bf16-true")
    _DEEPSPEED[SETUP_MODEL] = setup
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return on_processes(2, on_two, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def folder(both: Any, tmp_path_factory: Any) -> Path:
    return tmp_path_factory.getbasetemp() / "deepspeed0"


@needs_deepspeed
@pytest.mark.parametrize("way", WAYS)
def test_trains_as_ddp_does(both: Any, way: str) -> None:
    for found in both:
        # Norms are summed, and vectors are begun, at other places of a flat tensor.
        if way in ("clipped", "fused"):
            for key, value in found[way].items():
                assert torch.allclose(value, found[f"{way} ddp"][key], rtol=0, atol=1e-6)
        else:
            assert_same_state(found[way], found[f"{way} ddp"])
    assert_same_state(both[0][way], both[1][way])


@needs_deepspeed
@pytest.mark.parametrize("way", [*WAYS, "stage 1"])
def test_resumes_in_the_middle_of_an_epoch(both: Any, way: str) -> None:
    for found in both:
        assert_same_state(found[f"{way} resumed"], found[way])
        assert not same_state(found["broken without moments"], found["plain"])


@needs_deepspeed
@pytest.mark.parametrize("way", ["stage 1", "from ddp", "to ddp", "round robin to ddp"])
def test_stages_and_ddp_read_each_others_files(both: Any, way: str) -> None:
    assert all(same_state(found[way], found["plain"]) for found in both)


@needs_deepspeed
def test_files_hold_adapters_and_moments_by_name(both: Any, folder: Path) -> None:
    for name in ("plain", "plain ddp"):
        assert (folder / name / "step=6.ckpt").is_file()
    saved, ddp = (
        torch.load(folder / name / "step=6.ckpt", weights_only=True)
        for name in ("plain", "plain ddp")
    )
    assert saved["state_dict"].keys() == both[0]["plain"].keys()
    (own,), (other,) = saved["optimizer_states"], ddp["optimizer_states"]
    assert [g["params"] for g in own["param_groups"]] == [
        g["params"] for g in other["param_groups"]
    ]
    assert own["state"].keys() == other["state"].keys() == both[0]["plain"].keys()
    for name, moments in own["state"].items():
        assert_same_state(moments, other["state"][name])


@needs_deepspeed
def test_adapters_stay_in_float32(both: Any) -> None:
    assert both[0]["dtypes"] == {(True, torch.float32), (False, torch.bfloat16)}
    assert not same_state(both[0]["broken cast"], both[0]["bf16"])  # rounded before the first step


@needs_deepspeed
def test_evaluates_a_checkpoint(both: Any) -> None:
    for found in both:
        assert found["tested zero"] == found["tested ddp"]


@needs_deepspeed
def test_files_are_read_by_other_numbers_of_processes(both: Any, folder: Path) -> None:
    (one,) = on_processes(1, on_one, folder)
    assert_same_state(one, both[0]["plain"])
    start = folder / "plain" / "step=12.ckpt"
    alone = make_trainer(folder, make_callback())
    tested = alone.test(Quiet(), Data().test_dataloader(), ckpt_path=start, verbose=False)
    assert tested == both[0]["tested zero"]


@needs_deepspeed
def test_the_same_module_trains_again(both: Any) -> None:
    assert all(same_state(found["again"], found["again ddp"]) for found in both)


@needs_deepspeed
def test_errors(both: Any) -> None:
    for found in both:
        errors = found["errors"]
        assert "another base model; nothing was loaded" in errors["base"]
        assert "another base model; nothing was loaded" in errors["tested"]
        assert "is of another kind than this run's SGD" in errors["kind"]
        assert "r: 2 in the checkpoint, 3 here" in errors["rank"]
        assert "gradients are not finite: " in errors["gradient"]
        assert "in no optimizer: embed.weight" in errors["thaws"]
        assert "are on the meta device and have no values" in errors["meta"]
        assert "SIGTERMException" in errors["terminated"]
        assert_same_state(found["terminated resumed"], found["plain"])
        assert "This checkpoint holds weights only" in errors["weights"]
        assert "would train in torch.bfloat16" in errors["narrow"]


@needs_deepspeed
def test_warnings(both: Any) -> None:
    texts = both[0]["warnings"]
    assert any("2 of 6 trainable tensors had no gradient in the first step" in t for t in texts)
    assert not any("configure_gradient_clipping" in t for t in texts)


# -- without the package ---------------------------------------------------------------------------


def partitioned() -> dict[str, Any]:
    """Momentum of two parameters, laid out as ZeRO does, and after a round trip by names."""
    dist.init_process_group("gloo")
    module = nn.Linear(3, 2)  # 8 numbers, of which each process has 4
    part = nn.Parameter(torch.zeros(4))
    inner = SGD([part], lr=0.1, momentum=0.9)
    inner.state[part]["momentum_buffer"] = torch.arange(4.0) + 4 * dist.get_rank()
    zero = SimpleNamespace(
        optimizer=inner,
        round_robin_bit16_groups=[[module.weight, module.bias]],
        round_robin_bit16_offsets=[[0, 6]],
        bit16_groups_flat=[],
        refresh_fp32_params=lambda: None,
    )
    (whole,) = whole_optimizers([zero])
    check_coverage([whole], module)
    saved = with_names(whole.state_dict(), whole, module)
    inner.state.clear()
    whole.load_state_dict(with_numbers(saved, whole, module))
    found = {name: own["momentum_buffer"] for name, own in saved["state"].items()}
    return {**found, "part": inner.state[part]["momentum_buffer"]}


@pytest.mark.slow
def test_moments_are_put_together_and_split() -> None:
    for rank, found in enumerate(on_processes(2, partitioned)):
        assert found["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found["bias"].tolist() == [6, 7]
        assert found["part"].tolist() == [4 * rank + n for n in range(4)]


def stand_in(config: Any = None, callbacks: Any = (), **options: Any) -> Any:
    """A Trainer, as far as it is looked at."""
    name = {"__module__": "lightning.pytorch.strategies.deepspeed"}
    strategy = type("Own", (type("DeepSpeedStrategy", (), name),), {})()
    strategy.config = {"zero_optimization": {"stage": 2}, **(config or {})}
    precision = SimpleNamespace(precision=options.pop("precision", "32-true"))
    module = SimpleNamespace(automatic_optimization=options.pop("automatic", True))
    defaults = {"accumulate_grad_batches": 1, **options}
    return SimpleNamespace(
        strategy=strategy,
        callbacks=callbacks,
        precision_plugin=precision,
        lightning_module=module,
        **defaults,
    )


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
REFUSED: dict[str, tuple[dict[str, Any], Any]] = {
    "at stages 1 and 2, not 3: stage 3 takes": ({"config": {"zero_optimization": {"stage": 3}}}, 0),
    "at stages 1 and 2, not 0": ({"config": {"zero_optimization": {}}}, 0),
    "Own with offload_optimizer": ({"config": {"zero_optimization": OFFLOAD}}, 0),
    "'optimizer' in the config of Own": ({"config": {"optimizer": {"type": "Adam"}}}, 0),
    "'bf16' in the config of Own": ({"config": {"bf16": {"enabled": True}}}, 0),
    "precision='bf16-mixed' under Own is not mixed": ({"precision": "bf16-mixed"}, 0),
    "precision='16-true' under Own": ({"precision": "16-true"}, 0),
    "accumulate_grad_batches under Own": ({"accumulate_grad_batches": 2}, 0),
    "manual optimization under Own": ({"automatic": False}, 0),
    "AdaLoRA under Own": ({}, AdaLoraConfig(init_r=4, target_r=2, total_step=9)),
    "init_lora_weights='eva' under Own": ({}, LoraConfig(init_lora_weights="eva")),
    "WeightAveraging under Own": ({"callbacks": [WeightAveraging()]}, 0),
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_before_work_starts(text: str) -> None:
    options, config = REFUSED[text]
    for passes in ({}, {"config": {"fp16": {"enabled": False}}}):
        check_deepspeed(stand_in(**passes), [LoraConfig()])
    with pytest.raises(ConfigError, match=text) as caught:
        check_deepspeed(stand_in(**options), [config or LoraConfig()])
    assert str(caught.value).endswith(
        (
            "(trainer.strategy)",
            "(trainer.precision)",
            "(trainer.callbacks)",
            "(trainer.accumulate_grad_batches)",
        )
    )
