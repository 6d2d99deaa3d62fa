"""Small nets adapted by peft and by us, with the same adapter values, and what is compared."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lora_lightning import (
    LoraConfig,
    disable_adapter,
    inject_adapter,
    load_adapter_state_dict,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.adapters.config import AdapterConfig
from tests.helpers.tensors import bit_equal, randomize, trainable


class Chain(nn.Module):
    """Modules in a row, by name, with something between them that gradients pass through."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = torch.tanh(module(x))
        return x


def pair(
    base: nn.Module, ours: AdapterConfig, theirs: peft.PeftConfig, std: float | None = 0.3
) -> tuple[peft.PeftModel, nn.Module]:
    """(peft's, ours) on copies of `base`; `std=None` leaves the start values alone."""
    mine = copy.deepcopy(base)
    inject_adapter(mine, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), theirs)
    if std is not None:
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(torch.randn_like(parameter) * std)
        load_adapter_state_dict(mine, peft_state(model))
    return model, mine


def peft_state(model: peft.PeftModel) -> dict[str, Tensor]:
    """The tensors of peft's file under our names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {short(key): value for key, value in state.items()}


def short(key: str) -> str:
    """A tensor's name without what peft or we put into it: `proj.oft_R`."""
    for noise in ("base_model.model.", "base_model.", ".base_layer", ".default", ".adapters"):
        key = key.replace(noise, "")
    if key in ("vera_A", "vera_B"):  # at the first adapter, which is on `first` in these nets
        return f"first.projections.{key}"
    return key.removesuffix(".weight").replace("embedding_R", "R") if ".oft_" in key else key


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {short(name): p.grad for name, p in trainable(model).items()}


def assert_same_as_peft(base: nn.Module, ours, theirs, x: Tensor) -> None:
    """Output, gradients, merged weights and biases; disabled and unmerged, the base bit for bit."""
    before = base(x)
    theirs_model, model = pair(base, ours, theirs)
    assert (model(x) - before).abs().max() > 1e-3  # the adapter does something
    close(model(x), theirs_model(x))
    expected, found = gradients(theirs_model, x), gradients(model, x)
    assert expected.keys() == found.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for key, gradient in expected.items():
        close(found[key], gradient)
    if getattr(ours, "bias", "none") == "none":
        assert_merges(base, model.eval(), theirs_model.eval(), x)


def assert_merges(base: nn.Module, model: nn.Module, theirs: nn.Module | None, x: Tensor) -> None:
    """Merged = unmerged (and = peft's merged weights); base bit-identical before and after."""
    before, unmerged = base(x), model(x)
    with disable_adapter(model):
        assert bit_equal(model(x), before)
    merge_adapter(model)
    close(model(x), unmerged)
    if theirs is not None:
        merged = dict(theirs.merge_and_unload().named_parameters())
        for name in base.state_dict():
            close(model.state_dict()[name], merged[name].detach())
    for _ in range(3):
        unmerge_adapter(model)
        merge_adapter(model)
    unmerge_adapter(model)
    assert bit_equal(model(x), unmerged)
    for name, tensor in base.state_dict().items():
        assert bit_equal(model.state_dict()[name], tensor)


def assert_mixes_with_lora(
    base: nn.Module,
    config: AdapterConfig,
    dense: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    std: float = 0.3,
) -> None:
    """On `base.proj`, before and after LoRA: the explicit fold, unmerged and merged.

    `dense(adapter, weight, bias)` gives weight and bias after the adapter.
    """
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["proj"])
    for order in (["lora", "other"], ["other", "lora"]):
        model = copy.deepcopy(base)
        for name in order:
            inject_adapter(model, lora if name == "lora" else config, name)
        set_adapter(model, order)
        randomize(trainable(model).values(), std)
        expected = copy.deepcopy(base)
        weight, bias = expected.proj.weight.detach(), expected.proj.bias.detach()
        for name in order:
            adapter = model.proj.adapters[name]
            if name == "lora":
                a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
                weight = weight + 1.5 * (b.flatten(1) @ a.flatten(1)).view_as(weight)
            else:
                weight, bias = dense(adapter, weight, bias)
        with torch.no_grad():
            expected.proj.weight.copy_(weight)
            expected.proj.bias.copy_(bias)
        close(model(x), expected(x))
        merge_adapter(model, order[0])  # and the other acts on top of it
        close(model(x), expected(x))
        merge_adapter(model)
        close(model.proj.weight, expected.proj.weight)
        close(model.proj.bias, expected.proj.bias)
        unmerge_adapter(model)
        assert bit_equal(model.proj.weight, base.proj.weight)
        assert bit_equal(model.proj.bias, base.proj.bias)


def assert_compiles(base: nn.Module, config: AdapterConfig, x: Tensor) -> None:
    """One graph, the same numbers, and no second one when adapters are switched; gradients too."""
    # In float64, dynamo takes a 0-dim tensor for a Python number and calls its backend twice.
    model, x = copy.deepcopy(base).float(), x.float()
    inject_adapter(model, config, "a")
    inject_adapter(model, config, "b")
    set_adapter(model, ["a", "b"])
    randomize(trainable(model).values(), 0.2)
    expected = gradients(model, x)
    torch._dynamo.reset()
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        close(found[name], gradient)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for names in (["a", "b"], ["b"], ["a"], []):
        set_adapter(model, names)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        close(compiled(x), model(x))
    assert counter.frame_count == 1
