"""The meta device: a forward that says shapes and dtypes; adapters made without memory, filled later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import (
    LoraConfig,
    LoraError,
    active_adapters,
    adapter_state_dict,
    adapters_per_row,
    disable_adapter,
    inject_adapter,
    load_adapter_state_dict,
    merge_adapter,
    save_adapter,
    set_adapter,
)
from lora_lightning.adapters.registry import config_types
from lora_lightning.engine.injection import adapters_named
from lora_lightning.errors import AdapterMismatchError, AdapterStateError
from tests.helpers.adapter_types import TYPES, adapted_by_us, cells, example, net
from tests.helpers.tensors import bit_equal, randomize, trainable
from tests.helpers.torch_models import VOCAB, Transformer, token_ids
from tests.helpers.unchanged import unchanged_check

CELLS = [cell for letter in "pfgdo" for cell in cells(letter)]


@pytest.mark.parametrize(("name", "kind"), CELLS)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_forward_on_meta(name: str, kind: str, autocast: bool) -> None:
    assert name in TYPES
    model = adapted_by_us(net(kind, torch.float32), name).train()
    x = example(kind, torch.float32)
    y = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):  # which meta ignores
        z = model.to("meta")(x.to("meta"))
    assert (z.shape, z.dtype, z.is_meta) == (y.shape, y.dtype, True)
    z.sum().backward()


class EveryKind(nn.Module):
    """A table, a convolution, a Linear, a norm with statistics and a head with a fixed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.proj = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)
        self.head.register_buffer("seen", torch.full((2,), 7.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).mT).mT
        return self.head(self.norm(self.proj(x).flatten(0, 1)))


EMPTY: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "target_modules": ["embed", "conv", "proj"]},
    "dora": {"r": 2, "target_modules": ["embed", "conv", "proj"], "use_dora": True},
    "lora_bias": {"r": 2, "target_modules": ["conv", "proj"], "lora_bias": True},
    "pissa": {"r": 2, "target_modules": ["proj"], "init_lora_weights": "pissa"},
    "copies": {"r": 2, "target_modules": ["proj"], "modules_to_save": ["head", "norm"]},
    "tokens": {"target_modules": [], "trainable_token_indices": {"embed": [5, 2]}},
    "biases": {"r": 2, "target_modules": ["proj"], "bias": "all"},
    "ADALORA": {"init_r": 2, "target_r": 1},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "OFT": {"oft_block_size": 4},
    "SHIRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "VERA": {"r": 2},
}


def empty_config(name: str) -> Any:
    options = {"target_modules": ["proj"], **EMPTY[name]}
    return config_types()[name if name.isupper() else "LORA"](**options)


def tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        f"{path}.{n}": t
        for path, adapter in adapters_named(model, name).items()
        for n, t in (*adapter.named_parameters(), *adapter.named_buffers())
    }


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", EMPTY)
def test_made_without_memory_then_filled(name: str, second: bool) -> None:
    torch.manual_seed(0)
    base, ids = EveryKind().eval(), token_ids()
    source, model = copy.deepcopy(base), copy.deepcopy(base)
    if second:
        for carrier in (source, model):
            inject_adapter(carrier, LoraConfig(r=1, target_modules=["proj"]), "before")
    inject_adapter(source, empty_config(name))
    set_adapter(source, "default")
    randomize([p for p in trainable(source).values() if p.is_floating_point()], 0.3)
    state = {key: tensor.clone() for key, tensor in adapter_state_dict(source).items()}

    random = torch.get_rng_state()
    inject_adapter(model, empty_config(name), low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), random)
    empty = tensors_of(model, "default")
    with_values = [key for key, tensor in empty.items() if not tensor.is_meta]
    assert with_values == [key for key in empty if key.endswith("seen")]  # is in no file
    assert active_adapters(model) == (["before"] if second else ["default"])
    set_adapter(model, "default")
    before = unchanged_check(model)
    with pytest.raises(AdapterStateError, match="no values yet"):
        model(ids)
    with pytest.raises(LoraError, match="no values"):
        merge_adapter(model)
    with pytest.raises(AdapterStateError, match="has no values to save"):
        save_adapter(model, "nowhere")
    if name != "biases":  # which rows refuse in any case
        with (
            pytest.raises(AdapterStateError, match="no values yet"),
            adapters_per_row(model, ["default", None]),
        ):
            model(ids)
    before()
    # torch.matmul takes another kernel for a weight that requires gradients, even under no_grad,
    # where the input is not contiguous: on some machines with another last bit.
    base.requires_grad_(False)
    with disable_adapter(model):
        assert bit_equal(model(ids), base(ids))

    load_adapter_state_dict(model, state)
    filled = tensors_of(model, "default")
    assert filled.keys() == tensors_of(source, "default").keys()
    for key, tensor in tensors_of(source, "default").items():
        assert bit_equal(filled[key], tensor), key
        assert filled[key].requires_grad == tensor.requires_grad, key
    assert bit_equal(model(ids), source(ids))


@pytest.mark.parametrize("name", EMPTY)
def test_a_state_that_does_not_fit_leaves_it_empty(name: str) -> None:
    torch.manual_seed(0)
    source, model = EveryKind(), EveryKind()
    inject_adapter(source, empty_config(name))
    inject_adapter(model, empty_config(name), low_cpu_mem_usage=True)
    state = adapter_state_dict(source)
    before = unchanged_check(model)
    for key in list(state)[:1] + list(state)[-1:]:
        with pytest.raises(AdapterMismatchError, match="missing"):
            load_adapter_state_dict(model, {k: t for k, t in state.items() if k != key})
        before()


def test_a_base_without_values_comes_first() -> None:
    with torch.device("meta"):
        model = Transformer()
    inject_adapter(model, LoraConfig(r=2), low_cpu_mem_usage=True)
    with pytest.raises(AdapterMismatchError, match="load the base model before"):
        load_adapter_state_dict(
            model, {k: torch.zeros(t.shape) for k, t in adapter_state_dict(model).items()}
        )
