"""Quantised Linears carry adapters: bitsandbytes NF4, FP4 and 8-bit, torchao int8. All on the CPU."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning import (
    LoraConfig,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.checkpoint.fingerprint import base_fingerprint, fingerprint_difference
from lora_lightning.engine.switching import set_trainable
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers import linear
from lora_lightning.layers.fused_lora import add_lora
from lora_lightning.layers.quantized.base import AdaptedBitsandbytesLinear, AdaptedQuantizedLinear
from tests.helpers.quantized import assert_same_bits, loaded, parts, same_bits

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at every call what it rounds

IN, OUT = 128, 64


def linear4bit(quant_type: str, double: bool, **options: Any) -> nn.Module:
    plain = nn.Linear(IN, OUT)
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type=quant_type, compress_statistics=double, **options)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def linear8bit(threshold: float = 0.0, fp16: bool = False) -> nn.Module:
    plain = nn.Linear(IN, OUT)
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=fp16, threshold=threshold)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def linear_torchao(granularity: Any) -> nn.Module:
    layer = nn.Linear(IN, OUT)
    config = torchao.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    torchao.quantize_(layer, config)
    return layer


KINDS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: linear4bit("nf4", False),
    "nf4-double": lambda: linear4bit("nf4", True),
    "fp4": lambda: linear4bit("fp4", False),
    "fp4-double-bf16": lambda: linear4bit("fp4", True, quant_storage=torch.bfloat16),
    "int8": linear8bit,
    "int8-outliers": lambda: linear8bit(threshold=3.0),
    "torchao-row": lambda: linear_torchao(torchao.PerRow()),
    "torchao-group": lambda: linear_torchao(torchao.PerGroup(32)),
    "torchao-tensor": lambda: linear_torchao(torchao.PerTensor()),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def net(kind: str) -> nn.Sequential:
    return nn.Sequential(KINDS[kind]())


def adapted(kind: str, **options: Any) -> nn.Sequential:
    """One quantised Linear with an adapter that does something."""
    model = net(kind)
    inject_adapter(model, LoraConfig(r=4, **{"init_lora_weights": False, **options}))
    return model


def formula(layer: Any, scales: Tensor | None = None) -> Tensor:
    """The weight by the definition of its format, in float64; 4 bits also with other scales."""
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    if hasattr(weight, "qdata"):
        rows, groups = weight.scale.shape  # each stands for a block of the weight
        blocks = weight.qdata.double().view(rows, shape[0] // rows, groups, shape[1] // groups)
        return (blocks * weight.scale.double().view(rows, 1, groups, 1)).reshape(shape)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scale.double()[:, None] / 127
    state = weight.quant_state
    packed = weight.data.view(torch.uint8).flatten()
    indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    if scales is None and state.nested:
        inner, count = state.state2, state.absmax.numel()
        outer = inner.absmax.double().repeat_interleave(inner.blocksize)[:count]
        scales = inner.code.double()[state.absmax.long()] * outer + state.offset.double()
    scales = (state.absmax if scales is None else scales).double().repeat_interleave(64)
    return (state.code.double()[indices] * scales).view(shape)


def test_the_module_stays_itself(kind: str) -> None:
    model = net(kind)
    layer = model[0]
    before, weight, keys = parts(layer), layer.weight, list(model.state_dict())
    cls = type(layer)
    inject_adapter(model, LoraConfig(r=4))
    assert isinstance(layer, cls)
    assert isinstance(layer, AdaptedQuantizedLinear)
    assert isinstance(layer, AdaptedBitsandbytesLinear) == ("torchao" not in kind)
    assert layer.weight is weight
    assert [key for key in model.state_dict() if "adapters" not in key] == keys
    assert_same_bits(parts(layer), before)
    assert layer.adapters["default"].lora_A.shape == (4, IN)
    assert layer.adapters["default"].lora_B.shape == (OUT, 4)
    delete_adapter(model, "default")
    assert type(layer) is cls
    assert_same_bits(parts(layer), before)


def test_dense_weight_is_that_of_the_format(kind: str) -> None:
    layer = adapted(kind)[0]
    dense = layer.dense_weight()
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), formula(layer), atol=1e-6, rtol=1e-6)
    layer(torch.randn(2, IN))  # after which 8 bits lie elsewhere
    torch.testing.assert_close(layer.dense_weight(), dense, atol=0, rtol=0)


def test_starts_as_a_no_op(kind: str) -> None:
    model, x = net(kind), torch.randn(3, 5, IN)
    y = model(x)
    inject_adapter(model, LoraConfig(r=4))
    assert torch.equal(model(x), y)


def test_output_and_gradients_are_those_of_the_dense_formula(kind: str) -> None:
    model = adapted(kind, lora_alpha=6)
    layer = model[0]
    adapter = layer.adapters["default"]
    x = torch.randn(3, 5, IN, requires_grad=True)
    y = model(x)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B], grad)

    a, b = (t.detach().double().requires_grad_() for t in (adapter.lora_A, adapter.lora_B))
    z = x.detach().double().requires_grad_()
    wanted_y = F.linear(z, formula(layer) + 1.5 * b @ a, layer.bias.double())
    wanted = torch.autograd.grad(wanted_y, [z, a, b], grad.double())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), wanted_y, atol=1e-5, rtol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["nf4-double", "fp4", "int8", "int8-outliers"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_added_in_place_as_the_plain_expression(
    name: str, mode: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters, and an activation that writes into their sum."""
    model = adapted(name, lora_dropout=dropout)
    inject_adapter(model, LoraConfig(r=2, init_lora_weights=False), "second")
    set_adapter(model, ["default", "second"])
    set_trainable(model, "second", True)
    model.append(nn.ReLU(inplace=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    x = torch.randn(3, 5, IN, dtype=torch.bfloat16 if mode == "bf16" else torch.float32)
    x.requires_grad_()
    outputs = []

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *trained])]

    def spy(x: Tensor, y: Tensor, *args: Any, **options: Any) -> Tensor:
        outputs.append((y, add_lora(x, y, *args, **options)))
        return outputs[-1][1]

    monkeypatch.setattr(linear, "add_lora", spy)
    found = run()
    ((y, total),) = outputs
    assert y.data_ptr() == total.data_ptr()  # no copy of the output
    monkeypatch.setattr(linear, "lora_terms", lambda chain: None)
    expected = run()
    assert len(outputs) == 1
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        error = (one - other).float().norm() / other.float().norm()
        assert error < (1e-6 if mode == "fp32" else 1e-2)  # of a bf16 number 8 bits


def requantised(layer: Any, dense: Tensor) -> list[Tensor]:
    """`dense` in the format of `layer`, by the library's own functions."""
    weight = layer.weight
    if hasattr(weight, "qdata"):
        scale_shape = weight.scale.shape
        granularity = (
            torchao.PerTensor() if scale_shape[0] == 1 else torchao.PerGroup(IN // scale_shape[1])
        )
        made = type(weight).from_hp(dense, granularity)
        return [made.qdata, made.scale, made.zero_point]
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return list(bnb.functional.int8_vectorwise_quant(dense.half())[:2])
    data, state = bnb.functional.quantize_4bit(
        dense,
        blocksize=64,
        compress_statistics=weight.quant_state.nested,
        quant_type=weight.quant_state.quant_type,
        quant_storage=weight.dtype,
    )
    return [data, state.absmax, *((state.offset, state.state2.absmax) if state.nested else ())]


def held(layer: Any) -> list[Tensor]:
    """What `requantised` gives, as the layer has it."""
    weight = layer.weight
    if hasattr(weight, "qdata"):
        return [weight.qdata, weight.scale, weight.zero_point]
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return [weight.data, layer.state.SCB if weight.SCB is None else weight.SCB]
    state = weight.quant_state
    assert state is layer.quant_state
    return [
        weight.data,
        state.absmax,
        *((state.offset, state.state2.absmax) if state.nested else ()),
    ]


@pytest.mark.parametrize("forward_first", [False, True])
def test_merged_weight_is_the_requantised_sum(kind: str, forward_first: bool) -> None:
    model, x = adapted(kind), torch.randn(7, IN)
    layer = model[0]
    if forward_first:
        model(x)
    dense = layer.dense_weight() + layer.adapters["default"].delta_weight().detach()
    wanted = requantised(layer, dense)
    merge_adapter(model)
    for one, other in zip(held(layer), wanted, strict=True):
        assert same_bits(one, other)
    merged = F.linear(x.double(), formula(layer), layer.bias.double())
    torch.testing.assert_close(model(x).double(), merged, atol=1e-5, rtol=1e-5)
    error = (formula(layer) - dense).norm() / dense.norm()
    assert error < (0.02 if "int8" in kind or "torchao" in kind else 0.15)


def test_unmerging_restores_every_bit_ten_times(kind: str) -> None:
    model, x = adapted(kind), torch.randn(7, IN)
    layer = model[0]
    before, weight, y = parts(layer), layer.weight, model(x)
    base, fingerprint = layer.dense_weight(), base_fingerprint(model)
    for _ in range(10):
        merge_adapter(model)
        assert not same_bits(held(layer)[0], before.get("weight", before.get("weight.qdata")))
        assert torch.equal(layer.base_weight(), base)
        assert base_fingerprint(model) == fingerprint
        model(x)
        unmerge_adapter(model)
        assert_same_bits(parts(layer), before)
        assert torch.equal(model(x), y)
    assert layer.weight is weight


def test_two_adapters_merge_as_one_sum(kind: str) -> None:
    model = adapted(kind)
    inject_adapter(model, LoraConfig(r=2, init_lora_weights=False), "second")
    layer = model[0]
    layer.active_adapters = ["default", "second"]
    dense = layer.dense_weight()
    for name in ("default", "second"):
        dense = dense + layer.adapters[name].delta_weight().detach()
    merge_adapter(model, "default")
    merge_adapter(model, "second")  # from the base again: rounded once, not twice
    assert same_bits(held(layer)[0], requantised(layer, dense)[0])


def test_merge_and_unload_leaves_a_plain_quantised_layer(kind: str) -> None:
    model, x = adapted(kind), torch.randn(7, IN)
    cls = model[0].base_type
    merge_adapter(model)
    y = model(x)
    unmerge_adapter(model)
    merge_and_unload(model)
    assert type(model[0]) is cls
    assert torch.equal(model(x), y)
    assert not any("adapters" in key for key in model.state_dict())


@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_independent(kind: str, merged: bool) -> None:
    model, x = adapted(kind), torch.randn(7, IN)
    before = parts(model[0])
    if merged:
        merge_adapter(model)
    y = model(x)
    duplicates = [copy.deepcopy(model)]
    if "torchao" not in kind:  # whose layers cannot be pickled, with or without adapters
        duplicates.append(pickle.loads(pickle.dumps(model)))
    for duplicate in duplicates:
        assert torch.equal(duplicate(x), y)
        unmerge_adapter(duplicate)
        assert_same_bits(parts(duplicate[0]), before)
        merge_adapter(duplicate)
        assert torch.equal(model(x), y)


def test_a_cast_of_the_model_leaves_weight_and_adapters_alone(kind: str) -> None:
    model, x = adapted(kind), torch.randn(7, IN)
    wanted = model(x)
    before = held(model[0])
    model.to(torch.bfloat16)
    layer = model[0]
    assert layer.bias.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in layer.adapters.parameters())
    for one, other in zip(held(layer), before, strict=True):
        assert same_bits(one, other)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, atol=0.05, rtol=0.05)


def test_under_autocast_the_base_answers_as_alone(kind: str) -> None:
    model, x = adapted(kind), torch.randn(3, 5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        alone = net(kind)(x).dtype
        y = model(x)
        with disable_adapter(model):
            base = model(x)
    assert y.dtype == base.dtype == alone
    delta = model[0].adapters["default"].delta_weight()
    torch.testing.assert_close((y - base).float(), F.linear(x, delta), atol=0.05, rtol=0.05)
    y.sum().backward()
    assert model[0].adapters["default"].lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_a_bias_keeps_its_dtype_where_maths_run_in_another(name: str) -> None:
    layer, x = KINDS[name](), torch.randn(3, 5, IN)
    if name != "int8":
        layer.compute_dtype, layer.compute_type_is_set = torch.bfloat16, True
    else:
        x = x.bfloat16()
    model, alone = nn.Sequential(layer), copy.deepcopy(layer)
    inject_adapter(model, LoraConfig(r=4, bias="lora_only"))
    bias = layer.bias.detach().clone()
    y = model(x)
    assert torch.equal(y, alone(x))
    assert alone.bias.dtype == torch.bfloat16  # which is what bitsandbytes does on its own
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, bias)
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((OUT,), 15.0))


# -- what bitsandbytes does to a weight on the CPU ---------------------------------------------


def three_layers(double: bool, out: int = OUT) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for width in (IN, out, out):
        plain = nn.Linear(width, out)
        layer = bnb.nn.Linear4bit(width, out, quant_type="nf4", compress_statistics=double)
        layer.load_state_dict(plain.state_dict())
        layer.support_avx512bf16_for_cpu = True  # as on a CPU that has it
        layers.append(layer.to("cpu"))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("out", [OUT, 48])  # the packing fails where out is no multiple of 32
def test_validation_does_not_cut_the_gradients(out: int) -> None:
    def gradient(validate: bool) -> Tensor:
        model = three_layers(True, out)
        inject_adapter(model, LoraConfig(r=4, target_modules=["0"]), seed=0)
        nn.init.ones_(model[0].adapters["default"].lora_B)
        if validate:
            model.eval()
            with torch.no_grad():
                model(torch.ones(2, IN))
            model.train()
        model(torch.linspace(-1, 1, IN)[None]).square().sum().backward()
        return model[0].adapters["default"].lora_A.grad

    assert torch.equal(gradient(True), gradient(False))
    assert gradient(True).abs().sum() > 0


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_that_was_packed_for_inference_is_unpacked(double: bool) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = three_layers(double)
    codes = [layer.weight.data.clone() for layer in model]
    values = [formula(layer) for layer in model]
    scales = []
    for layer in model:
        packed, state = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        layer.weight.data = packed
        scales.append(state.absmax.t().flatten())  # rounded to bfloat16, 8 bits of mantissa
    inject_adapter(model, LoraConfig(r=4, target_modules=["0"]))
    for layer, code, value, scale in zip(model, codes, values, scales, strict=True):
        assert torch.equal(layer.weight.data, code)
        assert torch.equal(formula(layer), formula(layer, scale))
        torch.testing.assert_close(formula(layer), value, atol=0, rtol=2**-8)
    model.eval()
    x = torch.randn(2, IN)
    wanted = F.linear(x.double(), formula(model[0]), model[0].bias.double())
    torch.testing.assert_close(model[0](x).double(), wanted, atol=1e-5, rtol=1e-5)
    delete_adapter(model, "default")
    assert all(layer.support_avx512bf16_for_cpu for layer in model)


def test_a_weight_that_is_not_rounded_yet() -> None:
    """Lightning's plugin and hand-made models hold it dense until the first `.to(device)`."""
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4")
    model = nn.Sequential(layer)
    inject_adapter(model, LoraConfig(r=4, init_lora_weights=False))
    assert torch.equal(layer.dense_weight(), layer.weight.data)
    assert layer.adapters["default"].lora_A.shape == (4, IN)
    model.to("cpu")
    assert layer.weight.quant_state is not None
    torch.testing.assert_close(layer.dense_weight().double(), formula(layer))
    delta = layer.adapters["default"].delta_weight().double()
    x = torch.randn(2, IN)
    wanted = F.linear(x.double(), formula(layer) + delta, layer.bias.double())
    torch.testing.assert_close(model(x).double(), wanted, atol=1e-5, rtol=1e-5)


def test_eight_bit_forward_sees_a_floating_weight_change() -> None:
    """With `has_fp16_weights` eval keeps the rounded weight: merging has to make it forget."""
    model = nn.Sequential(linear8bit(fp16=True)).eval()
    inject_adapter(model, LoraConfig(r=4, init_lora_weights=False))
    x = torch.randn(2, IN)
    with disable_adapter(model):
        base = model(x)
    adapted_output = model(x)
    merge_adapter(model)
    torch.testing.assert_close(model(x), adapted_output, atol=0.05, rtol=0.05)
    unmerge_adapter(model)
    with disable_adapter(model):
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("double", [False, True])
def test_merging_keeps_block_size_and_dtype(double: bool) -> None:
    layer = bnb.nn.Linear4bit(IN, OUT)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(OUT, IN, dtype=torch.bfloat16),
        blocksize=128,
        compress_statistics=double,
        quant_type="nf4",
        module=layer,
    )
    model = nn.Sequential(layer.to("cpu"))
    inject_adapter(model, LoraConfig(r=4, init_lora_weights=False))
    before = layer.quant_state
    merge_adapter(model)
    after = layer.quant_state
    assert after is not before
    for name in ("blocksize", "dtype", "nested", "quant_type", "shape"):
        assert getattr(after, name) == getattr(before, name)
    assert after.absmax.shape == before.absmax.shape == (OUT * IN // 128,)
    unmerge_adapter(model)
    assert layer.quant_state is before


def test_values_beyond_float16_are_not_merged_into_eight_bits() -> None:
    model = adapted("int8")
    before = parts(model[0])
    nn.init.constant_(model[0].adapters["default"].lora_B, 1e6)
    with pytest.raises(AdapterStateError, match="beyond float16"):
        merge_adapter(model)
    assert_same_bits(parts(model[0]), before)
    assert model[0].merged_adapters == []


# -- other adapters, other starts --------------------------------------------------------------


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_read_the_base_start_as_a_no_op(kind: str, options: dict) -> None:
    model, x = net(kind), torch.randn(3, IN)
    before, y = parts(model[0]), model(x)
    inject_adapter(model, LoraConfig(r=4, **options))
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    assert_same_bits(parts(model[0]), before)


# -- peft, transformers, torch.compile ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass")
@pytest.mark.parametrize(
    "name", ["nf4", "nf4-double", "fp4", "int8", "torchao-row", "torchao-group"]
)
def test_peft_computes_the_same(name: str) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    ours = adapted(name, lora_alpha=6)
    theirs = copy.deepcopy(ours)
    delete_adapter(theirs, "default")
    theirs.is_loaded_in_4bit = "4" in name  # what peft tells them by
    theirs.is_loaded_in_8bit = name == "int8"
    theirs = get_peft_model(theirs, PeftConfig(r=4, lora_alpha=6, target_modules=["0"]))
    adapter, other = ours[0].adapters["default"], theirs.base_model.model[0]
    with torch.no_grad():
        other.lora_A["default"].weight.copy_(adapter.lora_A)
        other.lora_B["default"].weight.copy_(adapter.lora_B)
    x, z = (torch.linspace(-2, 2, 2 * IN).view(2, IN).requires_grad_() for _ in range(2))
    y, wanted = ours(x), theirs(z)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for one, two in (
        (x.grad, z.grad),
        (adapter.lora_A.grad, other.lora_A["default"].weight.grad),
        (adapter.lora_B.grad, other.lora_B["default"].weight.grad),
    ):
        torch.testing.assert_close(one, two, atol=1e-5 * two.abs().max().item(), rtol=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, vocab_size=50)
    folder = str(tmp_path_factory.mktemp("llama"))
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("method", ["nf4", "int8", "torchao"])
def test_a_quantised_model_of_transformers_trains(llama: str, method: str) -> None:
    model = loaded(llama, method)
    selection = inject_adapter(model, LoraConfig(r=4))
    assert len(selection.targets) == 14
    assert selection.left_out == ["lm_head"]
    assert all(isinstance(m, AdaptedQuantizedLinear) for m in selection.targets.values())
    assert type(model.lm_head) is nn.Linear
    fingerprint = base_fingerprint(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(0, 50, (4, 9))
    losses = []
    for _ in range(6):
        model.eval()
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
        model.train()
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    assert base_fingerprint(model) == fingerprint
    assert base_fingerprint(loaded(llama, method)) == fingerprint


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Int8Tensor does not implement _stable_hash_for_caching")
@pytest.mark.parametrize(
    ("name", "options"),
    [("nf4-double", {}), ("nf4-double", {"use_dora": True}), ("int8", {}), ("torchao-row", {})],
)
def test_compiles_into_one_graph(name: str, options: dict) -> None:
    torch._dynamo.reset()
    model = adapted(name, **options)
    model[0].bias.data = model[0].bias.data.double()  # which has to be cast on the way
    x = torch.randn(3, IN, requires_grad=True)
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [x, model[0].adapters["default"].lora_A])
    compiled, bias = torch.compile(model, fullgraph=True, backend="aot_eager"), model[0].bias
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        z = compiled(x)
    assert model[0].bias is bias
    torch.testing.assert_close(z, y, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(z.square().sum(), [x, model[0].adapters["default"].lora_A])
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


# -- told apart, or refused --------------------------------------------------------------------


def test_fingerprint_sees_the_scales(kind: str) -> None:
    model = net(kind)
    before = base_fingerprint(model)
    weight = model[0].weight
    if hasattr(weight, "qdata"):
        weight.scale.mul_(2)
    elif "int8" in kind:
        weight.SCB.mul_(2)
    elif weight.quant_state.nested:
        weight.quant_state.state2.absmax.mul_(2)
    else:
        weight.quant_state.absmax.mul_(2)
    assert base_fingerprint(model) != before


def test_torchao_weights_that_cannot_carry_adapters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    config = torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    torchao.quantize_(model, config)
    with pytest.raises(TargetError, match=r"'0' \(Linear\) rounds or scales its activations"):
        inject_adapter(model, LoraConfig(r=4))
    assert type(model[0]) is nn.Linear

    model = nn.Sequential(nn.Linear(IN, OUT))
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)))
    with pytest.raises(TargetError, match="IntxUnpackedToInt8Tensor"):
        inject_adapter(model, LoraConfig(r=4))


def test_a_quantised_weight_does_not_train_in_full(kind: str) -> None:
    model = nn.Sequential(nn.Sequential(KINDS[kind]()), nn.Linear(OUT, 3))
    for saved in ("0", "0.0"):
        config = LoraConfig(r=2, target_modules=["1"], modules_to_save=[saved])
        with pytest.raises(TargetError, match=r"cannot train in full.*\(lora.modules_to_save\)"):
            inject_adapter(model, config)
    assert type(model[1]) is nn.Linear


def test_quantised_embeddings_are_refused() -> None:
    tables = [bnb.nn.Embedding4bit(10, 64), bnb.nn.Embedding8bit(10, 64), nn.Embedding(10, 64)]
    config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    torchao.quantize_(tables[2], config, filter_fn=lambda module, name: True)
    for table in tables:
        with pytest.raises(
            TargetError, match="has a quantised weight, which can carry adapters in"
        ):
            inject_adapter(nn.Sequential(table), LoraConfig(r=2, target_modules=["0"]))


def test_fingerprint_reads_quantised_weights_that_carry_no_adapter() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 32))
    config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    torchao.quantize_(model[0], config, filter_fn=lambda module, name: True)
    torchao.quantize_(model[1], torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)))
    before = base_fingerprint(model)
    assert {"0.weight.scale", "1.weight.scale"} < before.keys()
    model[1].weight.scale.mul_(2)
    assert fingerprint_difference(before, base_fingerprint(model)) == [
        "1.weight.scale: other values"
    ]
