"""Every adapter type on every kind of module, against peft or an explicit dense formula.

One table says what is compared with what; to extend it, add a row, a column or a letter.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lightning
from lora_lightning import (
    adapter_state_dict,
    disable_adapter,
    inject_adapter,
    load_adapter,
    load_adapter_state_dict,
    merge_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.checkpoint.peft.keys import tensors_to_load
from tests.helpers.tensors import bit_equal, randomize

# p: the same as peft 0.21.2; f: in float32, as peft knows no other dtype there.
# g: as p, but for gradients that peft has wrong (it fails gradcheck).
# d: peft cannot or is wrong; compared with a dense formula.
# o: peft has nothing there (its MultiheadAttention adds out_proj's update twice); here forward against merged, in the type's own tests against formulas.
# q: as p in float32 on a quantised base; what is merged there stands in test_quantized_hosts.
# n: as o in float32 on a quantised base.
# -: not defined there; refused with an error (test_refused).
TABLE = """
               linear   nobias   conv1D    embed   conv1d   conv2d   conv3d      1x1  grouped  dilated circular      nf4     int8  torchao      mha
lora                p        p        p        p        p        p        p        p        p        d        d        q        q        q        o
lora_bias           p        -        p        -        p        p        p        p        p        d        d        q        q        n        o
rslora              p        p        p        p        p        p        p        p        p        d        d        q        q        q        o
dora                p        p        p        p        p        p        p        p        -        d        d        q        n        n        o
pissa               f        f        f        -        -        -        -        -        -        -        -        n        n        n        o
olora               f        f        d        -        -        -        -        -        -        -        -        n        n        n        o
adalora             p        p        p        -        o        p        o        p        o        p        o        q        q        n        o
loha                p        p        o        -        p        p        o        p        p        p        o        n        n        n        o
loha_cp             p        p        o        -        g        g        o        p        g        g        o        n        n        n        o
lokr                p        p        o        -        p        p        o        p        p        p        o        n        n        n        o
lokr_cp             p        p        o        -        o        p        o        p        p        p        o        n        n        n        o
oft                 p        p        o        p        o        o        o        p        -        o        o        q        q        n        o
shira               p        p        o        -        -        -        -        -        -        -        -        n        n        n        o
ia3                 p        p        p        -        o        p        p        p        p        p        o        q        q        n        o
ia3_inputs          p        p        p        -        o        p        p        p        p        p        o        q        q        n        o
vera                p        p        p        -        -        -        -        -        -        -        -        q        q        n        o
"""

# Type in the table: (config class, options).
TYPES = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "lora_bias": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "pissa": ("LoraConfig", {"r": 2, "lora_alpha": 6, "init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"r": 2, "lora_alpha": 6, "init_lora_weights": "olora"}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}),
    "loha": ("LohaConfig", {"r": 4, "alpha": 8}),
    "loha_cp": ("LohaConfig", {"r": 4, "alpha": 8, "use_effective_conv2d": True}),
    "lokr": ("LokrConfig", {"r": 4, "alpha": 8}),
    "lokr_cp": (
        "LokrConfig",
        {"r": 1, "alpha": 8, "use_effective_conv2d": True, "decompose_both": True},
    ),
    "oft": ("OftConfig", {"oft_block_size": 2}),
    "shira": ("ShiraConfig", {"r": 2}),
    "ia3": ("Ia3Config", {"feedforward_modules": []}),
    "ia3_inputs": ("Ia3Config", {"feedforward_modules": ["proj"]}),
    "vera": ("VeraConfig", {"r": 4}),
}
PEFT_CLASSES = {
    "LohaConfig": "LoHaConfig",
    "LokrConfig": "LoKrConfig",
    "OftConfig": "OFTConfig",
    "Ia3Config": "IA3Config",
}

# Kind in the table: (how the module is made, an input for it).
KINDS = {
    "linear": (lambda: nn.Linear(6, 8), (4, 5, 6)),
    "nobias": (lambda: nn.Linear(6, 8, bias=False), (4, 5, 6)),
    "conv1D": (lambda: Conv1D(8, 6), (4, 5, 6)),
    "embed": (lambda: nn.Embedding(9, 8), None),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, stride=2), (4, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=(1, 0), stride=(2, 1)), (4, 6, 7, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), (4, 6, 3, 4, 3)),
    "1x1": (lambda: nn.Conv2d(6, 8, 1), (4, 6, 3, 3)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (4, 6, 5, 5)),
    "dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2, padding="same"), (4, 6, 7, 7)),
    "circular": (lambda: nn.Conv1d(6, 8, 3, padding=2, padding_mode="circular"), (4, 6, 9)),
    "nf4": (lambda: bitsandbytes_linear("Linear4bit", quant_type="nf4"), (4, 5, 64)),
    "int8": (lambda: bitsandbytes_linear("Linear8bitLt", has_fp16_weights=False), (4, 5, 64)),
    "torchao": (lambda: torchao_linear(), (4, 5, 64)),
    "mha": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (4, 5, 8)),
}
QUANTISED = ("nf4", "int8", "torchao")


def bitsandbytes_linear(name: str, **options) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = getattr(bitsandbytes.nn, name)(64, 32, **options)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    return layer.to("cpu")


def torchao_linear() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Linear(64, 32)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


def cells(letter: str) -> list:
    header, *rows = [line.split() for line in TABLE.strip().splitlines()]
    return [
        pytest.param(name, kind, id=f"{name}-{kind}")
        for name, *letters in rows
        for kind, found in zip(header, letters, strict=True)
        if found == letter
    ]


class Net(nn.Module):
    """The module under test with something below and above it that gradients pass through."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1), requires_grad=True)
        self.proj = KINDS[kind][0]()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift if x.is_floating_point() else x
        if isinstance(self.proj, nn.MultiheadAttention):
            return torch.tanh(self.proj(x, x, x)[0])
        return torch.tanh(self.proj(x))


def net(kind: str, dtype: torch.dtype) -> Net:
    return Net(kind) if kind in QUANTISED else Net(kind).to(dtype)


def assert_base_untouched(model: nn.Module, base: nn.Module) -> None:
    found = model.state_dict()
    for key, tensor in base.state_dict().items():
        assert bit_equal(found[key], tensor), key


def example(kind: str, dtype: torch.dtype) -> Tensor:
    shape = KINDS[kind][1]
    return torch.randint(0, 9, (4, 5)) if shape is None else torch.randn(shape, dtype=dtype)


def options(name: str) -> dict:
    return {"target_modules": ["proj"], **TYPES[name][1]}


def adapted_by_us(base: nn.Module, name: str) -> nn.Module:
    config = getattr(lora_lightning, TYPES[name][0])(**options(name))
    model = copy.deepcopy(base)
    inject_adapter(model, config)
    return model


def adapted_by_peft(base: nn.Module, name: str) -> peft.PeftModel:
    ours = TYPES[name][0]
    config = getattr(peft, PEFT_CLASSES.get(ours, ours))(**options(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out for Conv1D, groups that cannot be merged
        return peft.get_peft_model(told(base), config)


def save_with_peft(model: peft.PeftModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embedding layers "auto", "invalid shape" of a bias
        model.save_pretrained(folder, save_embedding_layers=False)


def load_with_peft(base: nn.Module, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(told(base), folder, is_trainable=True)


def told(base: nn.Module) -> nn.Module:
    """A copy that says what peft knows quantised models by."""
    result = copy.deepcopy(base)
    result.is_loaded_in_4bit = type(base.proj).__name__ == "Linear4bit"
    result.is_loaded_in_8bit = type(base.proj).__name__ == "Linear8bitLt"
    return result


def gradients(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Gradient of every tensor of the adapter by its key in PEFT's files."""
    model.zero_grad()
    model(x).square().sum().backward()
    by_place = {p.data_ptr(): p for p in model.parameters() if p.grad is not None}
    return {k: by_place[t.data_ptr()].grad for k, t in state.items() if t.data_ptr() in by_place}


def close(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def shake_peft(model: peft.PeftModel) -> None:
    randomize(
        [
            p
            for key, p in model.named_parameters()
            if ".default" in key and p.requires_grad and "ranknum" not in key
        ],
        0.3,
    )


def merged_weight(model: nn.Module) -> Tensor:
    return next(p for key, p in model.named_parameters() if key.endswith("proj.weight"))


@pytest.mark.parametrize(("name", "kind"), cells("g"))
def test_same_as_peft_but_for_its_gradients(name: str, kind: str, tmp_path: Path) -> None:
    run_beside_peft(name, kind, torch.float64, tmp_path, wrong_there=("hada_w1_a", "hada_w2_a"))


@pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("name", "kind"), cells("q"))
def test_same_as_peft_on_a_quantised_base(name: str, kind: str, tmp_path: Path) -> None:
    run_beside_peft(name, kind, torch.float32, tmp_path)


@pytest.mark.parametrize(("name", "kind"), cells("n"))
def test_where_peft_has_nothing_on_a_quantised_base(name: str, kind: str, tmp_path: Path) -> None:
    run_alone(name, kind, tmp_path, torch.float32)


@pytest.mark.parametrize(("name", "kind"), cells("o"))
def test_where_peft_has_nothing(name: str, kind: str, tmp_path: Path) -> None:
    run_alone(name, kind, tmp_path, torch.float64)


def run_alone(name: str, kind: str, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = net(kind, dtype)
    x = example(kind, dtype)
    ours = adapted_by_us(base, name)
    before = base(x)
    close(ours(x), before, dtype)
    randomize([p for p in ours.parameters() if p.requires_grad], 0.3)
    result = ours(x)
    assert (result - before).abs().max() > 1e-3
    save_adapter(ours, tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    close(again(x), result, dtype)
    if kind not in QUANTISED:  # what is merged there is rounded anew
        merge_adapter(ours)
        close(ours(x), result, dtype)
        unmerge_adapter(ours)
        assert_base_untouched(ours, base)
    with disable_adapter(ours):
        assert bit_equal(ours(x), before)


@pytest.mark.parametrize(("name", "kind"), cells("f"))
def test_same_as_peft_in_float32(name: str, kind: str, tmp_path: Path) -> None:
    run_beside_peft(name, kind, torch.float32, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "kind"), cells("p"))
def test_same_as_peft(name: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run_beside_peft(name, kind, dtype, tmp_path)


def run_beside_peft(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path, wrong_there: tuple[str, ...] = ()
) -> None:
    torch.manual_seed(0)
    base = net(kind, dtype)
    x = example(kind, dtype)
    theirs = adapted_by_peft(base, name)
    shake_peft(theirs)
    save_with_peft(theirs, tmp_path / "theirs")

    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "theirs")  # saved there, loaded here
    before = base(x)
    assert (theirs(x) - before).abs().max() > 1e-3
    close(ours(x), theirs(x), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    expected = gradients(theirs, state, x)
    found = gradients(ours, tensors_to_load(ours, "default"), x)
    assert expected.keys() == found.keys()
    assert expected
    for key, gradient in expected.items():
        if wrong_there and key.endswith(wrong_there):
            continue
        close(found[key], gradient, dtype)

    save_adapter(ours, tmp_path / "ours")  # saved here, loaded there
    close(load_with_peft(base, tmp_path / "ours")(x), ours(x), dtype)

    with disable_adapter(ours):
        assert bit_equal(ours(x), before)
    if kind in QUANTISED or (kind == "grouped" and TYPES[name][0] == "LoraConfig"):
        return  # what is merged there is rounded anew; whose update is no grouped kernel
    result = ours(x)
    merge_adapter(ours)
    close(ours(x), result, dtype)
    close(merged_weight(ours), merged_weight(theirs.merge_and_unload()), dtype)
    for _ in range(10):
        unmerge_adapter(ours)
        merge_adapter(ours)
    unmerge_adapter(ours)
    assert bit_equal(ours.proj.weight, base.proj.weight)


# -- explicit formulas -------------------------------------------------------------------------


def dense_delta(state: dict[str, Tensor], scaling: float) -> Tensor:
    a, b = state["proj.lora_A"], state["proj.lora_B"]
    product = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).view(-1, *a.shape[1:])
    if "proj.lora_A_start" in state:
        product = product - state["proj.lora_B_start"] @ state["proj.lora_A_start"]
    return scaling * product


def dense(name: str, model: nn.Module, base: nn.Module) -> nn.Module:
    """`base` with the weight and bias that the adapter on `model` stands for."""
    state = adapter_state_dict(model)
    settings = TYPES[name][1]
    rank, alpha = settings["r"], settings["lora_alpha"]
    scaling = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
    weight = dense_delta(state, scaling)
    weight = base.proj.weight + (weight.t() if isinstance(base.proj, Conv1D) else weight)
    if "proj.lora_magnitude_vector" in state:
        norm = weight.flatten(1).norm(dim=1)
        gain = state["proj.lora_magnitude_vector"].flatten() / norm
        weight = weight * gain.view(-1, *(1 for _ in weight.shape[1:]))
    result = copy.deepcopy(base)
    result.proj.weight = nn.Parameter(weight)
    if "proj.lora_B_bias" in state:
        result.proj.bias = nn.Parameter(base.proj.bias + scaling * state["proj.lora_B_bias"])
    return result


@pytest.mark.parametrize(("name", "kind"), cells("d"))
def test_same_as_the_dense_formula(name: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Net(kind).double()
    x = example(kind, torch.float64)
    ours = adapted_by_us(base, name)
    close(ours(x), base(x), torch.float64)
    randomize([p for p in ours.parameters() if p.requires_grad], 0.3)
    expected = dense(name, ours, base)
    close(ours(x), expected(x), torch.float64)
    merge_adapter(ours)
    close(ours.proj.weight, expected.proj.weight, torch.float64)
    close(ours.proj.bias, expected.proj.bias, torch.float64)
    unmerge_adapter(ours)
    assert bit_equal(ours.proj.weight, base.proj.weight)

    save_adapter(ours, tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    close(again(x), ours(x), torch.float64)
    if kind in ("dilated", "circular"):  # peft would compute something else from it
        with pytest.raises(KeyError, match="LORA_LIGHTNING"):
            peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    else:
        close(load_with_peft(base, tmp_path)(x), ours(x), torch.float64)


@pytest.mark.parametrize(("name", "kind"), cells("-"))
def test_refused(name: str, kind: str) -> None:
    model = Net(kind)
    keys = model.state_dict().keys()
    if (name, kind) == ("lora_bias", "nobias"):  # works, but has nothing to be merged into
        adapted = adapted_by_us(model, name)
        with pytest.raises(lora_lightning.LoraError, match="has no bias"):
            merge_adapter(adapted)
        return
    with pytest.raises(lora_lightning.LoraError, match="proj"):
        adapted_by_us(model, name)
    assert model.state_dict().keys() == keys


def test_the_table_covers_everything() -> None:
    header, *rows = [line.split() for line in TABLE.strip().splitlines()]
    assert header == list(KINDS)
    assert [row[0] for row in rows] == list(TYPES)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", TYPES)
def test_low_cpu_mem_usage(name: str, second: bool) -> None:
    """Made without memory, then filled: the same as an adapter that was made in the ordinary way."""
    torch.manual_seed(0)
    base = Net("linear").double()
    source = adapted_by_us(base, name)
    randomize([p for p in source.parameters() if p.requires_grad], 0.3)
    model = adapted_by_us(base, "lora") if second else copy.deepcopy(base)
    label = "late" if second else "default"
    config = getattr(lora_lightning, TYPES[name][0])(**options(name))
    inject_adapter(model, config, label, low_cpu_mem_usage=True)
    tensors = adapter_state_dict(model, label).values()
    assert all(tensor.is_meta for tensor in tensors)
    load_adapter_state_dict(model, adapter_state_dict(source), label)
    set_adapter(model, label)
    x = example("linear", torch.float64)
    assert bit_equal(model(x), source(x))
    assert all(p.requires_grad for k, p in model.named_parameters() if f".{label}.lora_A" in k)
