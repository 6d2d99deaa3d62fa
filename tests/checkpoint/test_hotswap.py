"""hotswap_adapter: another file's values in place, without compiling again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import lora_lightning
from lora_lightning import (
    LoraConfig,
    LoraError,
    disable_adapter,
    hotswap_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    scale_adapter,
)
from lora_lightning.errors import AdapterMismatchError, AdapterStateError
from tests.helpers.adapted_models import CLOSE, LAYER_KINDS, LayerAndHead, add_adapter
from tests.helpers.tensors import bit_equal
from tests.helpers.torch_models import Transformer, token_ids
from tests.helpers.unchanged import unchanged_check


def folder(path: Path, base: nn.Module, seed: int, **options: Any) -> Path:
    """A PEFT folder of an adapter for `base`."""
    model = add_adapter(copy.deepcopy(base), "default", seed, **options)
    save_adapter(model, path)
    return path


SWAPS = {
    "same": {"target_modules": ["q", "k"], "r": 4},
    "smaller rank": {"target_modules": ["q", "k"], "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": ["q", "k"], "r": 2, "use_rslora": True},
    "fewer modules": {"target_modules": ["k"], "r": 1},
    "patterns": {
        "target_modules": ["q", "k"],
        "rank_pattern": {"layers.1.attn.q": 1},
        "alpha_pattern": {"k": 2.5},
    },
    "regular expression": {"target_modules": r"layers\.1\.attn\.q"},
}


@pytest.mark.slow
def test_swaps_under_torch_compile(tmp_path: Path) -> None:
    torch._dynamo.reset()
    base = Transformer().double()
    slot = {"target_modules": ["q", "k"], "r": 4, "lora_alpha": 7}
    model = add_adapter(copy.deepcopy(base), "slot", **slot)
    ids = token_ids()
    backend = CompileCounter()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    first = compiled(ids)
    tensors = {name: id(p) for name, p in model.named_parameters()}
    for seed, (name, options) in enumerate(SWAPS.items()):
        path = folder(tmp_path / name, base, seed, **options)
        hotswap_adapter(model, path, "slot")
        expected = copy.deepcopy(base)
        load_adapter(expected, path)
        torch.testing.assert_close(compiled(ids), expected(ids), **CLOSE)
        torch.testing.assert_close(model(ids), expected(ids), **CLOSE)
        assert not torch.allclose(compiled(ids), first)
        # what is on the model can be saved, and says the same
        save_adapter(model, tmp_path / "again", "slot")
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path / "again")
        torch.testing.assert_close(again(ids), expected(ids), **CLOSE)
    assert backend.frame_count == 1
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["conv2d", "grouped", "embedding", "conv1D"])
def test_swaps_on_every_kind(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LayerAndHead(kind).double()
    path = folder(tmp_path, base, 1, target_modules=["proj"], r=2, lora_alpha=3)
    model = add_adapter(copy.deepcopy(base), "default", target_modules=["proj"], r=4)
    hotswap_adapter(model, path)
    expected = copy.deepcopy(base)
    load_adapter(expected, path)
    x = LAYER_KINDS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    torch.testing.assert_close(model(x), expected(x), **CLOSE)


def test_swaps_whatever_has_no_rank_as_a_whole(tmp_path: Path) -> None:
    base = Transformer().double()
    options: dict[str, Any] = {
        "target_modules": ["q"], "modules_to_save": ["head"], "bias": "lora_only",
        "trainable_token_indices": {"embed": [3, 1]},
    }  # fmt: skip
    path = folder(tmp_path, base, 1, **options)
    model = add_adapter(copy.deepcopy(base), "default", **options)
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.q.bias.add_(1)
    hotswap_adapter(model, path)
    expected = copy.deepcopy(base)
    load_adapter(expected, path)
    torch.testing.assert_close(model(token_ids()), expected(token_ids()), **CLOSE)
    with disable_adapter(model):
        assert bit_equal(model(token_ids()), base(token_ids()))


DOES_NOT_FIT = {
    "larger rank": ({"r": 5}, {}, "q.lora_A.weight is .5, 8., here .4, 8."),
    "other modules": ({"target_modules": ["v"]}, {}, "no place here"),
    "a head": ({"modules_to_save": ["head"]}, {}, "no place here.*head"),
    "no head": ({}, {"modules_to_save": ["head"]}, "that it lacks.*head"),
    "no bias": ({}, {"bias": "lora_only"}, "that it lacks.*bias"),
    "biases": ({"bias": "lora_only"}, {}, "no place here.*bias"),
    "dora": ({"use_dora": True}, {}, "no place here.*magnitude"),
    "no dora": ({}, {"use_dora": True}, "that it lacks.*magnitude"),
    "other dora": ({"use_dora": True, "r": 4}, {"use_dora": True, "lora_alpha": 2}, "lora_alpha"),
    "no tokens": ({}, {"trainable_token_indices": {"embed": [1]}}, "that it lacks.*tokens"),
    "other tokens": (
        {"trainable_token_indices": {"embed": [1, 2]}},
        {"trainable_token_indices": {"embed": [2, 1]}},
        r"of the tokens \[1, 2\], here \[2, 1\]",
    ),
    "from the base": ({}, {"init_lora_weights": "pissa"}, "starts from the base"),
}


@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_a_swap_that_does_not_fit_changes_nothing(case: str, tmp_path: Path) -> None:
    theirs, ours, words = DOES_NOT_FIT[case]
    base = Transformer()
    path = folder(tmp_path, base, 1, **{"target_modules": ["q"], **theirs})
    model = add_adapter(copy.deepcopy(base), "default", **{"target_modules": ["q"], "r": 4, **ours})
    before = unchanged_check(model)
    with pytest.raises(AdapterMismatchError, match=words) as caught:
        hotswap_adapter(model, path)
    assert "nothing was changed" in str(caught.value)
    before()


def test_what_a_swap_refuses(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    path = folder(tmp_path / "good", base, 1)
    model = add_adapter(copy.deepcopy(base), "default")
    before = unchanged_check(model)
    tensors = load_file(path / "adapter_model.safetensors")
    key = "base_model.model.0.lora_A.weight"
    for change, words in (
        ({key: tensors[key] * float("nan")}, "not finite"),
        ({key: tensors[key].long()}, "torch.int64"),
        ({key: tensors[key].t().contiguous()}, r"is \[4, 2\], here \[2, 4\]"),
        ({key: None}, "that it lacks"),
    ):
        changed = {k: t for k, t in {**tensors, **change}.items() if t is not None}
        save_file(changed, path / "adapter_model.safetensors")
        with pytest.raises(AdapterMismatchError, match=words):
            hotswap_adapter(model, path)
        before()
    with pytest.raises(LoraError, match="no folder or file"):
        hotswap_adapter(model, tmp_path / "none")
    with pytest.raises(AdapterStateError, match="no adapter 'other' to fill"):
        hotswap_adapter(model, path, "other")
    inject_adapter(model, LoraConfig(r=2), "empty", low_cpu_mem_usage=True)
    with pytest.raises(AdapterStateError, match="has no memory yet"):
        hotswap_adapter(model, path, "empty")
    merge_adapter(model)
    with pytest.raises(AdapterStateError, match="is merged into the base"):
        hotswap_adapter(model, path)
    loha = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapter(loha, lora_lightning.LohaConfig(r=2))
    save_file(tensors, path / "adapter_model.safetensors")
    before = unchanged_check(loha)
    with pytest.raises(AdapterMismatchError, match="of type LORA, this one of type LOHA"):
        hotswap_adapter(loha, path)
    before()


def test_a_swap_ends_what_scale_adapter_did(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4)).double()
    path = folder(tmp_path, base, 1)
    model = add_adapter(copy.deepcopy(base), "default")
    scale_adapter(model, "default", 3)
    hotswap_adapter(model, path)
    expected = copy.deepcopy(base)
    load_adapter(expected, path)
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x), **CLOSE)
    scale_adapter(model, "default", 1)
    torch.testing.assert_close(model(x), expected(x), **CLOSE)
