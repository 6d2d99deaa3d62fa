"""Bases whose weights accelerate keeps elsewhere between forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    AdapterStateError,
    IA3Config,
    LoraConfig,
    TargetError,
    VeraConfig,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.checkpoint.fingerprint import base_fingerprint

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))


def fill(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    y.square().sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


TYPES: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=2, target_modules=["0", "2"]),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=["0", "2"]),
    "pissa": lambda: LoraConfig(r=2, init_lora_weights="pissa", target_modules=["0", "2"]),
    "ia3": lambda: IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "vera": lambda: VeraConfig(r=2, target_modules=["0", "2"]),
}


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["offload", "adapter"])
@pytest.mark.parametrize("config", TYPES.values(), ids=TYPES)
def test_an_offloaded_base_computes_and_trains_as_any_other(
    place: str, first: str, config: Callable[[], Any], tmp_path: Path
) -> None:
    reference = network()
    inject_adapter(reference, config())
    fill(reference)
    expected = reference(X)

    def offload() -> None:
        if place == "cpu":
            cpu_offload(model, execution_device=CPU)
        else:
            disk_offload(model, str(tmp_path / "weights"), execution_device=CPU)

    model = network()
    if first == "offload":
        offload()
    inject_adapter(model, config())
    fill(model)
    if first == "adapter":
        offload()
    assert model[0].weight.is_meta
    y = model(X)
    assert torch.equal(y, expected)
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    found, wanted = gradients(model, y), gradients(reference, expected)
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))

    with pytest.raises(AdapterStateError, match="'0' is offloaded"):
        merge_adapter(model)
    remove_hook_from_module(model, recurse=True)
    merge_adapter(model)
    torch.testing.assert_close(model(X), expected)
    unload(model)
    assert torch.equal(model(X), network()(X))


@pytest.mark.parametrize("place", ["cpu", "disk", "half"])
@pytest.mark.parametrize("config", TYPES.values(), ids=TYPES)
def test_offloaded_after_its_adapters_it_trains_as_any_other(
    place: str, config: Callable[[], Any], tmp_path: Path
) -> None:
    def trained(model: nn.Module) -> Tensor:
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        return model(X)

    models = [network() for _ in range(2)]
    for model in models:
        inject_adapter(model, config())
        fill(model)
    if place == "cpu":
        cpu_offload(models[1], execution_device=CPU)
    elif place == "disk":
        disk_offload(models[1], str(tmp_path / "weights"), execution_device=CPU)
    else:
        parts = {"0": "cpu", "1": "cpu", "2": "disk"}
        folder = str(tmp_path / "weights")
        dispatch_model(models[1], parts, CPU, offload_dir=folder, force_hooks=True)
    one, other = map(trained, models)
    assert torch.equal(one, other)
    remove_hook_from_module(models[1], recurse=True)
    assert torch.equal(models[1](X), one)


def test_an_adapter_is_saved_from_and_loaded_onto_an_offloaded_base(tmp_path: Path) -> None:
    model = network()
    inject_adapter(model, TYPES["dora"]())
    fill(model)
    expected = model(X)
    cpu_offload(model, execution_device=CPU)
    save_adapter(model, tmp_path)
    other = network()
    cpu_offload(other, execution_device=CPU)
    load_adapter(other, tmp_path)
    assert torch.equal(other(X), expected)


def test_the_fingerprint_is_that_of_the_values_wherever_they_are() -> None:
    model = network()
    before = base_fingerprint(model)
    cpu_offload(model, execution_device=CPU)
    assert base_fingerprint(model) == before
    assert model[0].weight.is_meta


def test_what_was_merged_before_offloading_is_not_lost() -> None:
    model = network()
    inject_adapter(model, TYPES["lora"]())
    fill(model)
    expected = model(X)
    merge_adapter(model)
    cpu_offload(model, execution_device=CPU)
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(AdapterStateError, match=r"offloaded .* after adapters had been merged"):
        unmerge_adapter(model)
    remove_hook_from_module(model, recurse=True)
    unmerge_adapter(model)
    unload(model)
    assert torch.equal(model(X), network()(X))


@pytest.mark.parametrize(
    ("option", "value"), [("modules_to_save", ["2"]), ("bias", "all")], ids=["copy", "bias"]
)
def test_what_would_train_in_place_of_offloaded_weights_is_refused(option: str, value: Any) -> None:
    model = network()
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(TargetError, match=rf"offloaded .*\(lora.{option}\)"):
        inject_adapter(model, LoraConfig(r=2, target_modules=["0"], **{option: value}))
    assert torch.equal(model(X), network()(X))


def test_a_block_that_is_offloaded_as_a_whole_is_refused() -> None:
    model = nn.Sequential(network())
    cpu_offload(model, execution_device=CPU, preload_module_classes=["Sequential"])
    with pytest.raises(TargetError, match="together with all that is inside"):
        inject_adapter(model, LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(model(X), network()(X))


def test_rows_of_an_offloaded_embedding_start_as_its_own() -> None:
    table = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    ids = torch.tensor([0, 3, 4])
    expected = table(ids)
    cpu_offload(table, execution_device=CPU)
    config = LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [3]})
    inject_adapter(table, config)
    assert torch.equal(table(ids), expected)


class EveryKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.transposed = Conv1D(8, 8)
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = self.attention(h, h, h)[0]
        y: Tensor = self.conv(self.transposed(h).mT)
        return y


@pytest.mark.parametrize("how", ["offloaded", "hooked"])
@pytest.mark.parametrize("first", ["hooks", "adapter"])
def test_other_kinds_of_layers_under_hooks(how: str, first: str) -> None:
    names = ["table", "attention", "transposed", "conv"]
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    ids = torch.tensor([[1, 2, 3, 4]])
    reference, model = EveryKind(), EveryKind()
    base = model(ids)
    inject_adapter(reference, config, seed=1)
    for step in ("hooks", "adapter") if first == "hooks" else ("adapter", "hooks"):
        if step == "adapter":
            inject_adapter(model, config, seed=1)
        elif how == "offloaded":
            cpu_offload(model, execution_device=CPU)
        else:
            dispatch_model(model, dict.fromkeys(names, "cpu"), force_hooks=True)
    expected = reference(ids)
    assert not torch.allclose(expected, base)
    assert torch.equal(model(ids), expected)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(ids), expected)
    unload(model)
    assert torch.equal(model(ids), base)


def test_device_map_of_transformers_with_a_part_on_disk(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "weights")
    )
    model.eval()
    ids = torch.tensor([[1, 7, 3]])
    reference = copy.deepcopy(base)
    for each in (reference, model):
        inject_adapter(each, LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "o_proj"]))
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    for each in (reference, model):
        fill(each)
    torch.testing.assert_close(model(ids).logits, reference(ids).logits)
    assert not torch.allclose(model(ids).logits, base(ids).logits)
