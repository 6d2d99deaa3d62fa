"""Lightning's precisions: adapters in fp32 (or the base's dtype), base as the plugin says, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from torch import Tensor, nn

from lora_lightning import LoraCallback, inject_adapter, load_adapter, save_adapter
from lora_lightning.adapters.base import Adapter
from lora_lightning.errors import AdapterMismatchError, ConfigError
from lora_lightning.layers.traversal import named_parameters
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.tensors import adapter_tensors

# Precision: dtype of the base, of adapters, and of adapters that follow the base.
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PRECISIONS = {
    "32-true": (FP32, FP32, FP32),
    "bf16-mixed": (FP32, FP32, FP32),
    "16-mixed": (FP32, FP32, FP32),
    "bf16-true": (BF16, FP32, BF16),
    "16-true": (FP16, FP32, FP16),
    "64-true": (FP64, FP64, FP64),
}


class Watch(Callback):
    """Remembers which tensors got a finite gradient, and their dtypes."""

    def __init__(self) -> None:
        self.reached: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, p in named_parameters(pl_module):
            if p.grad is not None:
                finite = bool(p.grad.isfinite().all())
                assert finite or trainer.precision == "16-mixed", name  # there the scale adapts
                self.dtypes.add(p.grad.dtype)
                if finite and p.grad.any():
                    self.reached.add(name)


class CoarseNet(Net):
    """In float16 AdamW's usual eps, 1e-8, is zero, and divides zero by zero."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


class HalfNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.to(BF16)


def fit(
    folder: Path,
    precision: str,
    epochs: int = 2,
    ckpt_path: Any = None,
    kind: type = Net,
    options: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> tuple[Any, Any, Watch]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    defaults = {"r": 2, "lora_dropout": 0.3, "modules_to_save": ["head"]}
    lora = LoraCallback(**{**defaults, **(options or {})})
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    watch, module = Watch(), kind()
    how: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed" and "accelerator" not in trainer_options:
        # As an option, Lightning makes bf16-mixed of it on a CPU; torch's scaler works there too.
        how = {"plugins": MixedPrecision(precision, "cpu")}
    trainer = make_trainer(folder, lora, saver, watch, max_epochs=epochs, **how, **trainer_options)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    return module, trainer, watch


def moments(trainer: Any) -> list[Tensor]:
    state = trainer.optimizers[0].state_dict()["state"].values()
    return [s[key] for s in state for key in ("exp_avg", "exp_avg_sq")]


def dtypes(tensors: Any) -> set[torch.dtype]:
    return {t.dtype for t in tensors}


def check_run(
    folder: Path, precision: str, base: torch.dtype, own: torch.dtype, **how: Any
) -> None:
    """One uninterrupted run and one in two parts: all that the table in the docs claims."""
    module, trainer, watch = fit(folder / "straight", precision, **how)
    found = adapter_tensors(module)
    assert len(found) == 6
    assert watch.reached == set(found)
    assert dtypes(found.values()) == watch.dtypes == dtypes(moments(trainer)) == {own}
    assert all(t.any() for t in found.values())  # B has left zero

    state, original = module.state_dict(), Net().state_dict()
    assert state.keys() - original.keys() == set(found)
    for name, tensor in original.items():
        wanted = tensor.to(base) if tensor.is_floating_point() else tensor
        assert state[name].dtype == wanted.dtype, name
        assert torch.equal(state[name].cpu(), wanted), name

    saved = torch.load(folder / "straight/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == set(found)
    assert dtypes(saved["state_dict"].values()) == {own}

    fit(folder / "broken", precision, epochs=1, **how)
    again, trainer_again, _ = fit(folder / "broken", precision, ckpt_path="last", **how)
    resumed = adapter_tensors(again)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in found.items())
    both = zip(moments(trainer_again), moments(trainer), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_are_fp32_master_copies(precision: str, tmp_path: Path) -> None:
    base, own, _ = PRECISIONS[precision]
    check_run(tmp_path, precision, base, own)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
def test_adapters_in_the_dtype_of_the_base_when_asked(precision: str, tmp_path: Path) -> None:
    base, _, own = PRECISIONS[precision]
    kind = CoarseNet if own == FP16 else Net
    check_run(tmp_path, precision, base, own, options={"autocast_adapter_dtype": False}, kind=kind)


def test_negative_control_without_master_copies_fails(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Adapter, "_apply", nn.Module._apply)
    with pytest.raises(AssertionError, match="bfloat16"):
        check_run(tmp_path, "bf16-true", BF16, FP32)


def test_sixteen_mixed_scales(tmp_path: Path) -> None:
    """The scale is saved too, so that resuming is exact (`check_run`) with it."""
    scaler = fit(tmp_path, "16-mixed")[1].precision_plugin.scaler
    assert scaler.is_enabled()
    assert scaler.get_scale() > 1
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["MixedPrecision"]["scale"] == scaler.get_scale()


def test_sixteen_mixed_as_an_option_is_bf16_on_a_cpu(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        trainer = make_trainer(tmp_path, LoraCallback(r=2), precision="16-mixed")
    trainer.fit(Net(), Data())
    assert trainer.precision == "bf16-mixed"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_gpu(precision: str, tmp_path: Path) -> None:
    base, own, _ = PRECISIONS[precision]
    check_run(tmp_path, precision, base, own, accelerator="gpu", devices=1)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_checkpoint_of_the_other_dtype_is_refused(wanted: bool, tmp_path: Path) -> None:
    fit(tmp_path, "bf16-true", epochs=1, options={"autocast_adapter_dtype": wanted})
    text = (
        f"autocast_adapter_dtype: {wanted} in the checkpoint, {not wanted} here "
        r"\(lora.autocast_adapter_dtype\)"
    )
    with pytest.raises(AdapterMismatchError, match=text):
        fit(
            tmp_path,
            "bf16-true",
            ckpt_path="last",
            options={"autocast_adapter_dtype": not wanted},
        )


def test_an_adapter_that_is_there_in_the_other_dtype_is_refused(tmp_path: Path) -> None:
    lora = LoraCallback(r=2, modules_to_save=["head"], autocast_adapter_dtype=False)
    module = Net()
    trainer = make_trainer(tmp_path, lora)
    trainer.fit(module, Data())
    trainer.validate(module, Data())  # the same again is fine
    lora.autocast_adapter_dtype = True
    with pytest.raises(AdapterMismatchError, match="autocast_adapter_dtype: False there, True"):
        trainer.validate(module, Data())


def test_a_folder_or_checkpoint_starts_in_either_dtype(tmp_path: Path) -> None:
    module = fit(tmp_path, "bf16-true", kind=HalfNet)[0]
    save_adapter(module, tmp_path / "folder")
    trained = adapter_tensors(module)
    for place in ("folder", "last.ckpt"):
        for autocast, dtype in ((True, FP32), (False, BF16)):
            other = HalfNet()
            load_adapter(other, tmp_path / place, autocast_adapter_dtype=autocast)
            assert dtypes(adapter_tensors(other).values()) == {dtype}
            for name, tensor in adapter_tensors(other).items():
                assert torch.equal(tensor, trained[name].to(dtype))
    lora = LoraCallback(init_from=str(tmp_path / "folder"), autocast_adapter_dtype=False)
    other = HalfNet()
    make_trainer(tmp_path, lora, precision="bf16-true").fit(other, Data())
    assert dtypes(adapter_tensors(other).values()) == {BF16}


def test_an_adapter_that_follows_is_cast_along() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)).to(BF16)
    config = LoraCallback(r=2, target_modules=["0", "1"]).config
    inject_adapter(model, config, autocast_adapter_dtype=False)
    inject_adapter(model, config, "wide")
    for dtype in (BF16, FP16, FP32):
        model.to(dtype)
        for name, wanted in (("default", dtype), ("wide", FP32)):
            own = {k: v for k, v in adapter_tensors(model).items() if f".adapters.{name}." in k}
            assert len(own) == 6
            assert dtypes(own.values()) == {wanted}
        scales = [b for name, b in model.named_buffers() if name.endswith("scaling_tensor")]
        assert dtypes(scales) == {FP32}  # a scaling is no less exact for that


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_what_trains_in_16_bits_is_named(precision: str, tmp_path: Path, capsys: Any) -> None:
    """Biases train in place, in the dtype of the base."""
    options = {"target_modules": ["embed"], "bias": "lora_only"}
    fit(tmp_path, precision, epochs=1, options=options)
    line = "in 16 bits, where small steps are rounded away: embed.bias; with a '-mixed'"
    assert (line in " ".join(capsys.readouterr().out.split())) == (precision == "bf16-true")
    fit(tmp_path / "asked", precision, 1, options={**options, "autocast_adapter_dtype": False})
    assert "in 16 bits" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("first", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_a_checkpoint_goes_on_under_any_precision(first: str, tmp_path: Path) -> None:
    """The base is known by the values that it had before the plugin cast it."""
    module, trainer, _ = fit(tmp_path, first, epochs=1)
    for second in PRECISIONS:
        again, other, _ = fit(
            tmp_path, second, epochs=1, ckpt_path=tmp_path / "epoch=0.ckpt"
        )  # loads, and has nothing left to do
        for name, tensor in adapter_tensors(module).items():
            assert torch.equal(
                adapter_tensors(again)[name], tensor.to(adapter_tensors(again)[name].dtype)
            )
        pairs = zip(moments(other), moments(trainer), strict=True)
        assert all(torch.equal(one, two.to(one.dtype)) for one, two in pairs)


# -- plugins that replace modules --------------------------------------------------------------


class OwnConversion(HalfPrecision):
    def convert_module(self, module: nn.Module) -> nn.Module:
        module.head = nn.Linear(16, 3)
        return super().convert_module(module)


class OnlyAnotherContext(MixedPrecision):
    """Converts nothing."""


def test_plugins_that_may_replace_modules_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraCallback(r=2), plugins=OwnConversion("bf16-true"))
    with pytest.raises(ConfigError, match=r"OwnConversion has a convert_module of its own"):
        trainer.fit(Net(), Data())
    plugin = OnlyAnotherContext("bf16-mixed", "cpu")
    make_trainer(tmp_path, LoraCallback(r=2), plugins=plugin).fit(Net(), Data())


def test_transformer_engine_is_refused_with_the_reason(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import TransformerEnginePrecision

    trainer = make_trainer(tmp_path, LoraCallback(r=2))
    plugin = object.__new__(TransformerEnginePrecision)  # it is not installed
    trainer.strategy.precision_plugin = plugin
    with pytest.raises(ConfigError, match=r"replaces Linear and LayerNorm .*trainer.precision"):
        trainer.fit(Net(), Data())
