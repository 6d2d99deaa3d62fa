"""Forwards that other code exchanges on the instance, before and after adapters are added."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from torch import Tensor, nn

from lora_lightning import (
    AdapterStateError,
    LoraConfig,
    adapter_status,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    unload,
    unmerge_adapter,
)

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5))


def adapt(model: nn.Module, **options: Any) -> Tensor:
    """Adapt `model[0]`; what it now adds to the output of X."""
    inject_adapter(model, LoraConfig(r=2, lora_alpha=2, target_modules=["0"], **options))
    adapter = model[0].adapters["default"]
    nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(2))
    return X @ (adapter.lora_B @ adapter.lora_A).T


class Halving(ModelHook):
    """A hook that shows: it halves the input and adds 1 to the output."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (args[0] / 2, *args[1:]), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output + 1


def test_a_hook_of_accelerate_stays_outside_and_may_come_and_go() -> None:
    model = linear()
    plain = model(X)
    add_hook_to_module(model[0], Halving())
    hooked = model(X)
    delta = adapt(model)
    torch.testing.assert_close(model(X), hooked + delta / 2)
    add_hook_to_module(model[0], ModelHook())  # in the other one's place
    torch.testing.assert_close(model(X), plain + delta)
    add_hook_to_module(model[0], Halving(), append=True)
    torch.testing.assert_close(model(X), hooked + delta / 2)
    assert adapter_status(model).irregular == []
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(X), plain + delta)
    with disable_adapter(model):
        assert torch.equal(model(X), plain)
    unload(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize(
    "take_off", [unload, merge_and_unload, lambda m: delete_adapter(m, "default")]
)
def test_adapters_come_off_under_a_hook(
    hooked_first: bool, take_off: Callable[[nn.Module], Any]
) -> None:
    model = linear()
    plain = model(X)
    if hooked_first:
        add_hook_to_module(model[0], Halving())
        delta = adapt(model)
    else:
        delta = adapt(model)
        add_hook_to_module(model[0], Halving())
    weight = model[0].weight
    merged = take_off is merge_and_unload
    take_off(model)
    assert type(model[0]) is nn.Linear
    expected = F.linear(X / 2, weight, model[0].bias) + 1
    assert torch.equal(model(X), expected)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(X), plain + delta if merged else plain)
    assert "adapters" not in model[0]._modules


def test_a_hooked_layer_is_copied_with_its_adapters() -> None:
    model = linear()
    add_hook_to_module(model[0], AlignDevicesHook())
    adapt(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), model(X))
    nn.init.zeros_(other[0].adapters["default"].lora_B)
    remove_hook_from_module(other, recurse=True)
    assert not torch.equal(other(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(other))(X), other(X))


def compiled(module: nn.Module) -> Callable[..., Any]:
    return torch.compile(module.forward, backend="eager")


def tripled(module: nn.Module) -> Callable[..., Any]:
    before = module.forward

    @functools.wraps(before)
    def forward(x: Tensor) -> Tensor:
        return 3 * before(x)

    return forward


def by_partial(module: nn.Module) -> Callable[..., Any]:
    return functools.partial(lambda before, module, x: 3 * before(x), module.forward, module)


def of_its_class(module: nn.Module) -> Callable[..., Any]:
    return lambda x: 3 * type(module).forward(module, x)


CALLING = {"compiled": compiled, "closure": tripled, "partial": by_partial, "class": of_its_class}


@pytest.mark.parametrize("patch", CALLING.values(), ids=CALLING)
def test_a_later_patch_that_calls_the_layer_keeps_its_adapters(patch: Any) -> None:
    model = linear()
    plain, factor = model(X), 1 if patch is compiled else 3
    delta = adapt(model)
    model[0].forward = patch(model[0])
    torch.testing.assert_close(model(X), factor * (plain + delta))
    torch.testing.assert_close(model(X), factor * (plain + delta))
    assert adapter_status(model).irregular == []
    merge_adapter(model)
    torch.testing.assert_close(model(X), factor * (plain + delta))
    unmerge_adapter(model)
    with pytest.raises(AdapterStateError, match=r"The forward of '0' \(Linear\) was replaced"):
        unload(model)
    torch.testing.assert_close(model(X), factor * (plain + delta))
    del model[0].forward
    torch.testing.assert_close(model(X), plain + delta)
    unload(model)
    assert torch.equal(model(X), plain)


def own_maths(self: nn.Linear, x: Tensor) -> Tensor:
    return x @ self.weight.T + self.bias


def by_assignment(module: nn.Module) -> None:
    module.forward = types.MethodType(own_maths, module)  # type: ignore[method-assign]


def past_setattr(module: nn.Module) -> None:  # Liger's kernels do so
    module.__dict__["forward"] = own_maths.__get__(module)


def of_the_plain_class(module: nn.Module) -> None:
    module.forward = lambda x: nn.Linear.forward(module, x)  # type: ignore[method-assign]


PAST = {f.__name__: f for f in (by_assignment, past_setattr, of_the_plain_class)}


@pytest.mark.parametrize("patch", PAST.values(), ids=PAST)
@pytest.mark.parametrize("compiles", [False, True])
def test_a_later_patch_that_passes_the_adapters_by_is_refused(
    patch: Callable[[nn.Module], None], compiles: bool
) -> None:
    model = linear()
    plain = model(X)
    delta = adapt(model)
    run = torch.compile(model, backend="eager") if compiles else model
    torch.testing.assert_close(run(X), plain + delta)
    patch(model[0])
    with pytest.raises(AdapterStateError, match=r"'0' .*has not run since"):
        merge_adapter(model)
    if compiles and patch is past_setattr:  # nothing that torch.compile would notice
        run = model
    with pytest.raises(AdapterStateError, match="what stands there now does not run them"):
        run(X)
    [line] = adapter_status(model).irregular
    assert line.startswith("'0' (Linear): its forward was replaced")
    for refused in (merge_adapter, merge_and_unload, unload):
        with pytest.raises(AdapterStateError, match="replaced after its adapters were added"):
            refused(model)
    with disable_adapter(model):
        torch.testing.assert_close(model(X), plain)
    del model[0].forward
    torch.testing.assert_close(run(X), plain + delta)


@pytest.mark.parametrize("compiles", [False, True])
def test_an_earlier_patch_may_call_the_forward_of_its_class(compiles: bool) -> None:
    model = linear()
    layer = model[0]
    layer.forward = lambda x: 2 * type(layer).forward(layer, x) + 1
    plain = model(X)
    delta = adapt(model)
    run = torch.compile(model, backend="eager") if compiles else model
    torch.testing.assert_close(run(X), plain + delta)
    torch.testing.assert_close(run(X), plain + delta)
    with disable_adapter(model):
        assert torch.equal(model(X), plain)
    unload(model)
    assert torch.equal(model(X), plain)


def test_the_class_s_own_forward_put_back_takes_off_the_patch_only() -> None:
    model = linear()
    plain, original = model(X), model[0].forward
    model[0].forward = tripled(model[0])
    delta = adapt(model)
    torch.testing.assert_close(model(X), 3 * plain + delta)  # around what was patched before
    model[0].forward = original
    torch.testing.assert_close(model(X), plain + delta)
    merge_adapter(model)
    torch.testing.assert_close(model(X), plain + delta)
    unload(model)
    assert torch.equal(model(X), plain)


def test_a_patched_layer_is_saved_as_it_is(tmp_path: Any) -> None:
    model = linear()
    plain = model(X)
    delta = adapt(model)
    model[0].forward = tripled(model[0])
    save_adapter(model, tmp_path)
    other = linear()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(X), plain + delta)


def test_a_forward_exchanged_on_nn_linear_itself_is_the_base_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = linear()
    plain = model(X)
    delta = adapt(model)
    before = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 3 * before(self, x))
    torch.testing.assert_close(model(X), 3 * plain + delta)
