"""Models that transformers or torchao have quantised, in an ordinary LightningModule, on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning.callback
from lora_lightning import LoraCallback, LoraConfig, inject_adapter, load_adapter
from lora_lightning.checkpoint.fingerprint import base_fingerprint
from lora_lightning.errors import AdapterMismatchError
from lora_lightning.layers.quantized.base import AdaptedQuantizedLinear
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.training.weight_averaging import _differ
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.quantized import assert_same_bits, loaded, parts
from tests.helpers.tensors import adapter_tensors

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
METHODS = ["nf4", "int8", "torchao"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2, vocab_size=50)
    folder = str(tmp_path_factory.mktemp("llama"))
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class LanguageModel(LightningModule):
    def __init__(self, folder: str, method: str) -> None:
        super().__init__()
        self.model = loaded(folder, method)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0], labels=batch[0]).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.model(batch[0], labels=batch[0]).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data() -> DataLoader:
    ids = torch.randint(0, 50, (12, 7), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(ids), batch_size=4, shuffle=True)


def fit(folder: Path, module: Any, epochs: int, ckpt_path: Any = None, **how: Any) -> Any:
    # Lightning's sampler for several processes goes by the seed, which has to be the same then.
    seed_everything(123 if ckpt_path is not None and "devices" not in how else 7, verbose=False)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    lora = LoraCallback(r=2, lora_dropout=0.2)
    trainer = make_trainer(folder, lora, saver, max_epochs=epochs, **how)
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


def all_parts(module: Any) -> dict[str, Tensor]:
    layers = [
        (path, layer)
        for path, layer in named_adapted_layers(module)
        if isinstance(layer, AdaptedQuantizedLinear)
    ]
    assert len(layers) == 7
    return {f"{path}.{name}": t for path, layer in layers for name, t in parts(layer).items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fit_checkpoint_and_resume(llama: str, method: str, precision: str, tmp_path: Path) -> None:
    module = LanguageModel(llama, method)
    before = base_fingerprint(module)
    trainer = fit(tmp_path / "straight", module, 2, precision=precision)
    assert base_fingerprint(module) == before
    bits = all_parts(module)
    found = adapter_tensors(module)
    assert len(found) == 14
    state = [v for s in trainer.optimizers[0].state_dict()["state"].values() for v in s.values()]
    assert {t.dtype for t in (*found.values(), *state)} == {torch.float32}
    assert all(t.any() for t in found.values())
    path = tmp_path / "straight/last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"].keys() == found.keys()

    fit(tmp_path / "broken", LanguageModel(llama, method), 1, precision=precision)
    again = LanguageModel(llama, method)
    fit(tmp_path / "broken", again, 2, "last", precision=precision)
    assert all(torch.equal(adapter_tensors(again)[name], t) for name, t in found.items())
    assert_same_bits(all_parts(again), bits)

    fresh = LanguageModel(llama, method)
    load_adapter(fresh, path)
    assert all(torch.equal(adapter_tensors(fresh)[name], t) for name, t in found.items())


def test_a_base_of_other_codes_is_refused(llama: str, tmp_path: Path) -> None:
    fit(tmp_path, LanguageModel(llama, "nf4"), 1)
    other = LanguageModel(llama, "nf4")
    other.model.model.layers[0].mlp.up_proj.weight.data[3] ^= 1  # one bit of the rounded weight
    with pytest.raises(AdapterMismatchError, match=r"another base.*\n.*up_proj.weight: other val"):
        fit(tmp_path, other, 2, "last")


@pytest.mark.parametrize("method", METHODS)
def test_weight_averaging_leaves_the_codes_alone(llama: str, method: str, tmp_path: Path) -> None:
    module = LanguageModel(llama, method)
    seed_everything(7, verbose=False)
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    before = base_fingerprint(module)
    make_trainer(tmp_path, LoraCallback(r=2), averaging, max_epochs=2).fit(module, data())
    assert base_fingerprint(module) == before
    assert all(t.any() for t in adapter_tensors(module).values())


def test_buffers_that_differ() -> None:
    """As torch.equal says it one by one, with the fewest waits for the device."""
    values = [[1.0, torch.nan], [1.0, 2.0], [[3.0]], [], 5, True, [1, 2]]
    pairs = [(torch.tensor(v), torch.tensor(v).clone()) for v in values]
    pairs += [(one, one + 1) for one, _ in pairs if one.dtype is not torch.bool]
    assert _differ(pairs) == [not torch.equal(*pair) for pair in pairs]
    assert _differ([]) == []


def test_negative_control_that_averages_everything(
    llama: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(lora_lightning.callback, "average_what_trains", lambda trainer: None)
    with pytest.raises(AssertionError, match="uint8"):
        test_weight_averaging_leaves_the_codes_alone(llama, "nf4", tmp_path)


def fit_on_this_rank(llama: str, folder: Path) -> list[dict[str, Tensor]]:
    """The adapters and the base's codes of a run, and of one in two parts."""
    how = {"strategy": "ddp", "devices": 2, "limit_val_batches": 0}
    runs = []
    for name, parts_of_run in (("straight", [(2, None)]), ("broken", [(1, None), (2, "last")])):
        for epochs, ckpt_path in parts_of_run:
            module = LanguageModel(llama, "nf4")
            fit(folder / name, module, epochs, ckpt_path, **how)
        runs.append({**adapter_tensors(module), **all_parts(module)})
    return runs


@pytest.mark.slow
def test_two_processes(llama: str, tmp_path: Path) -> None:
    first, second = on_processes(2, fit_on_this_rank, llama, tmp_path)
    for straight, broken in (first, second):
        assert_same_bits(straight, first[0])
        assert_same_bits(broken, first[0])
    alone = LanguageModel(llama, "nf4")
    codes = {name: t for name, t in first[0].items() if ".adapters." not in name}
    inject_adapter(alone, LoraConfig(r=2))
    assert_same_bits(all_parts(alone), codes)
