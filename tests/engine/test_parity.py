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
from tests.helpers.adapter_types import (
    KINDS,
    QUANTISED,
    TABLE,
    TYPES,
    Net,
    adapted_by_us,
    cells,
    example,
    net,
    options,
)
from tests.helpers.tensors import bit_equal, randomize

PEFT_CLASSES = {
    "LohaConfig": "LoHaConfig",
    "LokrConfig": "LoKrConfig",
    "OftConfig": "OFTConfig",
    "Ia3Config": "IA3Config",
}


def assert_base_untouched(model: nn.Module, base: nn.Module) -> None:
    found = model.state_dict()
    for key, tensor in base.state_dict().items():
        assert bit_equal(found[key], tensor), key


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
