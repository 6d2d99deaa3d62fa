"""`modules_to_save` trains a module in its own place: compared with plain torch, in float64."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning import (
    LoraConfig,
    adapter_state_dict,
    adapters_per_row,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    load_adapter_state_dict,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unload,
)
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers.base import AdaptedLayer
from tests.helpers.tensors import bit_equal, randomize

X = torch.linspace(-2, 2, 30, dtype=torch.float64).reshape(5, 6)


# -- heads that are used in other ways than by their forward -----------------------------------------


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(h)

    def sample(self, h: Tensor) -> Tensor:
        return torch.sin(self.out(h))


class Prototypes(Decoder):
    @torch.no_grad()
    def normalize(self) -> None:
        self.out.weight.copy_(F.normalize(self.out.weight, dim=1))


class Centred(Decoder):
    """Its buffer is a new tensor after every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, h: Tensor) -> Tensor:
        y = self.out(h)
        result = y - self.centre
        self.centre = 0.9 * self.centre + 0.1 * y.detach().mean(0)
        return result


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, h: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(h)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 4, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.rnn(h[None])[0][0]


def with_hook() -> nn.Module:
    head = nn.Linear(6, 3)
    head.register_forward_hook(lambda module, args, y: y * module.weight.norm())
    return head


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def called(head: nn.Module, h: Tensor) -> Tensor:
    return head(h)


def normalized(head: Any, h: Tensor) -> Tensor:
    head.normalize()
    return head(h)


HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "forward": (Decoder, called),
    "method": (Decoder, lambda head, h: head.sample(h)),
    "child": (Decoder, lambda head, h: head.out(h)),
    "read": (lambda: nn.Linear(6, 3), lambda head, h: F.linear(h, head.weight.abs(), head.bias)),
    "written by a method": (Prototypes, normalized),
    "new buffer": (Centred, called),
    "tied inside": (Tied, called),
    "LSTM": (Recurrent, called),
    "hook": (with_hook, called),
    "batch norm": (normed, called),
    "sliced": (normed, lambda head, h: head[:2](h)),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), called),
    "weight_norm of old": (lambda: nn.utils.weight_norm(nn.Linear(6, 3)), called),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), called),
    "max_norm": (
        lambda: nn.Embedding(9, 3, max_norm=0.5),
        lambda head, h: head((h[:, 0].abs() * 3).long()),
    ),
}
KINDS = pytest.mark.parametrize("kind", HEADS)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 6)
        make, self.use = HEADS[kind]
        self.head = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.head, torch.tanh(self.body(x)))


@pytest.fixture(autouse=True)
def _old_weight_norm_is_deprecated() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm.*is deprecated", FutureWarning)
        yield


def with_head(kind: str, name: str = "default") -> Model:
    model = Model(kind).double()
    inject_adapter(model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]), name)
    return model


def train(model: nn.Module, steps: int = 5) -> None:
    """Plain SGD on whatever of the head trains; B of the adapter is 0, and stays so without A."""
    weights = [p for p in model.get_submodule("head").parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def tensors(head: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the modules of a head, under the names they have there."""
    own = (*head.named_parameters(), *head.named_buffers())
    return {n: t for n, t in own if "adapters." not in n and "original_tensors." not in n}


@KINDS
def test_it_trains_as_in_plain_torch(kind: str) -> None:
    plain, model = Model(kind).double(), with_head(kind)
    plain.body.requires_grad_(False)
    base = copy.deepcopy(plain.state_dict())
    train(plain.train())
    train(model.train())
    found, wanted = tensors(model.head), tensors(plain.head)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    trained = {n for n, p in plain.head.named_parameters()}
    assert any(not torch.equal(found[n], base[f"head.{n}"]) for n in trained)
    torch.testing.assert_close(model.eval()(X), plain.eval()(X), rtol=1e-12, atol=1e-12)
    # the base is what it was, under its own names
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.items())


@KINDS
def test_the_base_comes_back(kind: str) -> None:
    plain, model = Model(kind).double().eval(), with_head(kind)
    own_type = model.head.base_type
    objects = {n: id(t) for n, t in tensors(model.head.original_tensors).items()}
    before = copy.deepcopy(plain.state_dict())
    train(model.train())
    model.eval()
    with disable_adapter(model):
        assert all(id(t) == objects[n] for n, t in tensors(model.head).items())
        found = model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in before.items())
        expected = plain(X)
        torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    unload(model)
    assert type(model.head) is own_type
    assert {n: id(t) for n, t in tensors(model.head).items()} == objects or kind in (
        "new buffer",  # which is another one after every forward, of the base too
    )
    assert list(model.state_dict()) == list(before)
    assert not any("_original_tensors" in module.__dict__ for module in model.modules())
    assert not any(module._load_state_dict_post_hooks for module in model.modules())


@KINDS
def test_merged_for_good(kind: str) -> None:
    model = with_head(kind)
    train(model.train())
    merged = model.eval() if kind == "weight_norm of old" else copy.deepcopy(model).eval()
    expected = model.eval()(X)
    merge_and_unload(merged)
    torch.testing.assert_close(merged(X), expected, rtol=1e-12, atol=1e-12)


@KINDS
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(kind: str, how: Any) -> None:
    if how is not copy.deepcopy and kind in (
        "hook",
        "parametrized",
        "spectral norm",
        "method",
        "child",
        "read",
        "sliced",
        "max_norm",
    ):
        return  # torch, or a lambda, cannot be pickled
    if kind == "weight_norm of old":
        return  # after a forward no such module can be copied
    model = with_head(kind)
    train(model.train(), 2)
    again = how(model)
    train(again, 3)
    train(model, 3)
    for name, value in tensors(model.head).items():
        assert torch.equal(value, tensors(again.head)[name])
        assert value.data_ptr() != tensors(again.head)[name].data_ptr()
    with disable_adapter(again), disable_adapter(model):
        assert torch.equal(again.eval()(X), model.eval()(X))


class Listed(Decoder):
    """Its method reads the weight where a list keeps it."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.kernels = keep(self.out.weight)

    def forward(self, h: Tensor) -> Tensor:
        return h @ next(iter(self.kernels)).mT


@pytest.mark.parametrize(
    "keep", [lambda w: [w], lambda w: ([w],), lambda w: {"k": w}, lambda w: deque([w])]
)
@pytest.mark.parametrize("outside", [False, True])
def test_tensors_that_are_kept_beside_refuse(keep: Callable[[Tensor], Any], outside: bool) -> None:
    model = Model("method")
    model.head = Decoder() if outside else Listed(keep)
    if outside:
        model.kernels = keep(model.head.out.weight)
    at = "'kernels'" if outside else "'head.kernels'"
    config = LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"])
    with pytest.raises(TargetError, match=rf"'head' .* cannot train in full: {at} keeps"):
        inject_adapter(model, config)
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
    if outside:
        del model.kernels
    else:  # what the error says to do
        model.head.kernels = nn.ParameterList([model.head.out.weight])
    inject_adapter(model, config)
    assert outside or model.head.kernels[0] is model.head.out.weight


def masked(head: nn.Module) -> Any:
    """Only the first row of the weight is to train; the handle takes the hook off again."""
    rows = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    return head.get_parameter("out.weight").register_hook(lambda gradient: gradient * rows)


def halved(head: nn.Module) -> Any:
    def halve(parameter: Tensor) -> None:
        parameter.grad = None if parameter.grad is None else parameter.grad / 2

    return head.get_parameter("out.weight").register_post_accumulate_grad_hook(halve)


@pytest.mark.parametrize("hook", [masked, halved])
def test_hooks_on_its_gradients_stay(hook: Callable[[nn.Module], Any]) -> None:
    plain, model = Model("method").double(), Model("method").double()
    plain.body.requires_grad_(False)
    handles = [hook(plain.head), hook(model.head)]
    inject_adapter(model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]))
    for _ in range(2):
        train(plain), train(model)
        for name, value in tensors(plain.head).items():
            torch.testing.assert_close(tensors(model.head)[name], value, rtol=1e-12, atol=1e-12)
        for handle in handles:  # from now on without
            handle.remove()
    with disable_adapter(model):
        assert torch.equal(model(X), Model("method").double()(X))


def test_what_its_user_froze_inside_stays_frozen() -> None:
    """DINO's `weight_g`, say; where all of it is frozen, all of it trains: it was asked for."""
    plain, model, whole = (Model("weight_norm of old").double() for _ in range(3))
    plain.body.requires_grad_(False)
    for one in (plain, model):
        one.head.weight_g.requires_grad_(False)
    whole.requires_grad_(False)
    config = LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"])
    for one in (model, whole):
        inject_adapter(one, config, "a")
    train(plain), train(model)
    for name, value in tensors(plain.head).items():
        torch.testing.assert_close(tensors(model.head)[name], value, rtol=1e-12, atol=1e-12)
    inject_adapter(model, config, "b")
    for name in ("a", "b"):
        set_adapter(model, name)
        trains = {n for n, p in model.head.named_parameters() if p.requires_grad}
        assert trains == {"bias", "weight_v"}
    assert {n for n, p in whole.head.named_parameters() if p.requires_grad} == {
        "bias", "weight_g", "weight_v",
    }  # fmt: skip


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_statistics_move_as_the_models_mode_says(mode: bool, tmp_path: Path) -> None:
    """Put on, switched, read from a folder: whatever the order."""
    plain, model = (
        Model("batch norm").double().train(mode),
        Model("batch norm").double().train(mode),
    )
    config = LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"])
    inject_adapter(model, config, "a")
    assert bit_equal(model(X), plain(X))
    save_adapter(model, tmp_path, "a")
    other = Model("batch norm").double().train(mode)
    load_adapter(other, tmp_path)
    assert bit_equal(other(X), plain(X))
    inject_adapter(other, config, "b")
    set_adapter(other, "b")
    assert bit_equal(Model("batch norm").double().train(mode)(X), other(X))
    assert other.head[1].training is mode


# -- graphs, loading, several ------------------------------------------------------------------------


def test_a_reference_between_forward_and_backward() -> None:
    """DPO: the base's own forward comes between the two."""
    model, plain = with_head("method"), with_head("method")
    train(model, 2)
    train(plain, 2)
    loss = model(X).square().sum()
    with torch.no_grad(), disable_adapter(model):
        reference = model(X)
    (loss + reference.sum()).backward()  # any of it in between
    assert torch.equal(reference, Model("method").double()(X))
    model.zero_grad()
    loss = model(X).square().sum()
    with disable_adapter(model):
        model(X)
    loss.backward()
    plain.zero_grad()
    plain(X).square().sum().backward()
    for one, other in zip(model.head.parameters(), plain.head.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad - other.grad, torch.zeros_like(one))


@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_base_that_is_loaded_is_the_bases(acts: bool, assign: bool) -> None:
    model = with_head("new buffer")
    train(model)
    trained = {k: t.clone() for k, t in adapter_state_dict(model).items()}
    new = Model("new buffer").double()
    randomize(new.parameters())
    set_adapter(model, ["default"] if acts else [])
    missing, unexpected = model.load_state_dict(
        copy.deepcopy(new.state_dict()), strict=False, assign=assign
    )
    assert not unexpected
    assert all(".adapters." in key for key in missing)
    set_adapter(model, "default")
    assert all(torch.equal(t, trained[k]) for k, t in adapter_state_dict(model).items())
    if not assign:  # else the rest of the model has other tensors than the optimizer
        assert model.head.out.weight.requires_grad
    with disable_adapter(model):
        assert torch.equal(model.eval()(X), new.eval()(X))


def test_a_state_dict_goes_there_and_back() -> None:
    model, other = with_head("new buffer"), with_head("new buffer")
    train(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(X), model.eval()(X))
    train(model.train())
    train(other.train())
    assert torch.equal(other.eval()(X), model.eval()(X))


def two_heads(kind: str = "method") -> Model:
    model = with_head(kind, "a")
    inject_adapter(model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]), "b")
    for name in "ab":
        torch.manual_seed(ord(name))
        randomize(model.head.adapters[name].module.parameters())
        randomize(model.body.adapters[name].parameters())
    return model.eval()


def alone(model: Model, name: str) -> Model:
    one = copy.deepcopy(model)
    set_adapter(one, name)
    return one


def test_switching_and_deleting() -> None:
    model = two_heads()
    base, a, b = Model("method").double()(X), alone(model, "a")(X), alone(model, "b")(X)
    assert len({y.sum().item() for y in (base, a, b)}) == 3
    for name, expected in (("b", b), ("a", a), ([], base), ("b", b)):
        set_adapter(model, name)
        assert torch.equal(model(X), expected)
    delete_adapter(model, "b")
    assert torch.equal(model(X), base)
    set_adapter(model, "a")
    assert torch.equal(model(X), a)
    delete_adapter(model, "a")
    assert torch.equal(model(X), base)
    assert type(model.head) is Decoder


def test_two_heads_at_once_are_refused() -> None:
    with pytest.raises(AdapterStateError, match=r"train 'head' in full.*modules_to_save='mean'"):
        set_adapter(two_heads(), ["a", "b"])


def test_rows_have_their_own_heads() -> None:
    model = two_heads("forward")
    names = ["b", None, "a", "b", "a"]
    with adapters_per_row(model, names):
        found = model(X)
        assert torch.equal(model.head.out.weight, model.state_dict()["head.out.weight"])
    found.sum().backward()
    for i, name in enumerate(names):
        one = alone(model, name or [])
        torch.testing.assert_close(found[i], one(X)[i], rtol=1e-12, atol=1e-12)
    for name in "ab":
        weight = model.head.adapters[name].module.out.weight
        assert weight.grad is None or weight.requires_grad
    trained = model.head.adapters["a"].module.out.weight
    one = alone(model, "a")
    one.zero_grad()
    one(X)[[2, 4]].sum().backward()
    torch.testing.assert_close(trained.grad, one.head.out.weight.grad)


def test_a_second_head_starts_from_the_base() -> None:
    model = with_head("method", "a")
    train(model)
    inject_adapter(model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]), "b")
    set_adapter(model, "b")
    assert torch.equal(model(X), Model("method").double()(X))


def test_one_inside_the_other_is_refused() -> None:
    model = with_head("method", "a")
    config = LoraConfig(r=1, target_modules=["body"], modules_to_save=["out"])
    with pytest.raises(AdapterStateError, match=r"'head.out' cannot train in full beside 'head'"):
        inject_adapter(model, config, "b")
    assert torch.equal(model(X), Model("method").double()(X))


def test_adapters_inside_of_it_act_on_what_trains() -> None:
    model = with_head("method", "whole")
    inject_adapter(model, LoraConfig(r=2, target_modules=["out"]), "inner")
    set_adapter(model, ["whole", "inner"])
    lora = model.head.out.adapters["inner"]
    randomize(lora.parameters())
    train(model)
    plain = Model("method").double()
    plain.load_state_dict(
        {**plain.state_dict(), **adapter_state_dict(model, "whole")}, strict=False
    )
    with torch.no_grad():
        plain.head.out.weight += lora.delta_weight()
    torch.testing.assert_close(model(X), plain(X))


def test_the_bases_own_tensor_is_no_new_one() -> None:
    """`tie_weights` of transformers puts the table's weight into the head again."""
    model = with_head("read")
    train(model)
    expected, trained = model(X), model.head.weight
    model.head.weight = model.head.original_tensors.weight
    assert torch.equal(adapter_state_dict(model)["head.weight"], trained)
    assert model.head.weight is trained
    assert torch.equal(model(X), expected)


def test_a_new_parameter_is_what_trains() -> None:
    model = with_head("forward")
    new = torch.full((3, 6), 0.5, dtype=torch.float64)
    model.head.out.weight = nn.Parameter(new.clone())
    assert torch.equal(adapter_state_dict(model)["head.out.weight"], new)
    with disable_adapter(model):
        assert not torch.equal(model.head.out.weight, new)
    assert torch.equal(model.head.out.weight, new)


def test_a_part_that_is_gone_is_refused() -> None:
    model = with_head("forward")
    model.head.out = nn.Identity()
    with pytest.raises(AdapterStateError, match=r"no 'weight' of its own any more"):
        set_adapter(model, [])


def test_values_that_come_late() -> None:
    model = Model("method").double()
    config = LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"])
    inject_adapter(model, config, low_cpu_mem_usage=True)
    state = {k: t.new_ones(t.shape, device="cpu") for k, t in adapter_state_dict(model).items()}
    load_adapter_state_dict(model, state)
    assert torch.equal(model.head.out.weight, torch.ones(3, 6))
    assert model.head.out.weight.requires_grad
    train(model)
    assert torch.equal(model.head.out.weight, adapter_state_dict(model)["head.out.weight"])


# -- a base in 16 bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])  # as in validation
def test_what_a_forward_writes_into_16_bits_reaches_what_trains(mode: Any) -> None:
    model = Model("max_norm").to(torch.bfloat16)
    with torch.no_grad():
        model.head.weight.mul_(10)
    inject_adapter(model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]))
    before = model.head.weight.detach().clone()
    assert before.dtype is torch.float32
    with mode():
        model(X.to(torch.bfloat16))
    moved = (model.head.weight != before).any(1)
    assert moved.any()
    assert not moved.all()
    assert (model.head.weight[moved].norm(dim=1) < 0.51).all()
    assert bit_equal(model.state_dict()["head.weight"].float(), before)


def test_methods_write_into_fp32_masters() -> None:
    model = Model("written by a method").to(torch.bfloat16)
    inject_adapter(model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]))
    model(X.to(torch.bfloat16))
    norms = model.head.out.weight.norm(dim=1)
    assert norms.dtype is torch.float32
    torch.testing.assert_close(norms, torch.ones(3))


def test_a_module_that_is_offloaded_afterwards_is_refused() -> None:
    model = with_head("forward")
    accelerate.cpu_offload(model)
    with pytest.raises(
        AdapterStateError, match=r"was offloaded .* after an adapter that trains it"
    ):
        model(X)


class Taken(Model):
    """Uses its head in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__("batch norm")
        self.how = how
        self.other = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        if self.how == "parts":
            for layer in self.head:
                h = layer(h)
            return h
        return h if self.how == "not at all" else self.head(h)


@pytest.mark.parametrize("how", ["whole", "parts", "not at all"])
def test_rows_whose_head_is_not_called_as_a_whole(how: str) -> None:
    model = Taken(how).double().eval()
    for name in "ab":
        inject_adapter(
            model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]), name
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with adapters_per_row(model, ["a", "b", None, "a", "b"]):
            pass
        assert not caught
        with adapters_per_row(model, ["a", "b", None, "a", "b"]):
            model(X)
    said = [str(w.message) for w in caught if "was not called itself" in str(w.message)]
    assert len(said) == (how != "whole")
    assert all("'head'" in text or "head trains" in text for text in said)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "append": lambda head: head.append(nn.Linear(2, 2)),
    "extend": lambda head: head.extend([nn.Identity()]),
    "insert": lambda head: head.insert(0, nn.Identity()),
    "pop": lambda head: head.pop(-1),
    "set": lambda head: head.__setitem__(0, nn.Identity()),
    "delete": lambda head: head.__delitem__(-1),
    "add": lambda head: head.__iadd__(nn.Sequential(nn.Identity())),
}


@pytest.mark.parametrize("how", CHANGES)
def test_the_layers_of_a_head_stay(how: str) -> None:
    model = with_head("batch norm").eval()
    before = model(X)
    with pytest.raises(AdapterStateError, match=r"layers of a Sequential that trains in full"):
        CHANGES[how](model.head)
    assert torch.equal(model(X), before)
    unload(model)
    CHANGES[how](model.head)


# -- what its user does with all of it ------------------------------------------------------------


def test_a_loop_over_its_parameters() -> None:
    """MAML's inner gradients, a penalty, a clamp: of what trains, and nothing beside it."""
    plain, model = Model("method").double(), two_heads()
    set_adapter(model, "a")
    assert [n for n, _ in model.head.named_parameters()] == ["out.weight", "out.bias"]
    assert [n for n, _ in model.head.named_parameters("x")] == ["x.out.weight", "x.out.bias"]
    found = torch.autograd.grad(model(X).sum(), model.head.parameters())
    assert len(found) == 2
    for parameter in model.head.parameters():
        parameter.data.zero_()
    with disable_adapter(model):
        assert torch.equal(model(X), plain(X))
        assert len(list(model.head.parameters())) == 2
    names = {n for n, _ in model.named_parameters()}  # for optimizers, of all that there is
    assert "head.original_tensors.out.weight" in names
    assert "body.adapters.b.lora_A" in names


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_is_loaded_into_it(strict: bool) -> None:
    """A head that is begun anew, or taken over from elsewhere, in the middle of a run."""
    plain, model = Model("method").double(), with_head("method")
    new = Decoder().double()
    own = model.head.out.weight
    model.head.load_state_dict(new.state_dict(), strict=strict)
    assert model.head.out.weight is own  # as the optimizer has it
    assert torch.equal(model.head(X), new(X))
    with disable_adapter(model):
        assert torch.equal(model(X), plain(X))
        model.head.load_state_dict(new.state_dict(), strict=False)  # the base's turn
        assert torch.equal(model.head(X), new(X))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.head.load_state_dict({"out.weight": own})
    state = copy.deepcopy(model.head.state_dict())
    train(model)
    model.head.load_state_dict(state)  # its own, with all of it
    assert torch.equal(model.head(X), new(X))
