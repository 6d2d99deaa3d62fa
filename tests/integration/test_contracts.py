"""Contracts 1 to 6 of the design, each with a negative control that breaks it and must be noticed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lora_lightning.adapters.lora.linear
import lora_lightning.engine.injection
import lora_lightning.training.module_hooks
from lora_lightning import (
    LoraCallback,
    LoraConfig,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.errors import OptimizerError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.training.optimizers import check_coverage
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.tensors import assert_same_state, same_state

CONFIG = LoraConfig(r=2, target_modules=["embed", "body.2"], modules_to_save=["head"])


# -- 1: base untouched -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_1_base_is_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    module = Net().to(dtype)
    before = copy.deepcopy(module.state_dict())
    precision = "bf16-true" if dtype == torch.bfloat16 else "32-true"
    make_trainer(tmp_path, LoraCallback(CONFIG), precision=precision).fit(module, Data())
    for _ in range(10):
        merge_adapter(module)
        unmerge_adapter(module)
    with disable_adapter(module):
        pass
    assert_same_state(before, base_of(module))
    assert_same_state(before, unload(module).state_dict())


def base_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in module.state_dict().items() if ".adapters." not in k}


def test_1_own_state_dict_still_loads() -> None:
    module = Net()
    before = copy.deepcopy(module.state_dict())
    inject_adapter(module, CONFIG)
    result = module.load_state_dict(before, strict=False)
    assert not result.unexpected_keys
    assert len(result.missing_keys) == 6
    assert all(".adapters.default." in key for key in result.missing_keys)


def test_1_broken_subtracting_the_delta_drifts() -> None:
    """What the kept weight is for: W + d - d is not W in bf16."""
    module = Net().to(torch.bfloat16)
    before = copy.deepcopy(module.state_dict())
    inject_adapter(module, LoraConfig(r=2, target_modules=["embed"], init_lora_weights=False))
    layer: Any = module.embed
    with torch.no_grad():
        for _ in range(10):
            layer.weight += layer.adapters["default"].delta_weight()
            layer.weight -= layer.adapters["default"].delta_weight()
    assert not same_state(before, base_of(module))


# -- 2: no-op start --------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_2_output_is_bit_equal_at_the_start(init: Any) -> None:
    module, x = Net().eval(), torch.randn(5, 8)
    before = module(x)
    inject_adapter(module, LoraConfig(r=2, init_lora_weights=init))
    assert torch.equal(module(x), before)


def test_2_broken_random_b_is_noticed() -> None:
    module, x = Net().eval(), torch.randn(5, 8)
    before = module(x)
    inject_adapter(module, LoraConfig(r=2, init_lora_weights=False))
    assert not torch.equal(module(x), before)


# -- 3: frozen means frozen ------------------------------------------------------------------------


def frozen_tensors_that_moved(folder: Path) -> set[str]:
    module = Net()
    before = copy.deepcopy(module.state_dict())
    make_trainer(folder, LoraCallback(CONFIG)).fit(module, Data())
    after = module.state_dict()
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_3_nothing_frozen_moves(tmp_path: Path) -> None:
    assert frozen_tensors_that_moved(tmp_path) == set()


def test_3_only_adapters_require_gradients(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(CONFIG)).fit(module, Data())
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trainable == {
        "embed.adapters.default.lora_A",
        "embed.adapters.default.lora_B",
        "body.2.adapters.default.lora_A",
        "body.2.adapters.default.lora_B",
        "head.weight",
        "head.bias",
    }


def test_3_broken_norm_left_in_train_mode_moves(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lora_lightning.engine.injection, "freeze_norm_stats", lambda _: None)
    moved = frozen_tensors_that_moved(tmp_path)
    assert moved == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_3_context_managers_leave_no_trace() -> None:
    module = Net()
    inject_adapter(module, CONFIG)

    def state() -> dict[str, Any]:
        return {
            "grad": {n: p.requires_grad for n, p in module.named_parameters()},
            "training": {n: m.training for n, m in module.named_modules()},
            "active": {
                n: (list(m.active_adapters), m.adapters_enabled, list(m.merged_adapters))
                for n, m in module.named_modules()
                if isinstance(m, AdaptedLayer)
            },
        }

    before = state()
    with pytest.raises(KeyError), disable_adapter(module):
        raise KeyError  # also when the block fails
    assert state() == before


# -- 4: adapters in fp32, maths in the activation's dtype -------------------------------------------


def saved_dtypes(module: nn.Module, x: torch.Tensor) -> set[tuple[torch.dtype, int]]:
    """(dtype, elements) of everything that a forward pass keeps for backward."""
    saved: set[tuple[torch.dtype, int]] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return saved


def bf16_linear() -> nn.Module:
    module = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    inject_adapter(module, LoraConfig(r=2))
    return module


def test_4_master_weights_are_fp32_and_activations_stay_bf16() -> None:
    module = bf16_linear()
    adapter: Any = module[0].adapters["default"]  # type: ignore[index]
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == torch.float32
    x = torch.randn(128, 64, dtype=torch.bfloat16, requires_grad=True)
    assert module(x).dtype == torch.bfloat16
    large = {dtype for dtype, size in saved_dtypes(module, x) if size >= x.numel()}
    assert large == {torch.bfloat16}


def test_4_broken_casting_the_activation_is_noticed(monkeypatch: Any) -> None:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor, base: Any) -> torch.Tensor:
        hidden = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)
        return y + nn.functional.linear(hidden, self.lora_B).to(y.dtype)

    monkeypatch.setattr(lora_lightning.adapters.lora.linear.LoraAdapter, "forward", forward)
    monkeypatch.setattr(lora_lightning.layers.linear, "can_fuse", lambda *_: False)
    x = torch.randn(128, 64, dtype=torch.bfloat16, requires_grad=True)
    large = {dtype for dtype, size in saved_dtypes(bf16_linear(), x) if size >= x.numel()}
    assert torch.float32 in large


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "32-true"])
@pytest.mark.filterwarnings("ignore:You passed `Trainer")
def test_4_adapters_stay_fp32_in_training(tmp_path: Path, precision: str) -> None:
    module = Net()
    trainer = make_trainer(
        tmp_path, LoraCallback(r=2, target_modules=["embed"]), precision=precision
    )
    trainer.fit(module, Data())
    adapter: Any = module.embed.adapters["default"]  # type: ignore[union-attr,index]
    assert adapter.lora_A.dtype == torch.float32
    assert adapter.lora_B.abs().sum() > 0
    states = trainer.optimizers[0].state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}


# -- 5: the optimizer holds exactly the trainable tensors -------------------------------------------


def test_5_optimizer_holds_exactly_the_adapters(tmp_path: Path) -> None:
    module = Net()
    trainer = make_trainer(tmp_path, LoraCallback(CONFIG))
    trainer.fit(module, Data())
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    trainable = [id(p) for p in module.parameters() if p.requires_grad]
    assert sorted(held) == sorted(trainable)


def test_5_broken_without_the_override_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    overrides = dict(lora_lightning.training.module_hooks._OVERRIDES)
    del overrides["configure_optimizers"]
    monkeypatch.setattr(lora_lightning.training.module_hooks, "_OVERRIDES", overrides)
    with pytest.raises(OptimizerError, match="in an optimizer but not trainable"):
        make_trainer(tmp_path, LoraCallback(CONFIG)).fit(Net(), Data())


def test_5_every_way_to_be_wrong_is_named() -> None:
    module = Net()
    inject_adapter(module, CONFIG)
    trainable = [p for p in module.parameters() if p.requires_grad]
    with pytest.raises(OptimizerError, match=r"in no optimizer: embed.adapters.default.lora_A"):
        check_coverage([torch.optim.SGD(trainable[1:], lr=1)], module)
    twice = torch.optim.SGD(trainable, lr=1)
    twice.param_groups[0]["params"].append(trainable[0])
    with pytest.raises(
        OptimizerError, match=r"in more than one group: embed.adapters.default.lora_A"
    ):
        check_coverage([twice], module)
    other = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(OptimizerError, match="a tensor that is not the module's"):
        check_coverage([torch.optim.SGD([*trainable, other], lr=1)], module)
    check_coverage([torch.optim.SGD(trainable, lr=1)], module)


# -- 6: a checkpoint holds exactly what training changed ---------------------------------------------


def written(folder: Path) -> dict[str, dict[str, Any]]:
    """Every way that Lightning has to write a checkpoint."""
    trainer = make_trainer(
        folder,
        LoraCallback(CONFIG),
        ModelCheckpoint(folder, filename="full", save_last=True),
        ModelCheckpoint(folder, filename="weights", save_weights_only=True, every_n_train_steps=4),
    )
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(folder / "after.ckpt")
    trainer.save_checkpoint(folder / "after-weights.ckpt", weights_only=True)
    names = ["full", "last", "weights", "after", "after-weights"]
    return {name: torch.load(folder / f"{name}.ckpt", weights_only=True) for name in names}


def test_6_checkpoints_hold_adapters_only(tmp_path: Path) -> None:
    module = Net()
    before = set(module.state_dict())
    inject_adapter(module, CONFIG)
    adapters = set(module.state_dict()) - before
    for name, checkpoint in written(tmp_path).items():
        assert set(checkpoint["state_dict"]) == adapters, name
        assert ("optimizer_states" in checkpoint) == ("weights" not in name)
        assert checkpoint["lora_lightning"]["adapters"]["default"]["config"]["r"] == 2
        for state in checkpoint.get("optimizer_states", []):
            assert len(state["state"]) == len(adapters)


def test_6_broken_a_callback_hook_alone_writes_the_base(tmp_path: Path, monkeypatch: Any) -> None:
    """Callback.on_save_checkpoint is not called for weights-only files: the naive way leaks."""
    overrides = dict(lora_lightning.training.module_hooks._OVERRIDES)
    reduce = overrides.pop("on_save_checkpoint")

    def on_save_checkpoint(self: Any, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        reduce(pl_module, checkpoint)

    monkeypatch.setattr(lora_lightning.training.module_hooks, "_OVERRIDES", overrides)
    monkeypatch.setattr(LoraCallback, "on_save_checkpoint", on_save_checkpoint)
    checkpoints = written(tmp_path)
    assert "embed.weight" in checkpoints["weights"]["state_dict"]
    assert "embed.weight" not in checkpoints["full"]["state_dict"]


def test_6_buffers_that_training_moves_are_saved(tmp_path: Path) -> None:
    class Codebook(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.zeros(4))
            self.register_buffer("constant", torch.ones(4))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.codes += 1  # type: ignore[operator,misc]
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, LoraCallback(CONFIG))
    trainer.fit(Codebook(), Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert state["codes"].tolist() == [4.0] * 4
    assert "constant" not in state
    other = Codebook()
    make_trainer(tmp_path, LoraCallback(CONFIG)).validate(
        other, Data(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert other.codes.tolist() == [4.0] * 4  # type: ignore[operator,union-attr]
