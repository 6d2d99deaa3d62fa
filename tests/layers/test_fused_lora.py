"""layers/fused_lora.py against the plain expression, written out here with ordinary operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_lightning.layers.fused_lora import LoraTerm, add_lora, can_fuse, fused_lora

IN, OUT = 6, 5
SHAPES = [(IN,), (1, IN), (4, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN), (2, 0, IN)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, terms: list[LoraTerm]) -> Tensor:
    """The formula as one would write it down; casts are left to autocast where it is on."""
    return plain_add(x, F.linear(x, weight, bias), terms)


def plain_add(x: Tensor, y: Tensor, terms: list[LoraTerm]) -> Tensor:
    narrow = not torch.is_autocast_enabled("cpu")
    for a, b, scaling, p in terms:
        if narrow:
            a, b = a.to(x.dtype), b.to(x.dtype)
        y = y + scaling * F.linear(F.linear(nn.Dropout(p)(x), a), b).to(y.dtype)
    return y


def leaf(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return (
        (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype).requires_grad_(grad)
    )


def make_terms(
    ranks: tuple[int, ...] = (2, 1), dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> list[LoraTerm]:
    return [
        LoraTerm(leaf(r, IN, dtype=dtype), leaf(OUT, r, dtype=dtype), 0.7 + i, dropout)
        for i, r in enumerate(ranks)
    ]


def factors(terms: list[LoraTerm]) -> list[Tensor]:
    return [factor for term in terms for factor in term[:2]]


def with_factors(terms: list[LoraTerm], new: tuple[Tensor, ...]) -> list[LoraTerm]:
    pairs = zip(terms, new[::2], new[1::2], strict=True)
    return [term._replace(lora_A=a, lora_B=b) for term, a, b in pairs]


def results(run: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Output and gradients, from the same random numbers each time."""
    torch.manual_seed(3)
    y = run()
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, inputs, g.to(y.dtype), allow_unused=True)]


def assert_same(found: list[Any], expected: list[Any], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_the_plain_expression(
    shape: tuple[int, ...], with_bias: bool, dropout: float
) -> None:
    x, weight, bias = leaf(*shape), leaf(OUT, IN), leaf(OUT) if with_bias else None
    terms = make_terms(dropout=dropout)
    inputs = [t for t in (x, weight, bias, *factors(terms)) if t is not None]
    found = results(lambda: fused_lora(x, weight, bias, terms), inputs)
    assert_same(found, results(lambda: plain(x, weight, bias, terms), inputs), 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("inplace", [True, False])
def test_add_equals_the_plain_expression(dropout: float, inplace: bool) -> None:
    x, y, terms = leaf(2, 3, IN), leaf(2, 3, OUT), make_terms(dropout=dropout)
    inputs = [x, y, *factors(terms)]
    found = results(lambda: add_lora(x, y * 1, terms, inplace=inplace), inputs)
    assert_same(found, results(lambda: plain_add(x, y, terms), inputs), 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_input_that_is_not_contiguous(dropout: float) -> None:
    x, weight, terms = leaf(4, IN, 3), leaf(OUT, IN, grad=False), make_terms(dropout=dropout)
    inputs = [x, *factors(terms)]
    found = results(lambda: fused_lora(x.transpose(1, 2), weight, None, terms), inputs)
    expected = results(lambda: plain(x.transpose(1, 2), weight, None, terms), inputs)
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_are_those_of_the_function(check: Callable[..., bool], dropout: float) -> None:
    terms = make_terms(dropout=dropout)

    def run(x: Tensor, weight: Tensor, bias: Tensor, *new: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fused_lora(x, weight, bias, with_factors(terms, new))

    batched = not dropout  # a mask cannot be drawn for a batch of functions
    inputs = (leaf(2, 2, IN), leaf(OUT, IN), leaf(OUT), *factors(terms))
    assert check(run, inputs, check_batched_grad=batched)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_of_add_are_those_of_the_function(check: Callable[..., bool]) -> None:
    terms = make_terms()

    def run(x: Tensor, y: Tensor, *new: Tensor) -> Tensor:
        return add_lora(x, y * 1, with_factors(terms, new), inplace=True)

    assert check(run, (leaf(2, IN), leaf(2, OUT), *factors(terms)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_double_backward_equals_the_plain_expression(dropout: float) -> None:
    """A gradient penalty: it differentiates every gradient by every input."""
    x, weight, bias, terms = leaf(3, IN), leaf(OUT, IN), leaf(OUT), make_terms(dropout=dropout)
    inputs = [x, weight, *factors(terms)]

    def penalty(run: Callable[..., Tensor]) -> Tensor:
        y = run(x, weight, bias, terms).tanh().sum()
        gradients = torch.autograd.grad(y, inputs, create_graph=True)
        return torch.stack([gradient.pow(3).sum() for gradient in gradients])

    found, expected = (results(partial(penalty, run), inputs) for run in (fused_lora, plain))
    assert_same(found, expected, 1e-12)


def test_backward_twice_gives_the_same() -> None:
    x, weight, terms = leaf(3, IN), leaf(OUT, IN), make_terms()
    y = fused_lora(x, weight, None, terms).sum()
    first = torch.autograd.grad(y, [x, *factors(terms)], retain_graph=True)
    second = torch.autograd.grad(y, [x, *factors(terms)])
    assert_same(list(first), list(second), 0)


@pytest.mark.parametrize("shape", [(4, IN), (2, 3, IN), (IN,)], ids=str)
def test_output_can_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """As `nn.ReLU(inplace=True)` after a Linear does."""
    x, weight, bias, terms = leaf(*shape), leaf(OUT, IN), leaf(OUT), make_terms()
    inputs = [x, weight, bias, *factors(terms)]
    found = results(lambda: fused_lora(x, weight, bias, terms).relu_(), inputs)
    assert_same(found, results(lambda: plain(x, weight, bias, terms).relu(), inputs), 1e-12)


def test_add_writes_into_y_only_where_told() -> None:
    x, terms = leaf(2, IN), make_terms()
    y = leaf(2, OUT, grad=False)
    before = y.clone()
    add_lora(x, y, terms)
    assert torch.equal(y, before)
    assert add_lora(x, y, terms, inplace=True) is y
    assert not torch.equal(y, before)


def test_add_to_an_output_of_another_dtype() -> None:
    terms = make_terms(dtype=torch.float32)
    x, y = leaf(64, IN, dtype=torch.bfloat16), leaf(64, OUT, dtype=torch.float32)
    inputs = [x, y, *factors(terms)]
    found = results(lambda: add_lora(x, y, terms), inputs)
    expected = results(lambda: plain_add(x, y, terms), inputs)
    assert_same(found, expected, 3e-2)
    assert found[0] is not None
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("inplace", [True, False])
def test_add_to_an_nf4_base(dtype: torch.dtype, with_bias: bool, inplace: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = bnb.nn.Linear4bit(64, OUT, bias=with_bias, quant_type="nf4", compute_dtype=dtype)
    base = base.to("cpu").requires_grad_(False)
    x = leaf(2, 16, 64, dtype=dtype)
    terms = [LoraTerm(leaf(2, 64, dtype=torch.float32), leaf(OUT, 2, dtype=torch.float32), 0.7)]
    inputs = [x, *factors(terms)]
    found = results(lambda: add_lora(x, base(x), terms, inplace=inplace), inputs)
    expected = results(lambda: plain_add(x, base(x), terms), inputs)
    assert_same(found, expected, 3e-2 if dtype == torch.bfloat16 else 1e-5)


def exact(x: Tensor, weight: Tensor, bias: Tensor, terms: list[LoraTerm]) -> list[Tensor | None]:
    """`results` in float64, of the same rounded inputs."""
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias, *factors(terms))]
    terms = with_factors(terms, tuple(wide[3:]))
    return results(lambda: plain(wide[0], wide[1], wide[2], terms), wide)


def assert_near(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Each tensor as a whole, to what bf16 arithmetic allows (8 bits)."""
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).norm() < 0.01 * other.norm()


def test_bf16_weights_with_fp32_adapters() -> None:
    x, weight = leaf(64, IN, dtype=torch.bfloat16), leaf(OUT, IN, dtype=torch.bfloat16)
    bias, terms = leaf(OUT, dtype=torch.bfloat16), make_terms(dtype=torch.float32)
    inputs = [x, weight, bias, *factors(terms)]
    found = results(lambda: fused_lora(x, weight, bias, terms), inputs)
    assert_near(found, exact(x, weight, bias, terms))
    assert [t.dtype for t in found[:4] if t is not None] == [torch.bfloat16] * 4
    assert {t.dtype for t in found[4:] if t is not None} == {torch.float32}


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast(backward_inside: bool) -> None:
    x, weight = leaf(64, IN, dtype=torch.float32), leaf(OUT, IN, dtype=torch.float32)
    bias, terms = leaf(OUT, dtype=torch.float32), make_terms(dtype=torch.float32)
    inputs = [x, weight, bias, *factors(terms)]

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused_lora(x, weight, bias, terms)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_inside):
        found = results(run, inputs)
    assert_near(found, exact(x, weight, bias, terms))
    assert [t.dtype for t in found if t is not None] == [torch.bfloat16] + 7 * [torch.float32]


def test_backward_inside_another_autocast_keeps_the_precision_of_forward() -> None:
    x, weight, terms = leaf(8, IN), leaf(OUT, IN), make_terms()
    x32, weight32 = x.detach().float().requires_grad_(), weight.detach().float()
    terms32 = with_factors(
        terms, tuple(f.detach().float().requires_grad_() for f in factors(terms))
    )
    y, y32 = plain(x, weight, None, terms), fused_lora(x32, weight32, None, terms32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y32.sum(), [x32, *factors(terms32)])
    expected = torch.autograd.grad(y.sum(), [x, *factors(terms)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_autocast_leaves_float64_alone() -> None:
    x, weight, bias, terms = leaf(3, IN), leaf(OUT, IN), leaf(OUT), make_terms()
    inputs = [x, *factors(terms)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(lambda: fused_lora(x, weight, bias, terms), inputs)
    assert_same(found, results(lambda: plain(x, weight, bias, terms), inputs), 1e-12)


def test_autocast_cache_holds_no_weight_without_its_gradient() -> None:
    """A weight that two layers share trains through both, whichever comes first."""
    x, weight, terms = leaf(3, IN, dtype=torch.float32), leaf(OUT, IN, dtype=torch.float32), []
    bias = leaf(OUT, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused_lora(x, weight, bias, terms)
        y = F.linear(x, weight, bias)
    assert torch.autograd.grad(y.sum(), [weight, bias])[0].abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradient_checkpointing(reentrant: bool, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float64
    x, weight, bias = leaf(8, IN, dtype=dtype), leaf(OUT, IN, dtype=dtype), leaf(OUT, dtype=dtype)
    terms = make_terms(dropout=0.4, dtype=dtype)
    leaves = [x, bias, *factors(terms)]

    def gradients(wrap: Callable[..., Any]) -> list[Tensor | None]:
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = wrap(lambda x: fused_lora(x, weight, bias, terms).relu(), x)
        y.square().sum().backward()
        found = [t.grad for t in leaves]
        for t in leaves:
            t.grad = None
        return found

    expected = gradients(lambda run, x: run(x))
    assert_same(gradients(partial(checkpoint, use_reentrant=reentrant)), expected, 0)


class Products(TorchDispatchMode):
    """Counts the products and their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes[tuple(out.shape)] += 1
        return out


@pytest.mark.parametrize("trained", ["x", "lora_A", "lora_B", "weight", "bias"])
def test_only_the_gradients_asked_for_are_computed(trained: str) -> None:
    tokens, r = 7, 2
    tensors = {
        "x": leaf(tokens, IN),
        "weight": leaf(OUT, IN),
        "bias": leaf(OUT),
        "lora_A": leaf(r, IN),
        "lora_B": leaf(OUT, r),
    }
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    x, weight, bias, a, b = tensors.values()
    y = fused_lora(x, weight, bias, [LoraTerm(a, b, 2.0)])
    with Products() as products:
        y.sum().backward()
    of_hidden, shape = (tokens, r), tuple(tensors[trained].shape)
    expected = {"x": {shape: 1, of_hidden: 1}, "lora_A": {shape: 1, of_hidden: 1}, "bias": {}}
    expected["lora_B"] = {shape[::-1]: 1}  # of the transposed product, which is the faster one
    assert products.shapes == expected.get(trained, {shape: 1})
    assert [name for name, t in tensors.items() if t.grad is not None] == [trained]


class Kept:
    """What autograd keeps for backward: each storage once, those of `own` left out."""

    def __init__(self, *own: Tensor) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.tensors: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.own:
            self.tensors[pointer] = tensor
        return tensor

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def kinds(self) -> Counter[tuple[tuple[int, ...], torch.dtype]]:
        return Counter((tuple(t.shape), t.dtype) for t in self.tensors.values())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_kept_for_backward_are_x_once_and_the_hidden(autocast: bool, dropout: float) -> None:
    """Three layers that read the same x, as q, k and v do."""
    weights = [leaf(OUT, IN, dtype=torch.float32, grad=False) for _ in range(3)]
    terms = [make_terms((2,), dropout, torch.float32) for _ in range(3)]
    x = leaf(4, 3, IN, dtype=torch.float32)
    with (
        Kept(*weights, *(f for layer in terms for f in factors(layer))) as kept,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        outputs = [fused_lora(x, w, None, t) for w, t in zip(weights, terms, strict=True)]
    dtype = torch.bfloat16 if autocast else torch.float32
    expected = {((4, 3, IN), dtype): 1, ((12, 2), dtype): 3}
    if dropout:
        expected[(4, 3, IN), torch.bool] = 3
    assert kept.kinds == expected
    del outputs


def test_frozen_factors_keep_nothing() -> None:
    x, weight, terms = leaf(3, IN), leaf(OUT, IN, grad=False), make_terms((2,))
    for factor in factors(terms):
        factor.requires_grad_(False)
    with Kept(weight, *factors(terms)) as kept:
        y = fused_lora(x, weight, None, terms)
    assert not kept.tensors
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = torch.autograd.grad(plain(x, weight, None, terms).sum(), x)
    assert_same([dx], list(expected), 1e-12)


def test_kept_tensors_can_be_moved_elsewhere() -> None:
    x, weight, terms = leaf(3, IN), leaf(OUT, IN), make_terms(dropout=0.4)
    inputs = [x, weight, *factors(terms)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        found = results(lambda: fused_lora(x, weight, None, terms), inputs)
    assert_same(found, results(lambda: plain(x, weight, None, terms), inputs), 1e-12)


class Subclass(Tensor):
    pass


def test_can_fuse_ordinary_tensors_that_train() -> None:
    x, weight = leaf(3, IN), nn.Parameter(leaf(OUT, IN))
    assert can_fuse(x, weight, None)
    with torch.no_grad():
        assert not can_fuse(x, weight)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(2, 3).to(torch.float8_e4m3fn),
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3).as_subclass(Subclass),
    ],
    ids=["integers", "complex", "float8", "sparse", "subclass"],
)
def test_cannot_fuse_tensors_with_a_life_of_their_own(x: Tensor) -> None:
    assert not can_fuse(x)
    assert can_fuse(torch.ones(2, 3))
    if type(x) is not Tensor:
        assert not can_fuse(torch.ones(2, 3), x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # used by forward_ad
def test_cannot_fuse_while_somebody_traces_or_transforms() -> None:
    weight, terms, seen = leaf(OUT, IN), make_terms(), []

    def either(x: Tensor) -> Tensor:
        fuse = can_fuse(x, weight, *factors(terms))
        seen.append(fuse)
        return (fused_lora if fuse else plain)(x, weight, None, terms)

    x = leaf(3, IN)
    expected = plain(x, weight, None, terms)
    torch.testing.assert_close(torch.func.vmap(either)(x), expected)
    torch.testing.assert_close(torch.func.jvp(either, (x,), (x,))[1], expected)
    torch.func.grad(lambda x: either(x).sum())(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(either(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, expected)
    compiled = torch.compile(either, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    assert not any(seen)
    either(x)
    assert seen[-1]
