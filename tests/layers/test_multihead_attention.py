"""`nn.MultiheadAttention` with adapters equals one whose weights were changed, in every option."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import warnings
from dataclasses import dataclass

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from lora_lightning import (
    LoraConfig,
    adapter_state_dict,
    add_weighted_adapter,
    delete_adapter,
    disable_adapter,
    hotswap_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.registry import register_adapter
from lora_lightning.engine.switching import adapters_per_row
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.multihead_attention import AdaptedMultiheadAttention
from tests.helpers.tensors import bit_equal, randomize

E, HEADS, N, L, S = 12, 3, 2, 4, 5
PACKED = ("in_proj_weight",)
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
WHOLE = ["mha"]  # adapts the input projections and out_proj


def attention(dtype: torch.dtype = torch.float64, **options) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():  # biases are zero by default
            parameter.copy_(torch.randn_like(parameter) / 3)
    return module


class Net(nn.Module):
    """The attention has a name; anything else is its forward."""

    def __init__(self, mha: nn.MultiheadAttention) -> None:
        super().__init__()
        self.mha = mha

    def forward(self, *args, **kwargs):
        return self.mha(*args, **kwargs)


def adapted(mha: nn.MultiheadAttention, name: str = "default", **options) -> Net:
    """A copy of the attention in a net, with random adapters."""
    options = {"r": 2, "lora_alpha": 5, "target_modules": WHOLE, **options}
    net = Net(copy.deepcopy(mha))
    inject_adapter(net, LoraConfig(**options), name)
    randomize(lora_tensors(net).values())
    return net


def lora_tensors(net: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in net.named_parameters() if ".adapters." in key}


def changed_weights(net: Net, name: str = "default", scaling: float = 5 / 2) -> dict[str, Tensor]:
    """W + scaling B A by hand, for every weight that has an A and a B."""
    tensors = lora_tensors(net)
    result = {}
    for weight in (*PACKED, *SEPARATE):
        if (key := f"mha.adapters.{name}.{weight}.lora_") + "A" in tensors:
            delta = scaling * tensors[key + "B"] @ tensors[key + "A"]
            result[weight] = getattr(net.mha, weight).detach() + delta
    if (key := f"mha.out_proj.adapters.{name}.lora_") + "A" in tensors:
        delta = scaling * tensors[key + "B"] @ tensors[key + "A"]
        result["out_proj.weight"] = net.mha.out_proj.weight.detach() + delta
    return result


# -- every option ------------------------------------------------------------------------------

MODULES = {
    "plain": {},
    "bias-kv": {"add_bias_kv": True, "bias": False},
    "zero-attn": {"add_zero_attn": True},
    "bias-kv-zero-attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim-vdim": {"kdim": 7, "vdim": 10},
    "kdim-bias-kv": {"kdim": 7, "add_bias_kv": True, "bias": False},
}
INPUTS = ("self", "key-is-value", "query-is-key", "distinct", "one-sequence", "one-distinct")
MASKS = ("none", "padding", "padding-float", "2d", "2d-float", "3d", "both", "causal", "causal-pad")


@dataclass
class Call:
    inputs: tuple[Tensor, Tensor, Tensor]
    options: dict


def call(mha: nn.MultiheadAttention, inputs: str, mask: str, **options) -> Call | None:
    """The arguments of one call, or None where the combination does not exist."""
    batched = not inputs.startswith("one")
    same = inputs in ("self", "one-sequence")
    length, source = L, L if same or inputs == "query-is-key" or "causal" in mask else S

    def sequence(length: int, width: int) -> Tensor:
        shape = (N, length, width) if mha.batch_first else (length, N, width)
        return torch.randn(shape if batched else (length, width), dtype=torch.float64)

    if mha.in_proj_weight is None and inputs not in ("distinct", "one-distinct"):
        return None
    q = sequence(length, E)
    k = q if same or inputs == "query-is-key" else sequence(source, mha.kdim)
    v = k if same or inputs == "key-is-value" else sequence(source, mha.vdim)
    padding = torch.zeros((N, source) if batched else (source,), dtype=torch.bool)
    padding[..., -1] = True
    block = torch.rand(length, source) < 0.4
    block[:, 0] = False
    given: dict = {}
    if mask in ("padding", "both", "causal-pad"):
        given["key_padding_mask"] = padding
    if mask == "padding-float":
        given["key_padding_mask"] = torch.randn(padding.shape, dtype=torch.float64)
    if mask in ("2d", "both"):
        given["attn_mask"] = block
    if mask == "2d-float":
        given["attn_mask"] = torch.randn(length, source, dtype=torch.float64)
    if mask == "3d":
        given["attn_mask"] = block.repeat((N if batched else 1) * HEADS, 1, 1)
        given["attn_mask"][0, :, 1:] = True
    if "causal" in mask:
        given["attn_mask"] = torch.ones(length, source, dtype=torch.bool).triu(1)
        given["is_causal"] = True
    return Call((q, k, v), {**given, **options})


def run(forward, made: Call, tensors) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients of the given tensors and of the inputs."""
    distinct: dict[int, Tensor] = {}
    q, k, v = (distinct.setdefault(id(x), x.clone().requires_grad_()) for x in made.inputs)
    torch.manual_seed(3)  # the same dropout
    outputs = [y for y in forward(q, k, v, **made.options) if y is not None]
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, [*tensors, *distinct.values()], allow_unused=True)
    return outputs, list(gradients)


def close(ours, theirs, tolerance: float = 1e-10) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_outputs_and_gradients_are_those_of_changed_weights(options, inputs):
    calls = 0
    for batch_first, dropout in ((False, 0.0), (True, 0.4)):
        base = attention(batch_first=batch_first, dropout=dropout, **options)
        net = adapted(base)
        tensors = list(lora_tensors(net).values())

        def dense(*args, net=net, base=base, **kwargs):
            return functional_call(base, changed_weights(net), args, kwargs)

        for mask, (need, average) in itertools.product(
            MASKS, ((False, True), (True, True), (True, False))
        ):
            made = call(base, inputs, mask, need_weights=need, average_attn_weights=average)
            if made is None:
                continue
            ours, our_gradients = run(net, made, tensors)
            theirs, their_gradients = run(dense, made, tensors)
            assert len(ours) == 1 + need
            close(ours, theirs)
            close(our_gradients, their_gradients)
            calls += 1
    assert calls in (0, 54)
    assert calls or "dim" in str(options)


@pytest.mark.parametrize("inputs", INPUTS[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_adapters_change_no_bit(dtype, inputs):
    for batch_first, need in itertools.product((False, True), (False, True)):
        base = attention(batch_first=batch_first)
        made = call(base, inputs, "2d", need_weights=need)
        base = base.to(dtype).requires_grad_(False)  # on which F.linear's rounding depends
        q, k, v = made.inputs
        distinct = {id(x): x.to(dtype) for x in made.inputs}
        args = [distinct[id(x)] for x in (q, k, v)]
        net = Net(copy.deepcopy(base))
        inject_adapter(net, LoraConfig(r=2, target_modules=WHOLE))
        outputs = zip(net(*args, **made.options), base(*args, **made.options), strict=True)
        for ours, theirs in outputs:
            assert (ours is theirs is None) or bit_equal(ours, theirs)


# -- which adapters ----------------------------------------------------------------------------


def self_call(net: nn.Module, x: Tensor) -> Tensor:
    return net(x, x, x, need_weights=False)[0]


def test_out_proj_alone_acts_and_its_attention_is_no_host_for_longer_than_needed():
    base = attention(batch_first=True)
    net = adapted(base, target_modules=["out_proj"])
    x = torch.randn(N, L, E, dtype=torch.float64)
    assert list(lora_tensors(net)) == [
        "mha.out_proj.adapters.default.lora_A",
        "mha.out_proj.adapters.default.lora_B",
    ]
    weights = changed_weights(net)
    assert list(weights) == ["out_proj.weight"]
    expected = self_call(lambda *a, **k: functional_call(base, weights, a, k), x)
    plain = self_call(base, x)
    assert not torch.allclose(plain, expected, atol=1e-3)
    torch.testing.assert_close(self_call(net, x), expected, rtol=1e-10, atol=1e-10)
    for duplicate in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert bit_equal(self_call(duplicate, x), self_call(net, x))
    assert isinstance(net.mha, AdaptedMultiheadAttention)
    inject_adapter(net, LoraConfig(r=1, target_modules=WHOLE), "second")
    delete_adapter(net, "second")
    assert isinstance(net.mha, AdaptedMultiheadAttention)
    torch.testing.assert_close(self_call(net, x), expected, rtol=1e-10, atol=1e-10)
    delete_adapter(net, "default")
    assert type(net.mha) is nn.MultiheadAttention
    assert vars(net.mha).keys() == vars(base).keys()
    assert set(dict(net.mha.named_modules())) == set(dict(base.named_modules()))


def test_in_proj_alone():
    base = attention()
    net = adapted(base, exclude_modules=["out_proj"])
    assert list(changed_weights(net)) == ["in_proj_weight"]
    assert type(net.mha.out_proj) is type(base.out_proj)
    x = torch.randn(L, N, E, dtype=torch.float64)
    expected = functional_call(base, changed_weights(net), (x, x, x))
    close(net(x, x, x), expected)


def test_an_attention_whose_class_was_swapped_again_stays_as_it_is():
    net = adapted(attention(), target_modules=["out_proj"])
    x = torch.randn(L, N, E, dtype=torch.float64)
    nn.utils.parametrize.register_parametrization(net.mha, "in_proj_weight", nn.Tanh())
    delete_adapter(net, "default")
    plain = attention()
    plain.load_state_dict(
        {
            "in_proj_weight": net.mha.in_proj_weight.detach(),
            **{k: v for k, v in net.mha.state_dict().items() if "in_proj_weight" not in k},
        }
    )
    assert all(map(bit_equal, net(x, x, x), plain(x, x, x)))


def test_two_adapters_and_switching():
    base = attention()
    net = adapted(base, r=3)
    inject_adapter(net, LoraConfig(r=2, lora_alpha=4, target_modules=["out_proj"]), "b")
    randomize(lora_tensors(net).values())
    first, second = changed_weights(net, scaling=5 / 3), changed_weights(net, "b", scaling=2)
    q, k = torch.randn(L, N, E, dtype=torch.float64), torch.randn(S, N, E, dtype=torch.float64)

    def expect(weights: dict[str, Tensor]) -> None:
        close(net(q, k, k), functional_call(base, weights, (q, k, k)))

    expect(first)
    set_adapter(net, "b")
    expect(second)
    set_adapter(net, ["default", "b"])
    both = first["out_proj.weight"] + second["out_proj.weight"] - base.out_proj.weight
    expect({**first, "out_proj.weight": both})
    with disable_adapter(net):
        assert all(map(bit_equal, net(q, k, k), base(q, k, k)))


def test_dropout_of_the_adapter_acts_on_the_input_of_the_update_only():
    base = attention(batch_first=True)
    net = adapted(base, lora_dropout=0.5, exclude_modules=["out_proj"])
    x = torch.randn(N, L, E, dtype=torch.float64)
    tensors = lora_tensors(net)
    a, b = (tensors[f"mha.adapters.default.in_proj_weight.lora_{f}"] for f in "AB")
    torch.manual_seed(4)
    ours = self_call(net, x)
    torch.manual_seed(4)
    y = F.linear(x, base.in_proj_weight, base.in_proj_bias) + 2.5 * F.dropout(x) @ a.t() @ b.t()
    q, k, v = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in y.chunk(3, -1))
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, base.out_proj(heads), rtol=1e-10, atol=1e-10)
    net.eval()
    expected = functional_call(base, changed_weights(net), (x, x, x))[0]
    torch.testing.assert_close(self_call(net, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 10}], ids=["packed", "separate"])
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_merging_equals_forward_and_leaves_no_trace(lora, options):
    base = attention(**options)
    net = adapted(base, **lora)
    made = call(base, "distinct", "none")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    ours = net(*made.inputs)
    merge_adapter(net)
    assert not bit_equal(net.mha.out_proj.weight, base.out_proj.weight)
    close(net(*made.inputs), ours)
    plain = attention(**options)
    plain.load_state_dict(net.mha.state_dict(), strict=False)
    close(plain(*made.inputs), ours)
    if "lora_bias" in lora:
        for name, third in zip("qkv", net.mha.in_proj_bias.chunk(3), strict=True):
            of_b = net.mha.adapters["default"]
            if options:
                shift = getattr(of_b, f"{name}_proj_weight").lora_B_bias
                kept = base.in_proj_bias["qkv".index(name) * E :][:E]
                torch.testing.assert_close(third, kept + 2.5 * shift, rtol=1e-10, atol=1e-10)
        originals = net.mha.kept_tensors()
        assert bit_equal(originals["in_proj_bias"], base.in_proj_bias)
        assert originals.keys() <= dict(base.named_parameters()).keys()
    unmerge_adapter(net)
    assert all(bit_equal(before[key], value) for key, value in net.state_dict().items())


@dataclass(frozen=True, kw_only=True)
class MixConfig(AdapterConfig):
    peft_type = "TEST_MIX"


class Mix(Adapter):
    """W' = R W: every output row looks at all of those below."""

    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.mix = spec.parameter(spec.shape[0], spec.shape[0])

    def forward(self, x, y, base):
        return y @ self.mix.t().to(y.dtype)

    def transform_weight(self, weight, base):
        return self.mix.to(weight) @ weight

    def transform_bias(self, bias, base):
        return self.mix.to(bias) @ bias


@pytest.mark.parametrize("inputs", INPUTS[:4])
def test_an_adapter_that_mixes_rows_is_given_all_of_them(inputs):
    register_adapter(MixConfig, {"linear": Mix})
    base = attention()
    net = Net(copy.deepcopy(base))
    inject_adapter(net, MixConfig(target_modules=WHOLE))
    randomize(lora_tensors(net).values())
    made = call(base, inputs, "none")
    r, r_out = lora_tensors(net).values()
    if r.shape[0] == E:
        r, r_out = r_out, r
    weights = {
        "in_proj_weight": r @ base.in_proj_weight,
        "in_proj_bias": r @ base.in_proj_bias,
        "out_proj.weight": r_out @ base.out_proj.weight,
        "out_proj.bias": r_out @ base.out_proj.bias,
    }
    close(net(*made.inputs), functional_call(base, weights, made.inputs), 1e-9)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_adapter_for_each_row_of_the_batch(batch_first):
    base = attention(batch_first=batch_first)
    net = adapted(base)
    inject_adapter(net, LoraConfig(r=1, lora_alpha=2, target_modules=["out_proj"]), "b")
    inject_adapter(net, LoraConfig(r=1, lora_alpha=2, target_modules=WHOLE), "c")
    randomize(lora_tensors(net).values())
    names = ["b", "default", None, "c", "default"]
    batch = 0 if batch_first else 1
    q, k = torch.randn(2, 5, 5, E, dtype=torch.float64).unbind()
    with adapters_per_row(net, names):
        ours = net(q, k, k)[0]
    for i, name in enumerate(names):
        row = [x.narrow(batch, i, 1) for x in (q, k, k)]
        weights = {} if name is None else changed_weights(net, name, 2.5 if name[1:] else 2.0)
        expected = functional_call(base, weights, tuple(row))[0]
        torch.testing.assert_close(ours.narrow(batch, i, 1), expected, rtol=1e-10, atol=1e-10)
    with (
        adapters_per_row(net, names[:3]),
        pytest.raises(AdapterStateError, match="each of 3 rows, but a MultiheadAttention"),
    ):
        net(q, k, k)
    with adapters_per_row(net, names), disable_adapter(net):
        torch.testing.assert_close(net(q, k, k)[0], base(q, k, k)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("out_proj_too", [True, False])
def test_adapters_on_top_of_a_trained_copy(out_proj_too):
    base = attention()
    exclude = None if out_proj_too else ["out_proj"]
    net = adapted(base, exclude_modules=exclude)
    net.extra = nn.Linear(2, 2)
    config = LoraConfig(r=1, target_modules=["extra"], modules_to_save=["mha"])
    inject_adapter(net, config, "copy")
    trained = copy.deepcopy(base)
    q, k = torch.randn(2, L, N, E, dtype=torch.float64).unbind()
    close(net(q, k, k), functional_call(base, changed_weights(net), (q, k, k)))
    randomize(net.mha.adapters["copy"].module.parameters())
    trained.load_state_dict(net.mha.adapters["copy"].module.state_dict())
    set_adapter(net, "copy")
    close(net(q, k, k), trained(q, k, k), 0)
    set_adapter(net, ["default", "copy"])
    deltas = changed_weights(net)  # which now adds them to what trains in place of the base
    assert len(deltas) == 1 + out_proj_too
    close(net(q, k, k), functional_call(trained, deltas, (q, k, k)))
    config = LoraConfig(r=1, target_modules=["extra"], modules_to_save=["out_proj"])
    with pytest.raises(AdapterStateError, match="one is part of the other"):
        inject_adapter(net, config, "inner")


# -- the base ----------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
def test_no_forward_or_backward_touches_the_base(need_weights):
    net = Net(attention(torch.bfloat16))
    before = {key: (p, p.detach().clone()) for key, p in net.named_parameters()}
    inject_adapter(net, LoraConfig(r=2, target_modules=WHOLE))
    randomize(lora_tensors(net).values())
    x = torch.randn(L, N, E, dtype=torch.bfloat16)
    first = net(x, x, x, need_weights=need_weights)[0]
    for _ in range(50):
        output = net(x, x, x, need_weights=need_weights)[0]
        assert torch.equal(output, first)
        output.float().square().sum().backward()
        after = dict(net.named_parameters())
        for key, (parameter, value) in before.items():
            assert after[key] is parameter
            assert torch.equal(parameter, value)
            assert parameter.grad is None
    for parameter in lora_tensors(net).values():
        assert parameter.dtype == torch.float32
        assert parameter.grad.norm() > 0


def test_merging_ten_times_in_bf16_restores_every_bit():
    net = adapted(attention(torch.bfloat16))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for _ in range(10):
        merge_adapter(net)
        assert not torch.equal(net.mha.in_proj_weight, before["mha.in_proj_weight"])
        unmerge_adapter(net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


# -- torch's fast paths, layers, autocast, compile ---------------------------------------------


def test_fast_path_of_the_attention_itself_is_not_taken():
    base = nn.MultiheadAttention(E, 2, 0.5, batch_first=True, dtype=torch.float64).eval()
    net = adapted(base)
    x = torch.randn(N, L, E, dtype=torch.float64)
    expected = functional_call(base, changed_weights(net), (x, x, x))
    with torch.inference_mode():
        close(net.eval()(x, x, x), expected)
        with disable_adapter(net):
            assert all(map(bit_equal, net(x, x, x), base(x, x, x)))
        unload(net)
        assert all(map(bit_equal, net(x, x, x), base(x, x, x)))
    assert type(net.mha) is type(base)


@pytest.mark.parametrize("target", ["self_attn", "out_proj"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_gives_the_same_in_eval_as_in_training(target, norm_first):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on nested tensors: not with norm_first; a prototype
        model = nn.TransformerEncoder(layer, 2)
        x = torch.randn(N, L, 8, dtype=torch.float64)
        padding = torch.tensor([[False] * 3 + [True], [False] * 4])
        base = copy.deepcopy(model).eval()
        inject_adapter(model, LoraConfig(r=2, target_modules=[target]))
        randomize(lora_tensors(model).values())
        y = model(x, src_key_padding_mask=padding)
        model.eval()
        for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            with context:
                again = model(x, src_key_padding_mask=padding)
                torch.testing.assert_close(again[~padding], y[~padding], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(y, base(x), atol=1e-2)
        unload(model)
        with torch.inference_mode():  # the fast path is open again, nested tensors and all
            ours, theirs = (m(x, src_key_padding_mask=padding) for m in (model, base))
            assert bit_equal(ours, theirs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder_layer(batch_first):
    layer = nn.TransformerDecoderLayer(
        8, 2, 16, dropout=0.0, batch_first=batch_first, dtype=torch.float64
    )
    model = copy.deepcopy(layer)
    inject_adapter(model, LoraConfig(r=2, target_modules=["self_attn", "multihead_attn"]))
    randomize(lora_tensors(model).values())
    weights = {}
    for name in ("self_attn", "multihead_attn"):
        net = Net(getattr(model, name))
        weights |= {
            f"{name}.{key}": weight for key, weight in changed_weights(net, scaling=4).items()
        }
    assert len(weights) == 4
    x, memory = (torch.randn(4, 4, 8, dtype=torch.float64) for _ in range(2))
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    given = {"tgt_mask": mask, "tgt_is_causal": True}
    for train in (True, False):
        ours = model.train(train)(x, memory, **given)
        theirs = functional_call(layer.train(train), weights, (x, memory), given)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_under_autocast_adapters_share_one_copy_of_the_input():
    net = adapted(attention().float(), exclude_modules=["out_proj"])
    inject_adapter(net, LoraConfig(r=1, target_modules=WHOLE, exclude_modules=["out_proj"]), "b")
    set_adapter(net, ["default", "b"])
    x = torch.randn(L, N, E)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        net(x, x, x)
    half = x.to(torch.bfloat16).flatten()
    copies = [t for t in kept if t.dtype == half.dtype and torch.equal(t.flatten(), half)]
    assert len(copies) == 2
    assert len({t.data_ptr() for t in copies}) == 1


@pytest.mark.parametrize("inputs", INPUTS[:4])
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(inputs, need_weights):
    for options in ({}, {"add_bias_kv": True, "batch_first": True}):
        base = attention(**options)
        made = call(base, inputs, "2d", need_weights=need_weights)
        base = base.float()
        distinct = {id(x): x.float() for x in made.inputs}
        args = [distinct[id(x)] for x in made.inputs]
        net = Net(copy.deepcopy(base))
        inject_adapter(net, LoraConfig(r=2, lora_alpha=5, target_modules=WHOLE))
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = net(*args, **made.options), base(*args, **made.options)
        for our, their in zip(ours, theirs, strict=True):
            assert our is their is None or (our.dtype == their.dtype and torch.equal(our, their))
        randomize(lora_tensors(net).values())
        exact = net(*args, **made.options)[0]
        with torch.autocast("cpu", torch.bfloat16):
            ours = net(*args, **made.options)[0]
        assert ours.dtype == torch.bfloat16
        assert 0 < (ours - exact).norm() < 0.03 * exact.norm()
        ours.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in lora_tensors(net).values())


@pytest.mark.slow
def test_compiles_to_one_graph_and_switches_without_another():
    base = attention(batch_first=True)
    net = adapted(base)
    inject_adapter(net, LoraConfig(r=1, target_modules=["out_proj"]), "second")
    randomize(lora_tensors(net).values())
    x, memory = torch.randn(2, N, L, E, dtype=torch.float64).unbind()
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def forward(q, k):
        own = net(q, q, q, attn_mask=mask)[0]
        return own + net(q, k, k, need_weights=False)[0]

    compiled = torch.compile(forward, fullgraph=True, backend=count)
    results = []
    for names in ([], "default", "second", ["default", "second"], "default"):
        set_adapter(net, names, trainable=False)
        results.append(forward(x, memory))
        torch.testing.assert_close(compiled(x, memory), results[-1])
    assert len(graphs) == 1
    assert bit_equal(results[1], results[-1])
    assert not any(torch.allclose(one, results[1], atol=1e-3) for one in results[:1] + results[2:4])
    set_adapter(net, "default")
    traced = torch.compile(forward, fullgraph=True, backend="aot_eager")
    traced(x, memory).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in lora_tensors(net).values())


# -- peft --------------------------------------------------------------------------------------


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(attention(batch_first=True)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.0.mha": 3}, "alpha_pattern": {"1.mha": 7}},
    ],
    ids=str,
)
def test_same_numbers_as_peft(options):
    """Except that peft 0.21.2 adds the update of out_proj twice, with the gradient of once.

    (huggingface/peft#3774: its `merge` writes W + delta, and then merges the Linear inside too.)
    Half of our B there makes peft the same function; its gradient of A then misses a factor of 2.
    """
    options = {"r": 2, "lora_alpha": 5, "target_modules": WHOLE, **options}
    ours = Tower()
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(**options))
    inject_adapter(ours, LoraConfig(**options))
    randomize(lora_tensors(ours).values(), 0.2)
    mine = lora_tensors(ours)
    pairs = []  # our tensor, theirs, by what peft's value and gradient are too small
    for key, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        path, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        owner = f"{path}.adapters.default.in_proj_weight"
        if path.endswith("out_proj"):
            owner = path.replace(".base_layer.out_proj", ".out_proj.adapters.default")
        our = mine.pop(f"{owner}.lora_{factor[0]}")
        assert our.shape == parameter.shape
        twice = path.endswith("out_proj")
        pairs.append(
            (our, parameter, 1 + (twice and factor[0] == "B"), 1 + (twice and factor[0] == "A"))
        )
    assert not mine
    assert len(pairs) == 8
    with torch.no_grad():
        for our, their, times, _ in pairs:
            their.copy_(our / times)
    x = torch.randn(N, L, E, dtype=torch.float64)
    outputs = [model(x) for model in (ours, theirs)]
    close(outputs[:1], outputs[1:])
    for y in outputs:
        (y / 100).square().sum().backward()
    close([our.grad for our, *_ in pairs], [their.grad * times for _, their, _, times in pairs])
    merge_adapter(ours)
    merged = theirs.merge_and_unload()
    for ours_layer, layer in zip(ours.layers, merged.layers, strict=True):
        for key in ("in_proj_weight", "out_proj.weight"):
            close([ours_layer.mha.get_parameter(key)], [layer.mha.get_parameter(key)])


def test_what_peft_cannot_do():
    options = {"r": 2, "target_modules": WHOLE}
    for mha, more in ((attention(kdim=7), {}), (attention(), {"use_dora": True})):
        with pytest.raises(ValueError, match="support"):
            peft.get_peft_model(Net(mha), peft.LoraConfig(**options, **more))
    theirs = peft.get_peft_model(
        Net(attention()), peft.LoraConfig(r=2, target_modules=["out_proj"])
    )
    x = torch.randn(L, N, E, dtype=torch.float64)
    before = theirs(x, x, x)[0]
    randomize(p for p in theirs.parameters() if p.requires_grad)
    assert bit_equal(theirs(x, x, x)[0], before)  # its adapter has no effect


# -- files and selection -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({}, {"rank_pattern": {"mha": 3}, "alpha_pattern": {"mha": 4}}),
        ({}, {"rank_pattern": {"mha": 3, "out_proj": 1}}),
        ({}, {"exclude_modules": ["out_proj"]}),
        ({}, {"target_modules": ["out_proj"]}),
        ({}, {"use_dora": True}),
        ({}, {"init_lora_weights": "pissa"}),
        ({"kdim": 7, "vdim": 10}, {"lora_bias": True}),
    ],
    ids=str,
)
def test_folders_hold_what_acts(options, lora, tmp_path):
    base = attention(**options)
    net = adapted(base, **lora)
    made = call(base, "distinct", "none")
    save_adapter(net, tmp_path)
    again = Net(copy.deepcopy(base))
    load_adapter(again, tmp_path)
    close(again(*made.inputs), net(*made.inputs))
    ranks = [p.shape[0] for key, p in lora_tensors(again).items() if key.endswith("lora_A")]
    if "pissa" not in lora.values():
        assert ranks == [p.shape[0] for k, p in lora_tensors(net).items() if k.endswith("lora_A")]
    if "rank_pattern" in lora:
        assert ranks == [lora["rank_pattern"].get("out_proj", 3), 3]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for_peft = not options and lora.keys().isdisjoint({"use_dora", "target_modules"})
    assert (config["peft_type"] == "LORA") == for_peft
    assert ("mha" in config["target_modules"]) == ("target_modules" not in lora)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_our_folder_computes_the_same_in_peft(dtype, tmp_path):
    """B of out_proj is written as half of what it is, and read as that, exactly."""
    net = adapted(attention())
    b = net.mha.out_proj.adapters["default"].lora_B
    with torch.no_grad():
        b[0, 0], b[1, 0] = torch.finfo(dtype).tiny, 3 * torch.finfo(dtype).smallest_normal / 1024
    if dtype == torch.float16:
        b.data = b.data.half()
    save_adapter(net, tmp_path)
    base = Net(attention())
    base.mha.load_state_dict(net.mha.state_dict(), strict=False)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert bit_equal(again.mha.out_proj.adapters["default"].lora_B, b.to(torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # on keys that are missing or too many
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    x = torch.randn(L, N, E, dtype=torch.float64)
    close(theirs(x, x, x), again(x, x, x))


def test_a_folder_of_peft_computes_the_same_here(tmp_path):
    base = Net(attention())
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=5, target_modules=WHOLE)
    )
    randomize((p for p in theirs.parameters() if p.requires_grad), 0.2)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(L, N, E, dtype=torch.float64)
    file = tmp_path / "adapter_config.json"
    options = json.loads(file.read_text())
    assert options["peft_version"] == "0.21.2"

    def computed(**changes):
        changed = options | changes
        if changed["peft_version"] is None:
            del changed["peft_version"]
        file.write_text(json.dumps(changed))
        ours = copy.deepcopy(base)
        load_adapter(ours, tmp_path)
        slot = copy.deepcopy(base)
        inject_adapter(slot, LoraConfig(r=2, lora_alpha=5, target_modules=WHOLE))
        hotswap_adapter(slot, tmp_path)
        y = ours(x, x, x)
        close(slot(x, x, x), y)
        return y

    wanted = theirs(x, x, x)
    for version in ("0.21.2", "0.7.0", "0.18", None):  # None: of before it said its version
        close(computed(peft_version=version), wanted)
    # The negative control: of a PEFT that has mended it, were this folder its.
    for version in ("0.21.3", "0.22.0.dev0", "1.0"):
        assert not torch.allclose(computed(peft_version=version)[0], wanted[0], atol=1e-4)


def test_folders_that_an_earlier_version_wrote(tmp_path):
    """They say no peft_version and not whom for, and have B as it is."""
    net = adapted(attention())
    save_adapter(net, tmp_path)
    file = tmp_path / "adapter_config.json"
    options = json.loads(file.read_text())
    for later in ("peft_version", "task_type", "auto_mapping"):
        del options[later]
    file.write_text(json.dumps(options))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in tensors:
        if "out_proj.lora_B" in key:
            tensors[key] *= 2
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    again = Net(attention())
    again.mha.load_state_dict(net.mha.state_dict(), strict=False)
    load_adapter(again, tmp_path)
    x = torch.randn(L, N, E, dtype=torch.float64)
    assert bit_equal(again(x, x, x)[0], net(x, x, x)[0])


def test_attentions_of_a_selection():
    base = attention()
    net = Net(copy.deepcopy(base))
    assert list(inject_adapter(net, LoraConfig(r=1)).targets) == ["mha.out_proj"]  # all-linear
    unload(net)
    both = LoraConfig(r=1, target_modules=["mha", "out_proj"], rank_pattern={"mha": 3})
    assert list(inject_adapter(net, both).targets) == ["mha", "mha.out_proj"]
    shapes = [tuple(p.shape) for key, p in lora_tensors(net).items() if key.endswith("lora_A")]
    assert shapes == [(1, E), (3, E)]  # each named by itself has a rank by itself
    unload(net)
    alone = copy.deepcopy(base)  # the model itself is the attention
    inject_adapter(alone, LoraConfig(r=2, target_modules=["out_proj"]))
    randomize(p for p in alone.parameters() if p.requires_grad)
    x = torch.randn(L, N, E, dtype=torch.float64)
    assert not torch.allclose(alone(x, x, x)[0], base(x, x, x)[0], atol=1e-2)
    unload(alone)
    assert type(alone) is nn.MultiheadAttention
    for model in (OwnForward(E, HEADS), Net(OwnForward(E, HEADS))):
        with pytest.raises(TargetError, match="has a forward of its own"):
            inject_adapter(model, LoraConfig(r=2, target_modules=["out_proj"]))


def test_combining_adapters_of_the_input_projections_alone():
    base = attention()
    net = adapted(base, exclude_modules=["out_proj"])
    add_weighted_adapter(net, ["default"], [2.0], "twofold", "cat")
    set_adapter(net, "twofold")
    x = torch.randn(L, N, E, dtype=torch.float64)
    close(net(x, x, x), functional_call(base, changed_weights(net, scaling=5.0), (x, x, x)))
    assert type(net.mha.out_proj) is type(base.out_proj)


# -- refusals ----------------------------------------------------------------------------------


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize("target", ["mha", "out_proj"])
def test_a_forward_of_its_own_is_refused(target):
    patched = attention()
    patched.forward = lambda *args: args
    for mha, reason in (
        (OwnForward(E, HEADS), "OwnForward has a forward of its own"),
        (torch.ao.nn.quantizable.MultiheadAttention(E, HEADS), "has a forward of its own"),
        (patched, "its forward was replaced on the instance"),
    ):
        net = Net(mha)
        net.lin = nn.Linear(4, 4)
        with pytest.raises(TargetError, match=reason) as caught:
            inject_adapter(net, LoraConfig(r=2, target_modules=[target]))
        assert f"target_modules selects 'mha{'' if target == 'mha' else '.out_proj'}'" in str(
            caught.value
        )
        assert "(lora.target_modules)" in str(caught.value)
        assert type(net.mha) is type(mha)
        assert not any(isinstance(m, AdaptedLayer) for m in net.modules())
        selection = inject_adapter(net, LoraConfig(r=2, modules_to_save=["mha"]))
        assert "lin" in selection.targets
        assert list(selection.saved) == ["mha"]


def test_the_packed_weight_as_a_parameter_and_other_attributes_in_the_way_are_refused():
    net = Net(attention())
    config = LoraConfig(r=1, target_modules=[], target_parameters=["mha.in_proj_weight"])
    with pytest.raises(TargetError, match="belongs to an attention, which target_modules adapts"):
        inject_adapter(net, config)
    net.mha.adapters = None
    with pytest.raises(TargetError, match="already has an attribute `adapters` of its own"):
        inject_adapter(net, LoraConfig(r=1, target_modules=["out_proj"]))
    assert type(net.mha) is nn.MultiheadAttention


def test_inputs_that_do_not_fit_are_refused_as_by_torch():
    base = attention()
    net = adapted(base)
    x, y = torch.randn(L, N, E, dtype=torch.float64), torch.randn(S, N, E, dtype=torch.float64)
    for args, given in (
        ((x, x[:, 0], x), {}),
        ((x, y, x), {}),
        ((x, y[:, :1], y[:, :1]), {}),
        ((x, y, y), {"attn_mask": torch.zeros(S, L, dtype=torch.bool)}),
        ((x, y, y), {"attn_mask": torch.zeros(N, L, S, dtype=torch.bool)}),
        ((x, y, y), {"key_padding_mask": torch.zeros(S, N, dtype=torch.bool)}),
        ((x, x, x), {"is_causal": True}),
    ):
        for need_weights in (True, False):
            for model in (base, net):
                with pytest.raises((RuntimeError, AssertionError, ValueError)):
                    model(*args, need_weights=need_weights, **given)


def test_nested_tensors_are_refused():
    net = adapted(attention(batch_first=True)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        x = torch.nested.nested_tensor([torch.randn(n, E, dtype=torch.float64) for n in (2, 3)])
    with pytest.raises(AdapterStateError, match="reads the weights past their adapters"):
        net(x, x, x)


def test_states_are_those_of_the_adapter_alone():
    net = adapted(attention())
    assert {key: tuple(t.shape) for key, t in adapter_state_dict(net).items()} == {
        "mha.in_proj_weight.lora_A": (2, E),
        "mha.in_proj_weight.lora_B": (3 * E, 2),
        "mha.out_proj.lora_A": (2, E),
        "mha.out_proj.lora_B": (E, 2),
    }
