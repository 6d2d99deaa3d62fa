"""LoftQ: A and B from the rounding error of the base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning import (
    LoftqConfig,
    LoraConfig,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    unmerge_adapter,
)
from lora_lightning.engine.loftq import error_factors, start_from_rounding_error
from lora_lightning.errors import AdapterMismatchError, AdapterStateError, LoraError

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

IN, OUT, R = 128, 64, 8


def to_halves(weight: Tensor) -> Tensor:
    """A quantiser that anybody can check."""
    return (weight * 2).round() / 2


@torch.no_grad()
def loftq_factors(
    weight: Tensor,
    rank: int,
    scaling: float,
    num_iter: int,
    quantize: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and Q after `num_iter` turns.

    Args:
        weight: W, (out, in).
        rank: r of A and B.
        scaling: Factor that A and B act with.
        num_iter: Turns; with one, Q is the rounded W itself.
        quantize: Rounds a weight and gives it back dense, such as `rounded_to_nf4`.

    Returns:
        A (r, in), B (out, r) and the dense Q (out, in), in at least float32.

    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    low_rank = torch.zeros_like(weight)
    for _ in range(num_iter):
        rounded = quantize(weight - low_rank)
        a, b = error_factors(weight - rounded, rank, scaling)
        low_rank = scaling * b @ a
    return a, b, rounded


def rounded_to_nf4(weight: Tensor, blocksize: int = 64) -> Tensor:
    """`weight` rounded to NF4 by bitsandbytes, dense again."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.float(), blocksize=blocksize, quant_type="nf4"))


def best_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    return u[:, :rank] @ s[:rank].diag() @ vh[:rank]


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
def test_factors_are_those_of_algorithm_1(scaling: float) -> None:
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    low_rank = torch.zeros_like(weight)
    for turns in (1, 2, 3):
        rounded = to_halves(weight - low_rank)
        low_rank = best_rank(weight - rounded, R)
        a, b, q = loftq_factors(weight, R, scaling, turns, to_halves)
        assert a.shape == (R, IN)
        assert b.shape == (OUT, R)
        torch.testing.assert_close(q, rounded, atol=1e-10, rtol=0)
        torch.testing.assert_close(scaling * b @ a, low_rank, atol=1e-10, rtol=0)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=1e-10, rtol=0)


def test_factors_are_pefts_where_the_scaling_is_one() -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition  # the rest of it needs CUDA

    weight = torch.randn(OUT, IN)
    a, b, q = loftq_factors(weight, R, 1.0, 1, rounded_to_nf4)
    theirs = _low_rank_decomposition(weight - q, R)
    torch.testing.assert_close(b @ a, theirs["L"] @ theirs["R"], atol=1e-5, rtol=1e-5)


def test_more_turns_come_nearer() -> None:
    weight = torch.randn(OUT, IN)
    errors = []
    for turns in (1, 5):
        a, b, q = loftq_factors(weight, R, 2.0, turns, rounded_to_nf4)
        errors.append((weight - q - 2.0 * b @ a).norm().item())
    assert errors[1] < errors[0] < (weight - rounded_to_nf4(weight)).norm().item()


def quantised(quant_type: str = "nf4") -> tuple[nn.Sequential, dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, OUT), nn.Linear(OUT, 10))
    originals = copy.deepcopy(model.state_dict())
    for index in (0, 1):
        plain = model[index]
        layer = bnb.nn.Linear4bit(plain.in_features, OUT, quant_type=quant_type)
        layer.load_state_dict(plain.state_dict())
        model[index] = layer.to("cpu")
    return model, originals


def packed(model: nn.Sequential) -> list[Tensor]:
    return [t.clone() for m in model[:2] for t in (m.weight.data, m.weight.quant_state.absmax)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_quantised_model_starts_nearer_to_the_original(quant_type: str) -> None:
    model, originals = quantised(quant_type)
    before, x = packed(model), torch.randn(32, IN)
    inject_adapter(model, LoraConfig(r=R, lora_alpha=4 * R, target_modules=["0", "1", "2"]))
    head = model[2].adapters["default"].lora_A.clone()
    errors = start_from_rounding_error(model, originals.__getitem__)
    assert list(errors) == ["0", "1"]
    for path, (alone, with_adapter) in errors.items():
        layer, weight = model[int(path)], originals[f"{path}.weight"]
        rest = weight - layer.base_weight()
        assert alone == pytest.approx(float(rest.norm() / weight.norm()), rel=1e-5)
        rest = rest - layer.adapters["default"].delta_weight().detach()
        assert with_adapter == pytest.approx(float(rest.norm() / weight.norm()), rel=1e-4)
        best = torch.linalg.svdvals(weight - layer.base_weight())[R:].norm() / weight.norm()
        assert with_adapter == pytest.approx(float(best), rel=1e-4)
    assert torch.equal(model[2].adapters["default"].lora_A, head)
    assert all(map(torch.equal, packed(model), before))
    wanted = F.linear(x, originals["0.weight"], originals["0.bias"])
    with disable_adapter(model):
        alone = (model[0](x) - wanted).norm()
    assert (model[0](x) - wanted).norm() < 0.9 * alone
    merge_adapter(model)
    unmerge_adapter(model)
    assert all(map(torch.equal, packed(model), before))


def adapted(**options: Any) -> tuple[nn.Sequential, dict[str, Tensor]]:
    model, originals = quantised()
    inject_adapter(model, LoraConfig(r=R, **options))
    return model, originals


def test_refusals_change_nothing() -> None:
    model, originals = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    wrong_shape = {**originals, "1.weight": torch.zeros(OUT, 3)}
    with pytest.raises(AdapterMismatchError, match=r"'1' is \(64, 3\), expected \(64, 64\)"):
        start_from_rounding_error(model, wrong_shape.__getitem__)
    not_finite = {**originals, "1.weight": torch.full((OUT, OUT), float("nan"))}
    with pytest.raises(AdapterMismatchError, match="'1' is not finite"):
        start_from_rounding_error(model, not_finite.__getitem__)
    with pytest.raises(AdapterStateError, match=r"No quantised Linear .* 'other'"):
        start_from_rounding_error(model, originals.__getitem__, "other")
    merge_adapter(model)
    with pytest.raises(AdapterStateError, match="'0' is merged"):
        start_from_rounding_error(model, originals.__getitem__)
    unmerge_adapter(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_with_a_start_of_their_own_are_refused(options: dict) -> None:
    model, originals = adapted(**options)
    with pytest.raises(AdapterStateError, match="already starts from the rounded weight"):
        start_from_rounding_error(model, originals.__getitem__)


def test_a_model_of_transformers_and_its_file(tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=50)).eval()
    plain.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
        device_map="cpu",
    )
    inject_adapter(model, LoraConfig(r=32))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted, alone = plain(ids).logits, model(ids).logits
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            errors = start_from_rounding_error(model, file.get_tensor)
        assert len(errors) == 7
        assert (model(ids).logits - wanted).norm() < 0.5 * (alone - wanted).norm()


# -- as an option ------------------------------------------------------------------------------


def quantised_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"model": nn.ModuleDict({"lin": nn.Linear(128, 64)})})
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4")
    layer.load_state_dict(plain["model"]["lin"].state_dict())
    return plain, nn.ModuleDict({"model": nn.ModuleDict({"lin": layer.to("cpu")})})


def test_the_option_takes_the_weights_from_files(tmp_path) -> None:
    plain, model = quantised_pair()
    weight = plain["model"]["lin"].weight.detach()
    save_file({"lin.weight": weight}, tmp_path / "model.safetensors")  # names without "model."
    packed = model["model"]["lin"].weight.data.clone()
    config = LoraConfig(
        r=8, init_lora_weights="loftq", loftq_config=LoftqConfig(weights=str(tmp_path))
    )
    inject_adapter(model, config)
    layer = model["model"]["lin"]
    adapter = layer.adapters["default"]
    before = (weight - layer.base_weight()).norm()
    after = (weight - layer.base_weight() - adapter.delta_weight()).norm()
    assert after < 0.9 * before
    assert torch.equal(layer.weight.data, packed)


@pytest.mark.parametrize(
    ("weights", "words"),
    [("nowhere", "no safetensors file"), (".", "no safetensors file")],
)
def test_the_option_without_files(weights: str, words: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, model = quantised_pair()
    config = LoraConfig(r=8, init_lora_weights="loftq", loftq_config=LoftqConfig(weights=weights))
    keys, required = model.state_dict().keys(), [p.requires_grad for p in model.parameters()]
    with pytest.raises(LoraError, match=words):
        inject_adapter(model, config)
    assert model.state_dict().keys() == keys
    assert [p.requires_grad for p in model.parameters()] == required


def test_the_option_on_a_base_that_is_not_rounded(tmp_path) -> None:
    plain, _ = quantised_pair()
    save_file({"lin.weight": plain["model"]["lin"].weight.detach()}, tmp_path / "m.safetensors")
    config = LoraConfig(
        r=8, init_lora_weights="loftq", loftq_config=LoftqConfig(weights=str(tmp_path))
    )
    with pytest.raises(LoraError, match="Load the base in 4 or 8 bits"):
        inject_adapter(plain, config)
    with pytest.raises(LoraError, match="loftq_config"):
        LoraConfig(init_lora_weights="loftq")
