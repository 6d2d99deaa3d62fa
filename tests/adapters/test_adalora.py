"""AdaLoRA: the adapter, the allocation of ranks, and its drive by LoraCallback alone."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import (
    LoraCallback,
    adapter_state_dict,
    disable_adapter,
    inject_adapter,
    load_adapter,
    load_adapter_state_dict,
    merge_adapter,
    save_adapter,
)
from lora_lightning.adapters.adalora import AdaLoraAdapter, AdaLoraConfig
from lora_lightning.engine.rank_allocation import (
    RankAllocator,
    adalora_adapters,
    rank_pattern,
    without_masked,
)
from lora_lightning.errors import AdapterMismatchError, ConfigError, RankError
from lora_lightning.layers.traversal import named_adapted_layers
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.paths import child_environment
from tests.helpers.tensors import bit_equal, randomize, trainable
from tests.helpers.torch_models import OneLayerNet, example_input


@pytest.fixture(autouse=True)
def _no_global_seed(monkeypatch: Any) -> None:
    """`seed_everything` leaves a variable behind that DDP's processes seed themselves with."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that it is put back afterwards
    monkeypatch.delenv("PL_GLOBAL_SEED")


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 5, 2, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.proj(x))


def base_and_input(layer: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    if layer == "conv2d":
        return ConvNet().to(dtype), torch.randn(4, 3, 6, 6, dtype=dtype)
    return OneLayerNet(layer).to(dtype), example_input(layer, dtype)


def peft_model(base: nn.Module, **options: Any) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out for every Conv1D
        model = peft.get_peft_model(base, peft.AdaLoraConfig(**{"total_step": 15, **options}))
    for name, parameter in model.named_parameters():
        if "ranknum" in name:  # on any base but fp32, peft would train it, and not save it
            parameter.requires_grad_(False)
    return model


def short(key: str) -> str:
    key = key.removeprefix("base_model.model.").replace(".base_layer", "")
    return key.replace(".adapters.default", "").removesuffix(".default")


def pair(base: nn.Module, **options: Any) -> tuple[peft.PeftModel, nn.Module]:
    """The same net adapted by peft and by us, with the same random adapter values."""
    options = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "target_modules": ["proj"], **options}
    theirs = peft_model(copy.deepcopy(base), **options)
    ours = copy.deepcopy(base)
    inject_adapter(ours, AdaLoraConfig(**options))
    randomize(trainable(theirs).values())
    state = peft.get_peft_model_state_dict(theirs)
    load_adapter_state_dict(ours, {short(key): value for key, value in state.items()})
    return theirs, ours


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=tolerance, atol=tolerance, msg=key)


# -- the adapter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("layer", ["linear", "linear-without-bias", "conv1d", "conv2d"])
def test_same_as_peft(layer: str, dropout: float, dtype: torch.dtype) -> None:
    base, x = base_and_input(layer, dtype)
    before = base(x)
    theirs, ours = pair(base, lora_dropout=dropout)
    tolerance = TOLERANCE[dtype]
    outputs, grads = [], []
    for model in (theirs, ours):
        torch.manual_seed(5)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        grads.append({short(name): p.grad for name, p in trainable(model).items()})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    assert (outputs[1] - before).abs().max() > 1e-2
    assert all(grad.abs().max() > 1e-3 for grad in grads[1].values())
    assert_same(*grads, tolerance)
    with disable_adapter(ours):
        assert bit_equal(ours(x), before)
    theirs.eval().merge_adapter()
    unmerged = ours.eval()(x)
    merge_adapter(ours)
    torch.testing.assert_close(ours(x), unmerged, rtol=tolerance, atol=tolerance)
    merged = [
        {
            short(k): p
            for k, p in model.named_parameters()
            if "lora_" not in k and "ranknum" not in k
        }
        for model in (theirs, ours)
    ]
    assert_same(*merged, tolerance)


def test_starts_as_the_base_with_small_vectors() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 40))
    x = torch.randn(3, 64)
    before = model(x)
    inject_adapter(model, AdaLoraConfig(target_modules=["0", "1"]))
    assert bit_equal(model(x), before)
    adapter = model[0].adapters["default"]
    assert [tuple(p.shape) for p in adapter.parameters()] == [(12, 64), (12, 1), (48, 12)]
    assert not adapter.lora_E.any()
    for name in ("lora_A", "lora_B"):
        assert getattr(adapter, name).std().item() == pytest.approx(0.02, rel=0.1)
    inject_adapter(model, AdaLoraConfig(target_modules=["0"], init_lora_weights=False), "random")
    random = model[0].adapters["random"]
    assert random.lora_A.std().item() == pytest.approx(1, rel=0.1)
    assert random.lora_E.abs().min() > 0


def test_bf16_base_keeps_fp32_adapters() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).bfloat16()
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2))
    randomize(trainable(model).values())
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    adapter = model[0].adapters["default"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    want = x.double() @ (model[0].weight.double() + adapter.delta_weight().double()).T
    want = want + model[0].bias.double()
    assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x).double(), want, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.float()(x.float())
    torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.03)


def test_compiles_once_whatever_the_ranks() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2))
    randomize(trainable(model).values())
    x = torch.randn(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = compiled(x)
    torch.testing.assert_close(first, model(x))
    allocator = RankAllocator(adalora_adapters(model), AdaLoraConfig(init_r=4, target_r=2), 10)
    model(x).sum().backward()
    allocator.measure()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(8):
            allocator.advance()
            again = compiled(x)
            torch.testing.assert_close(again, model(x))
    assert (again - first).abs().max() > 1e-3
    assert sum(int(mask.sum()) for mask in allocator.masks.values()) < 8


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target_r": 0}, RankError, r"target_r is 0; .*\(lora.target_r\)"),
        ({"init_r": 4}, RankError, r"target_r=8 is more than init_r=4.*\(lora.init_r\)"),
        ({"tinit": -1}, ConfigError, r"tinit is -1; .*at least 0. \(lora.tinit\)"),
        ({"deltaT": 0}, ConfigError, r"deltaT is 0; .*at least 1. \(lora.deltaT\)"),
        ({"beta1": 1.0}, ConfigError, r"beta1 is 1.0; .*\(lora.beta1\)"),
        ({"orth_reg_weight": -0.1}, ConfigError, r"orth_reg_weight is -0.1; .*0 or more"),
        (
            {"total_step": 9, "tinit": 4, "tfinal": 5},
            ConfigError,
            "leave none of 9 optimizer steps",
        ),
        ({"rank_pattern": {"a": [True]}}, RankError, "no list of init_r=12 booleans"),
        ({"init_lora_weights": "pissa"}, ConfigError, "init_lora_weights is 'pissa'"),
        ({"r": 4}, ConfigError, "Unknown AdaLoraConfig option 'r'"),
    ],
)
def test_refusals(options: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        AdaLoraConfig.from_dict(options)


def test_a_rank_beyond_the_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    with pytest.raises(RankError, match=r"init_r=4 is larger than '0'.*at most 3.*\(lora.init_r\)"):
        inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2, target_modules=["0"]))
    assert type(model[0]) is nn.Linear


# -- the allocation, without Lightning -----------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"tinit": 3, "tfinal": 4, "deltaT": 2},
        {"tinit": 5, "tfinal": 1, "deltaT": 3, "beta1": 0.6, "beta2": 0.9},
    ],
)
def test_every_step_is_that_of_pefts_allocator(schedule: dict[str, Any]) -> None:
    theirs, ours = pair(OneLayerNet("linear").double(), **schedule)
    config = adalora_adapters(ours)["layers.0.proj"].config
    allocator = RankAllocator(adalora_adapters(ours), config, 15)
    oracle = PeftAllocator(theirs.base_model.model, theirs.peft_config["default"], "default")
    fallen, optimizers = set(), []
    for model in (theirs, ours):
        optimizers.append(torch.optim.Adam(trainable(model).values(), lr=0.1))
    for step in range(1, 16):
        x = torch.randn(4, 6, dtype=torch.float64)
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert allocator.budget(step) == oracle.budget_schedule(step)[0]
        theirs.base_model.update_and_allocate(step)  # the way it is documented
        oracle = theirs.base_model.rankallocator
        allocator.step()
        for name, p in theirs.base_model.model.named_parameters():
            if ".lora_" in name:
                own = allocator.sensitivity.get(short(name))
                assert (own is None) == (name not in oracle.exp_avg_ipt)
                if own is not None:
                    torch.testing.assert_close(
                        own, oracle.exp_avg_ipt[name], rtol=1e-10, atol=1e-10
                    )
                    torch.testing.assert_close(
                        allocator.uncertainty[short(name)],
                        oracle.exp_avg_unc[name],
                        rtol=1e-10,
                        atol=1e-10,
                    )
                path, tensor = short(name).rsplit(".", 1)
                torch.testing.assert_close(
                    getattr(allocator.adapters[path], tensor), p, rtol=1e-10, atol=1e-10
                )
        pattern = theirs.peft_config["default"].rank_pattern or {}
        masks = {path: mask.tolist() for path, mask in allocator.masks.items()}
        assert masks == {short(key).removesuffix(".lora_E"): m for key, m in pattern.items()}
        fallen.add(sum(sum(mask) for mask in masks.values()))
    assert allocator.settled
    assert sum(sum(mask) for mask in masks.values()) == 4
    assert len(fallen) > 2


def test_orthogonality_is_pefts_loss_term() -> None:
    theirs, ours = pair(OneLayerNet("conv1d").double(), orth_reg_weight=0.7)
    x = torch.randn(4, 6, dtype=torch.float64)
    inner = theirs.base_model.model
    forward = inner.forward
    inner.forward = lambda x: SimpleNamespace(loss=forward(x).square().mean())
    theirs.base_model(x).loss.backward()  # PeftModel's own forward goes past the loss term
    ours(x).square().mean().backward()
    RankAllocator(adalora_adapters(ours), AdaLoraConfig(orth_reg_weight=0.7), 1).add_orthogonality()
    grads = [{short(n): p.grad for n, p in trainable(m).items()} for m in (theirs, ours)]
    assert_same(*grads, 1e-10)


def test_orthogonality_of_orthogonal_vectors_and_of_a_skipped_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2))
    adapter = model[0].adapters["default"]
    allocator = RankAllocator(adalora_adapters(model), adapter.config, 9)
    allocator.add_orthogonality()
    assert all(p.grad is None for p in adapter.parameters())
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(4))
    adapter.lora_E.grad = torch.zeros(4, 1)
    allocator.add_orthogonality()
    assert torch.equal(adapter.lora_A.grad, torch.zeros(4, 4))  # and not NaN
    assert adapter.lora_B.grad.abs().max() > 0


def test_a_budget_that_does_not_fall_and_a_module_that_is_never_called() -> None:
    """Where peft's kthvalue fails (k = 0), and its `p * p.grad` (None)."""
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=4), "full")
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2), "less")
    for name, left in (("full", {"used": 4, "idle": 4}), ("less", {"used": 4, "idle": 0})):
        adapters = adalora_adapters(model, name)
        randomize(p for adapter in adapters.values() for p in adapter.parameters())
        for p in adapters["used"].parameters():
            p.grad = torch.randn_like(p)
        allocator = RankAllocator(adapters, adapters["used"].config, 3)
        for _ in range(3):
            allocator.step()
        assert {path: int(mask.sum()) for path, mask in allocator.masks.items()} == left


def test_state_of_other_adapters_is_refused() -> None:
    allocators = []
    for width in (8, 6):
        model = nn.Sequential(nn.Linear(width, 8))
        inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2))
        randomize(trainable(model).values())
        model(torch.randn(3, width)).sum().backward()
        allocator = RankAllocator(adalora_adapters(model), AdaLoraConfig(init_r=4, target_r=2), 5)
        allocator.step()
        allocators.append(allocator)
    with pytest.raises(AdapterMismatchError, match=r"sensitivity of shape \(4, 8\) for '0.lora_A'"):
        allocators[1].load_state(allocators[0].state())
    with pytest.raises(ConfigError, match=r"\(lora.total_step\)"):
        RankAllocator({}, AdaLoraConfig())


# -- rank patterns and PEFT's files --------------------------------------------------------------


def finished_pair() -> tuple[peft.PeftModel, nn.Module]:
    theirs, ours = pair(OneLayerNet("linear").double())
    x = torch.randn(4, 6, dtype=torch.float64)
    allocator = RankAllocator(adalora_adapters(ours), AdaLoraConfig(init_r=4, target_r=2), 15)
    for step in (13, 15):
        for model in (theirs, ours):
            model.zero_grad()
            model(x).square().sum().backward()
        theirs.base_model.update_and_allocate(step)
        allocator.steps = step - 1
        allocator.step()
    return theirs, ours


def test_pattern_and_pruned_tensors_are_those_peft_saves() -> None:
    theirs, ours = finished_pair()
    state = peft.get_peft_model_state_dict(theirs)
    pattern = theirs.peft_config["default"].rank_pattern
    assert rank_pattern(ours) == pattern
    assert sum(map(sum, pattern.values())) == 4
    pruned = without_masked(adapter_state_dict(ours))
    assert_same({short(key): value for key, value in state.items()}, pruned, 1e-10)

    # What peft saved, here.
    x = torch.randn(4, 6, dtype=torch.float64)
    fresh = OneLayerNet("linear").double()
    fresh.load_state_dict(ours.state_dict(), strict=False)
    options = peft_options(theirs)
    inject_adapter(fresh, AdaLoraConfig.from_file_options(options))
    load_adapter_state_dict(fresh, pruned)
    torch.testing.assert_close(fresh(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert rank_pattern(fresh) == pattern  # also of tensors that have been pruned already

    # What we save, there: as it is, and pruned with the pattern.
    for tensors, ranks in ((adapter_state_dict(ours), None), (pruned, rank_pattern(ours))):
        config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["proj"])
        options = {**config.file_options(), "rank_pattern": ranks}
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            options.pop(key)
        base = OneLayerNet("linear").double()
        base.load_state_dict(ours.state_dict(), strict=False)
        loaded = peft_model(base, **options)
        named = {f"base_model.model.{key}": value for key, value in tensors.items()}
        peft.set_peft_model_state_dict(loaded, named)
        torch.testing.assert_close(loaded(x), ours(x), rtol=1e-10, atol=1e-10)


def test_folders_both_ways(tmp_path: Path) -> None:
    theirs, ours = finished_pair()
    x = torch.randn(4, 6, dtype=torch.float64)

    def fresh() -> nn.Module:
        base = OneLayerNet("linear").double()
        base.load_state_dict(ours.state_dict(), strict=False)
        return base

    theirs.save_pretrained(tmp_path / "theirs")
    loaded = fresh()
    load_adapter(loaded, tmp_path / "theirs")
    assert rank_pattern(loaded) == rank_pattern(ours)
    torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-10, atol=1e-10)
    for name, model in (("ours", ours), ("again", loaded)):
        save_adapter(model, tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft does not know its own keys of rank_pattern
            there = peft.PeftModel.from_pretrained(fresh(), tmp_path / name)
        torch.testing.assert_close(there(x), ours(x), rtol=1e-10, atol=1e-10)


def peft_options(model: peft.PeftModel) -> dict[str, Any]:
    known = {spec.name for spec in dataclasses.fields(AdaLoraConfig)} | AdaLoraConfig.file_only
    saved = model.peft_config["default"].to_dict()
    return {
        k: list(v) if isinstance(v, set) else v
        for k, v in saved.items()
        if k in known and v is not None
    }


def test_no_pattern_before_anything_was_masked() -> None:
    _, ours = pair(OneLayerNet("linear").double())
    assert rank_pattern(ours) == {}
    for adapter in adalora_adapters(ours).values():
        nn.init.zeros_(adapter.lora_E)
    assert rank_pattern(ours) == {}
    assert all(len(t) for t in without_masked(adapter_state_dict(ours)).values())


# -- driven by LoraCallback ----------------------------------------------------------------------

CONFIG = {"init_r": 6, "target_r": 3, "target_modules": ["embed", "body.2"]}


def total_rank(model: nn.Module) -> int:
    return sum(
        int((layer.adapters["default"].lora_E != 0).sum())
        for _, layer in named_adapted_layers(model)
        if isinstance(layer.adapters["default"], AdaLoraAdapter)
    )


class Watch(Callback):
    """Total rank after every batch; scores stay finite, and what is masked for good stays zero."""

    def __init__(self, lora: LoraCallback) -> None:
        self.lora = lora
        self.ranks: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ranks.append(total_rank(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        allocator = self.lora.ranks.allocator
        assert all(t.isfinite().all() for t in allocator.sensitivity.values())
        if allocator.settled:
            for path, mask in allocator.masks.items():
                assert not allocator.adapters[path].lora_E[~mask].any()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_total_rank_falls_to_the_target(tmp_path: Path, capsys: Any, accumulate: int) -> None:
    lora = LoraCallback(AdaLoraConfig(**CONFIG, tinit=2, tfinal=3 // accumulate))
    watch = Watch(lora)
    module = Net()
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 3 * accumulate}
    make_trainer(tmp_path, lora, watch, **options).fit(module, Data())
    ranks = watch.ranks[accumulate - 1 :: accumulate]
    assert len(ranks) == 12
    assert ranks[:2] == [12, 12]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[12 - 3 // accumulate - 1 :] == [6] * (3 // accumulate + 1)
    masks = lora.ranks.allocator.masks
    embed, body = (int(masks[name].sum()) for name in ("embed", "body.2"))
    line = f"AdaLoRA kept a total rank of 6 of 12: body.2 {body}, embed {embed}"
    assert line in capsys.readouterr().out


def test_a_run_that_is_too_short(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ConfigError, match="leave none of 4 optimizer steps"):
        make_trainer(tmp_path, LoraCallback(AdaLoraConfig(**CONFIG, tinit=4))).fit(Net(), Data())
    with pytest.warns(UserWarning, match="ends after 4 optimizer steps, before .*step 9"):
        make_trainer(tmp_path, LoraCallback(AdaLoraConfig(**CONFIG, total_step=9))).fit(
            Net(), Data()
        )
    assert "ranks are not final: 4 of 9 steps" in capsys.readouterr().out
    endless = make_trainer(tmp_path, LoraCallback(AdaLoraConfig(**CONFIG)), max_epochs=-1)
    with pytest.raises(ConfigError, match=r"Set total_step, or max_steps.*\(lora.total_step\)"):
        endless.fit(Net(), Data())
    lora = LoraCallback(AdaLoraConfig(**CONFIG, tinit=40, tfinal=40))
    make_trainer(tmp_path, lora, fast_dev_run=True).fit(Net(), Data())


class Regression(LightningModule):
    """float64 throughout; `order` is how the user writes manual optimization."""

    def __init__(self, order: str = "automatic") -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
        self.net = nn.Sequential(*layers).double()
        self.order = order
        self.automatic_optimization = order == "automatic"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        if self.order == "automatic":
            return loss
        optimizer = self.optimizers()
        if self.order == "zero first":
            optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.order == "zero last":
            optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def regression_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.stack([x[:, :3].prod(1), x[:, 3].sin()], 1))


REGRESSION = {
    "init_r": 5,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 4,
    "deltaT": 2,
    "orth_reg_weight": 0.3,
    "target_modules": ["0", "2"],
}


@pytest.mark.parametrize("order", ["automatic", "zero first", "zero last"])
def test_trajectory_of_a_peft_loop(tmp_path: Path, order: str) -> None:
    """15 steps: loss term, clipping, importance, masks and optimizer, without a call by the user."""
    clip = 0.01 if order == "automatic" else None  # which Lightning leaves to the user otherwise
    module = Regression(order)
    lora = LoraCallback(AdaLoraConfig(**REGRESSION), module="net")
    snapshots: list[dict[str, Tensor]] = []

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.on_train_batch_end(trainer, pl_module)

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            state = adapter_state_dict(pl_module.net)
            snapshots.append({k: v.clone() for k, v in state.items()})

    loader = DataLoader(regression_data(), batch_size=12)
    make_trainer(tmp_path, lora, Keep(), max_epochs=3, gradient_clip_val=clip).fit(module, loader)
    assert len(snapshots) == 16

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Regression().net

        def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=nn.functional.mse_loss(self.net(x), y))

    options = {**REGRESSION, "target_modules": ["net.0", "net.2"]}
    theirs = peft_model(WithLoss(), **options)
    names = {k: short(k).removeprefix("net.") for k in trainable(theirs)}
    with torch.no_grad():
        for name, p in trainable(theirs).items():
            p.copy_(snapshots[0][names[name]])
    optimizer = torch.optim.AdamW(trainable(theirs).values(), lr=0.05)
    clipped = 0
    for step, batch in enumerate(list(loader) * 3, start=1):
        theirs.base_model(*batch).loss.backward()
        if clip:
            clipped += int(nn.utils.clip_grad_norm_(trainable(theirs).values(), clip) > clip)
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        tensors = {names[name]: p.detach() for name, p in trainable(theirs).items()}
        assert_same(tensors, snapshots[step], 1e-10)
    assert clip is None or clipped > 5
    assert sum(int((v != 0).sum()) for k, v in tensors.items() if k.endswith("lora_E")) == 4


def test_two_optimizers_with_a_part_each(tmp_path: Path) -> None:
    """A step of the schedule is a batch; each optimizer's own gradients are measured."""

    class Parts(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.net[i].parameters(), lr=0.05) for i in (0, 2)]

    class Scores(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            self.last = lora.ranks.allocator.state()["sensitivity"] or self.last

    states, scores = [], Scores()
    for module in (Regression("zero first"), Parts("manual")):
        lora = LoraCallback(AdaLoraConfig(**REGRESSION), module="net")
        loader = DataLoader(regression_data(), batch_size=12)
        torch.manual_seed(0)
        make_trainer(tmp_path, lora, scores, max_epochs=3).fit(module, loader)
        assert lora.ranks.allocator.steps == 15
        states.append({**adapter_state_dict(module.net), "scores": scores.last["0.lora_A"]})
    assert_same(*states, 1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(tmp_path: Path, fused: bool) -> None:
    """16-mixed: the term is not scaled with the loss, and a step left out is not measured."""

    class Scaled(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if self.global_step == 2 and self.with_inf else 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    states = []
    for scale in (1.0, 2.0**10, None):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        # bf16, the CPU's half precision; what is tested is the scaler.
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = scaler
        seed_everything(4, verbose=False)
        module = Scaled()
        module.with_inf = scaler is not None
        lora = LoraCallback(AdaLoraConfig(**CONFIG, init_lora_weights=False), nonfinite="ignore")
        make_trainer(tmp_path, lora, Watch(lora), max_epochs=2, plugins=[plugin]).fit(
            module, Data()
        )
        allocator = lora.ranks.allocator
        assert allocator.steps == 8
        assert allocator.settled
        assert total_rank(module) == 6
        state = adapter_state_dict(module)
        assert all(t.isfinite().all() for t in state.values())
        states.append(state)
    assert_same(states[0], states[1], 1e-6)
    assert any((states[0][key] - states[2][key]).abs().max() > 1e-3 for key in states[0])


def test_averaged_weights_keep_the_final_ranks(tmp_path: Path) -> None:
    lora = LoraCallback(AdaLoraConfig(**CONFIG, tfinal=2))
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    module = Net()
    make_trainer(tmp_path, lora, averaging, max_epochs=2).fit(module, Data())
    assert total_rank(module) == 6


def test_a_frozen_adapter_has_no_schedule(tmp_path: Path, capsys: Any) -> None:
    frozen = LoraCallback(
        AdaLoraConfig(**CONFIG, tinit=40, init_lora_weights=False),
        adapter_name="frozen",
        trainable=False,
    )
    module = Net()
    make_trainer(tmp_path, frozen, LoraCallback(r=2)).fit(module, Data())
    assert frozen.ranks.allocator is None
    assert "rank of" not in (text := capsys.readouterr().out)  # the line that a schedule ends with
    assert "not final" not in text
    assert all(adapter.lora_E.all() for adapter in adalora_adapters(module, "frozen").values())


def test_other_adapter_types_have_no_allocation(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, LoraCallback(r=2), saver).fit(Net(), Data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["lora_lightning"]["adapters"]["default"]["rank_allocation"] is None


SCRIPT = """
import os, sys
import torch
from torch.utils.data import DataLoader
from tests.adapters.test_adalora import REGRESSION, AdaLoraConfig, LoraCallback, Regression, make_trainer, regression_data

folder, devices = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
module = Regression()
lora = LoraCallback(AdaLoraConfig(**REGRESSION), module="net")
trainer = make_trainer(folder, lora, max_epochs=3, devices=devices, gradient_clip_val=0.01,
              strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=False)
mine = list(range(int(os.environ.get("LOCAL_RANK", 0)), 60, devices))
trainer.fit(module, DataLoader(regression_data(), batch_size=12 // devices, sampler=mine))
state = {k: v for k, v in module.state_dict().items() if ".adapters." in k}
torch.save([state, lora.ranks.allocator.masks], f"{folder}/{devices}-{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_allocate_the_same(tmp_path: Path) -> None:
    """On both, and the same as one process with their common batches."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for devices in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), str(devices)],
            env=child_environment(),
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    alone, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    for part in (0, 1):
        assert_bit_equal(first[part], second[part])
        assert_same(alone[part], first[part], 1e-10)


# -- resuming ------------------------------------------------------------------------------------


class Kill(Callback):
    """End the run after an epoch, as a crash would, without telling the Trainer its length."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epoch


def fit(
    folder: Path, *callbacks: Callback, ckpt_path: Any = None, epochs: int = 6, **options: Any
) -> tuple[dict[str, Tensor], LoraCallback]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    schedule = {"tinit": 3, "tfinal": 6, "deltaT": 3, "lora_dropout": 0.2}
    lora = LoraCallback(AdaLoraConfig(**CONFIG, **schedule))
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    module = Net()
    trainer = make_trainer(folder, lora, *callbacks, saver, max_epochs=epochs, **options)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    state = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{k}": v for i, s in state.items() for k, v in s.items() if torch.is_tensor(v)}
    return {**module.state_dict(), **moments}, lora


def assert_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(tmp_path: Path, accumulate: int) -> None:
    """Before anything was allocated, in the middle of the schedule, and when ranks are final."""
    options = {"accumulate_grad_batches": accumulate, "epochs": 6 * accumulate}
    straight, lora = fit(tmp_path / "straight", **options)
    assert lora.ranks.allocator.settled
    for epoch in (1, 3, 5) if accumulate == 1 else (6,):
        _, broken = fit(tmp_path / "broken", Kill(epoch), **options)
        assert broken.ranks.allocator.steps == 4 * epoch // accumulate
        resumed, lora = fit(
            tmp_path, ckpt_path=tmp_path / f"broken/epoch={epoch - 1}.ckpt", **options
        )
        assert_bit_equal(straight, resumed)
        assert lora.ranks.allocator.steps == 24


def test_twin_without_the_allocation_differs(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path / "straight")
    fit(tmp_path / "broken", Kill(3))
    path = tmp_path / "broken/last.ckpt"
    saved = torch.load(path, weights_only=True)
    state = saved["lora_lightning"]["adapters"]["default"]["rank_allocation"]
    assert state["steps"] == 12
    assert not state["settled"]
    saved["lora_lightning"]["adapters"]["default"]["rank_allocation"] = None
    del saved["lora_lightning"]["content"]  # the hashes, which would notice this
    torch.save(saved, path)
    resumed, _ = fit(tmp_path / "broken", ckpt_path=path)
    assert any(not torch.equal(straight[key], resumed[key]) for key in straight)


def test_a_checkpoint_by_a_callback_before_ours(tmp_path: Path) -> None:
    """At the end of a batch, when we have not counted it yet."""

    class Early(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    lora = LoraCallback(AdaLoraConfig(**CONFIG, tinit=3, tfinal=6, deltaT=3, lora_dropout=0.2))
    seed_everything(7, verbose=False)
    make_trainer(tmp_path, Early(), lora, max_epochs=6).fit(Net(), Data())
    saved = torch.load(tmp_path / "early.ckpt", weights_only=True)
    state = saved["lora_lightning"]["adapters"]["default"]["rank_allocation"]
    assert state["steps"] == 12
    assert not all(mask.all() for mask in state["masks"].values())
    for path, mask in state["masks"].items():
        assert not saved["state_dict"][f"{path}.adapters.default.lora_E"][~mask].any()


def test_a_longer_run_keeps_the_ranks(tmp_path: Path) -> None:
    """Resumed for more epochs, and continued by a second fit of the same Trainer."""
    _, first = fit(tmp_path)
    masks = first.ranks.allocator.masks
    _, second = fit(tmp_path, ckpt_path="last", epochs=8)
    assert second.ranks.allocator.settled
    assert second.ranks.allocator.total_step == 24
    assert_bit_equal(masks, second.ranks.allocator.masks)

    lora = LoraCallback(AdaLoraConfig(**CONFIG))
    module = Net()
    trainer = make_trainer(tmp_path, lora, max_epochs=2)
    trainer.fit(module, Data())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, Data())
    assert lora.ranks.allocator.steps == 16
    assert total_rank(module) == 6
