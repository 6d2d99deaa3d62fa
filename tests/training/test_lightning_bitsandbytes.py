"""Lightning's `BitsandbytesPrecision`: it converts once, before adapters are attached; on the CPU.

Lightning refuses the plugin without a GPU, although bitsandbytes itself runs on a CPU too; a
fixture takes that check away. What the plugin does on a GPU only (it quantises as layers are made)
is tested there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor, nn

from lora_lightning import LoraCallback, LoraConfig, ShiraConfig, disable_adapter, inject_adapter
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers.quantized.base import AdaptedBitsandbytesLinear
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.training import precision
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.tensors import adapter_tensors

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
MODES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"]
WIDTH = 64


class Wide(Net):
    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # the plugin leaves casts around other layers to users
        y, weight = self.body(self.norm(self.embed(x))), self.head.weight
        return self.head(y.to(weight.dtype) if weight.is_floating_point() else y)


class WideInConfigureModel(Wide):
    """Built inside the plugin's context, where `nn.Linear` is a class of bitsandbytes."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        if not hasattr(self, "embed"):
            for name, child in Wide().named_children():
                self.add_module(name, child)


@pytest.fixture
def on_cpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(_AcceleratorConnector, "_validate_precision_choice", lambda self: None)


def plugin(mode: str, ignored: str | None = "head") -> BitsandbytesPrecision:
    dtype = torch.float16 if "int8" in mode else torch.float32
    return BitsandbytesPrecision(mode, dtype, {ignored} if ignored else None)


def fit(
    folder: Path, mode: str, epochs: int = 2, ckpt_path: Any = None, config: Any = None, **how: Any
) -> tuple[Any, Any]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    config = config or LoraConfig(r=2, lora_dropout=0.3, modules_to_save=["head"])
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    module = how.pop("kind", Wide)()
    used = plugin(mode, how.pop("ignored", "head"))
    trainer = make_trainer(
        folder, LoraCallback(config), saver, max_epochs=epochs, plugins=used, **how
    )
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    return module, trainer


def codes(layer: Any) -> list[Tensor]:
    """All that the weight consists of."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = layer.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        return [weight.data] if weight.is_floating_point() else [weight.data, scale]
    state = weight.quant_state
    return [weight.data, *state.as_dict(packed=True).values()]


def quantized(mode: str, weight: Tensor) -> list[Tensor]:
    """The same by bitsandbytes' own functions, from the dense weight."""
    if mode == "int8":
        return list(bnb.functional.int8_vectorwise_quant(weight.half())[:2])
    if mode == "int8-training":
        return [weight]
    kind, _, double = mode.partition("-")
    data, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=bool(double)
    )
    return [data, *state.as_dict(packed=True).values()]


def assert_base_is_that_of(mode: str, module: Any) -> None:
    original = Wide()
    for name in ("embed", "body.2"):
        layer = module.get_submodule(name)
        assert isinstance(layer, AdaptedBitsandbytesLinear)
        dense = original.get_submodule(name)
        for one, other in zip(codes(layer), quantized(mode, dense.weight.data), strict=True):
            assert torch.equal(one.to(other), other)
        assert torch.equal(layer.bias, dense.bias)
    with disable_adapter(module):
        assert type(module.head.weight) is nn.Parameter
        assert torch.equal(module.head.weight, original.head.weight)


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("mode", MODES)
def test_fit_and_resume(mode: str, tmp_path: Path) -> None:
    module, trainer = fit(tmp_path / "straight", mode)
    assert_base_is_that_of(mode, module)
    found = adapter_tensors(module)
    assert len(found) == 6
    state = [v for s in trainer.optimizers[0].state_dict()["state"].values() for v in s.values()]
    assert {t.dtype for t in (*found.values(), *state)} == {torch.float32}
    assert all(t.any() for t in found.values())
    assert not any(p.requires_grad for n, p in named_parameters(module) if n not in found)
    saved = torch.load(tmp_path / "straight/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == found.keys()

    fit(tmp_path / "broken", mode, epochs=1)
    again, trainer_again = fit(tmp_path / "broken", mode, ckpt_path="last")
    assert all(torch.equal(adapter_tensors(again)[name], t) for name, t in found.items())
    assert_base_is_that_of(mode, again)

    # The same module once more, another one from the file: the same figures.
    losses = [trainer.validate(module, Data(), verbose=False)]
    other = make_trainer(
        tmp_path,
        LoraCallback(r=2, lora_dropout=0.3, modules_to_save=["head"]),
        plugins=plugin(mode),
    )
    fresh = Wide()
    path = tmp_path / "straight/last.ckpt"
    losses.append(other.validate(fresh, Data(), ckpt_path=path, verbose=False))
    assert losses[0] == losses[1]
    assert_base_is_that_of(mode, module)
    trainer_again.fit_loop.max_epochs = 3  # with the weights quantised from the start
    trainer_again.fit(again, Data(), ckpt_path=tmp_path / "broken/last.ckpt")
    assert_base_is_that_of(mode, again)


@pytest.mark.usefixtures("on_cpu")
def test_a_frozen_teacher_stays_frozen_when_it_is_quantised(tmp_path: Path) -> None:
    class WithTeacher(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    module = WithTeacher()
    for _ in range(2):  # quantised in the first run, so in the second
        callback = LoraCallback(r=2)
        make_trainer(tmp_path, callback, plugins=plugin("nf4")).fit(module, Data())
        assert list(callback._selection.targets) == ["embed", "body.2", "head"]
        assert list(callback._selection.passed_over.frozen) == ["teacher"]


@pytest.mark.usefixtures("on_cpu")
def test_quantised_once(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[tuple[int, ...]] = []
    original = bnb.functional.quantize_4bit

    def count(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(weight.shape))
        return original(weight, *args, **kwargs)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", count)
    fit(tmp_path, "nf4")
    assert sorted(seen) == [(WIDTH, 8), (WIDTH, WIDTH)]


@pytest.mark.usefixtures("on_cpu")
def test_negative_control_without_conversion_first_loses_the_adapters(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(precision, "is_a", lambda plugin, name: False)
    monkeypatch.setattr(precision, "_LIGHTNING", ("",))
    with pytest.raises(AdapterStateError, match=r"embed, body.2 were replaced after adapters"):
        fit(tmp_path, "nf4", limit_val_batches=0)


@pytest.mark.usefixtures("on_cpu")
def test_starts_that_read_the_weight_read_the_rounded_one(tmp_path: Path) -> None:
    config = LoraConfig(r=2, use_dora=True, modules_to_save=["head"])
    module = fit(tmp_path, "nf4", epochs=1, config=config, limit_train_batches=0)[0]
    layer = module.body[2]
    norms = layer.dense_weight().norm(dim=1)
    torch.testing.assert_close(layer.adapters["default"].lora_magnitude_vector.data, norms)


@pytest.mark.usefixtures("on_cpu")
def test_an_adapter_checkpoint_is_not_quantised_into_the_base(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """The plugin takes the first tensor for a layer whose name ends with "weight"."""
    config = ShiraConfig(r=2, modules_to_save=["head"])  # has a shira_weight
    fit(tmp_path, "nf4", epochs=1, config=config)
    module = fit(tmp_path, "nf4", ckpt_path="last", config=config)[0]
    assert_base_is_that_of("nf4", module)
    state = adapter_tensors(module)  # also where a user loads them by hand
    module.load_state_dict(state, strict=False)
    assert_base_is_that_of("nf4", module)
    monkeypatch.setattr(precision, "_quantize_base_only", lambda layer: None)
    module = fit(tmp_path / "other", "nf4", epochs=1, config=config)[0]
    with pytest.raises(
        (RuntimeError, AssertionError)
    ):  # the negative control: it wants to do so on a GPU
        module.load_state_dict(state, strict=False)


@pytest.mark.usefixtures("on_cpu")
def test_an_optimizer_that_was_built_before(tmp_path: Path) -> None:
    """As LightningCLI builds it: it holds the weights that the plugin replaces."""
    module = Wide()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module.configure_optimizers = lambda: optimizer
    make_trainer(tmp_path, LoraCallback(r=2, modules_to_save=["head"]), plugins=plugin("nf4")).fit(
        module, Data()
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    assert len(held) == 6


@pytest.mark.usefixtures("on_cpu")
def test_a_model_built_in_the_context_of_the_plugin(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    how = {"kind": WideInConfigureModel, "ignored": None, "config": config}
    module = fit(tmp_path / "straight", "nf4", **how)[0]
    assert all(
        isinstance(module.get_submodule(n), AdaptedBitsandbytesLinear) for n in ("embed", "body.2")
    )
    found = adapter_tensors(module)
    assert {t.dtype for t in found.values()} == {torch.float32}
    fit(tmp_path / "broken", "nf4", epochs=1, **how)
    again = fit(tmp_path / "broken", "nf4", ckpt_path="last", **how)[0]
    assert all(torch.equal(adapter_tensors(again)[name], t) for name, t in found.items())


@pytest.mark.usefixtures("on_cpu")
def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"BitsandbytesPrecision: ignore_modules"):
        fit(tmp_path, "nf4", ignored="nothing")  # the head is quantised, but to train in full
    module = Wide()
    inject_adapter(module, LoraConfig(r=2))
    trainer = make_trainer(tmp_path, LoraCallback(r=2), plugins=plugin("nf4"))
    with pytest.raises(AdapterStateError, match=r"sit on layers that BitsandbytesPrecision would"):
        trainer.fit(module, Data())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "kind"),
    [*((mode, Wide) for mode in MODES), ("nf4", WideInConfigureModel)],
)
def test_on_a_gpu(mode: str, kind: type, tmp_path: Path) -> None:
    built_there = kind is WideInConfigureModel
    config = LoraConfig(r=2, modules_to_save=None if built_there else ["head"])
    how = {"kind": kind, "accelerator": "gpu", "devices": 1, "config": config}
    how["ignored"] = None if built_there else "head"
    module = fit(tmp_path / "straight", mode, **how)[0]
    found = adapter_tensors(module)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert all(t.any() for t in found.values())
    fit(tmp_path / "broken", mode, epochs=1, **how)
    again = fit(tmp_path / "broken", mode, ckpt_path="last", **how)[0]
    assert all(torch.equal(adapter_tensors(again)[name], t) for name, t in found.items())
