"""Activation checkpointing, and adapters that are switched between forward and backward."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lightning import (
    LoraConfig,
    adapters_per_row,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    scale_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.errors import AdapterStateError
from tests.helpers.tensors import randomize

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.proj = nn.MultiheadAttention(6, 2) if kind == "attention" else nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attention":
            return x + self.proj(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return x + torch.tanh(self.proj(x))


class Checkpointed(nn.Module):
    """Two blocks, each computed again in backward; None: neither."""

    def __init__(self, kind: str, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(kind), Block(kind)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None or not torch.is_grad_enabled():
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def model(kind: str, reentrant: bool | None) -> Checkpointed:
    torch.manual_seed(0)
    net = Checkpointed(kind, reentrant).double()
    for name in "ab":
        inject_adapter(net, LoraConfig(r=2, target_modules=["proj"]), name)
    randomize([p for n, p in net.named_parameters() if ".lora_" in n], 0.5)
    return net


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def start() -> Tensor:
    return X.clone().requires_grad_()  # which the reentrant kind needs to compute gradients at all


SWITCHES: dict[str, Callable[[nn.Module], object]] = {
    "another": lambda net: set_adapter(net, "b"),
    "one more": lambda net: set_adapter(net, ["a", "b"]),
    "none": lambda net: set_adapter(net, []),
    "deleted": lambda net: delete_adapter(net, "a"),
    "merged": lambda net: merge_adapter(net),
    "scaled": lambda net: scale_adapter(net, "a", 3.0),
}
KINDS = pytest.mark.parametrize("kind", ["linear", "attention"])
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])


@REENTRANT
@KINDS
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_before_backward_is_refused(name: str, kind: str, reentrant: bool) -> None:
    net = model(kind, reentrant)
    loss = net(start()).square().sum()
    SWITCHES[name](net)
    with pytest.raises(AdapterStateError, match=r"switched between forward and backward.*\['a'\]"):
        loss.backward()


@REENTRANT
def test_rows_that_are_left_before_backward_are_refused(reentrant: bool) -> None:
    net = model("linear", reentrant)
    with adapters_per_row(net, ["a", "b", None, "a"]):
        loss = net(start()).square().sum()
        inside = net(start()).square().sum()
        inside.backward()
    with pytest.raises(AdapterStateError, match=r"had \['a', 'b', None, 'a'\] by row"):
        loss.backward()


@REENTRANT
def test_two_graphs_of_different_adapters(reentrant: bool) -> None:
    """Each backward is right under the adapters of its own forward, in whatever order."""
    net = model("linear", reentrant)
    first = net(start()).square().sum()
    set_adapter(net, "b")
    second = net(start()).square().sum()
    with pytest.raises(AdapterStateError, match=r"with \['b'\] where forward had \['a'\]"):
        first.backward()
    second.backward()
    set_adapter(net, "a")
    net.zero_grad()
    first = net(start()).square().sum()
    first.backward()
    plain = model("linear", None)
    plain(start()).square().sum().backward()
    assert_equal(gradients(net), gradients(plain))


@pytest.mark.slow
@REENTRANT
@KINDS
def test_a_reference_in_between_does_no_harm(kind: str, reentrant: bool) -> None:
    """As DPO does it: forward, the base's own forward, backward; over and over."""
    net, plain = model(kind, reentrant), model(kind, None)
    for _ in range(80):  # more than what is remembered
        for one in (net, plain):
            one.zero_grad()
            policy = one(start())
            with torch.no_grad(), disable_adapter(one):
                reference = one(start())
            (policy - reference).square().sum().backward()
    assert_equal(gradients(net), gradients(plain))
    assert len(gradients(net)) == (8 if kind == "attention" else 4)


def test_adapters_that_were_put_on_in_between() -> None:
    net = Checkpointed("linear", False).double()
    loss = net(start()).square().sum()
    inject_adapter(net, LoraConfig(r=2, target_modules=["proj"]))
    with pytest.raises(AdapterStateError, match=r"where forward had none"):
        loss.backward()


def test_without_checkpointing_a_switch_does_no_harm() -> None:
    net, plain = model("linear", None), model("linear", None)
    loss = net(start()).square().sum()
    set_adapter(net, ["a", "b"])
    loss.backward()
    plain(start()).square().sum().backward()
    assert_equal(gradients(net), gradients(plain))


def test_a_copy_goes_on() -> None:
    net = model("linear", False)
    merge_adapter(net)
    again = copy.deepcopy(net)
    unmerge_adapter(again)
    again(start()).square().sum().backward()
    plain = model("linear", None)
    plain(start()).square().sum().backward()
    assert_equal(gradients(again), gradients(plain))


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)


def in_thread(function: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@REENTRANT
def test_training_in_another_thread(reentrant: bool) -> None:
    """Ray's workers, a notebook's: autograd numbers operations for each thread."""
    for _ in range(50):
        start().square().sum().backward()
    net, plain = model("linear", reentrant), model("linear", None)
    plain(start()).square().sum().backward()
    in_thread(lambda: net(start()).square().sum().backward())
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(net)[name], gradient)

    def switch_between() -> None:
        loss = net(start()).square().sum()
        set_adapter(net, "b")
        loss.backward()

    with pytest.raises(AdapterStateError, match=r"with \['b'\] where forward had \['a'\]"):
        in_thread(switch_between)


@REENTRANT
def test_a_model_that_comes_from_another_process(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(50):
        start().square().sum().backward()
    net = pickle.loads(pickle.dumps(model("linear", reentrant)))
    monkeypatch.setattr("os.getpid", lambda: -5)
    in_thread(lambda: net(start()).square().sum().backward())


class Parts(nn.Module):
    """Its norm, and the layers of its head, are computed again, each by itself."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.proj, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        for part in (self.norm, *self.head):
            again = self.reentrant is not None and torch.is_grad_enabled()
            x = checkpoint(part, x, use_reentrant=self.reentrant) if again else part(x)
        return x


def parts(reentrant: bool | None, options: dict[str, object]) -> Parts:
    torch.manual_seed(0)
    net = Parts(reentrant).double()
    inject_adapter(net, LoraConfig(r=2, target_modules=["proj"], **options), "a")  # type: ignore[arg-type]
    randomize([p for p in net.parameters() if p.requires_grad], 0.5)
    return net


IN_PARTS = pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["head"]}])


@IN_PARTS
@REENTRANT
def test_parts_that_no_adapter_sits_on(reentrant: bool, options: dict[str, object]) -> None:
    net, plain = parts(reentrant, options), parts(None, options)
    for one in (net, plain):
        loss = one(start()).square().sum()
        with torch.no_grad(), disable_adapter(one):
            one(X)
        loss.backward()
    assert gradients(net).keys() == gradients(plain).keys()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(net)[name], gradient)
    loss = net(start()).square().sum()
    words = r"computed again with none where forward had \['a'\]"
    with disable_adapter(net), pytest.raises(AdapterStateError, match=words):
        loss.backward()
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        loss = one(start()).square().sum()
        with disable_adapter(one), pytest.raises(AdapterStateError, match=words):
            loss.backward()
    delete_adapter(net, "a")
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_bias_of_another_adapter_in_what_trains_in_full() -> None:
    """Taking the one off leaves the other's check where it was."""
    net = parts(False, {"bias": "all"})
    inject_adapter(net, LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"]), "b")
    inner = net.head[2]
    assert len(inner._forward_pre_hooks) == 2
    delete_adapter(net, "b")
    assert len(inner._forward_pre_hooks) == 1
    delete_adapter(net, "a")
    assert not inner._forward_pre_hooks
