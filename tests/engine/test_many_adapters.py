"""Several adapters on one model: by row, scaled, exchanged, reported, made without memory, trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_lightning
from lora_lightning import (
    LoraCallback,
    LoraConfig,
    LoraError,
    active_adapters,
    adapter_names,
    adapter_state_dict,
    adapter_status,
    adapters_per_row,
    delete_adapter,
    disable_adapter,
    hotswap_adapter,
    inject_adapter,
    load_adapter,
    load_adapter_state_dict,
    merge_adapter,
    save_adapter,
    scale_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.adapters.registry import config_types
from lora_lightning.engine.injection import adapters_named
from lora_lightning.errors import AdapterMismatchError, AdapterStateError
from tests.helpers.lightning_modules import BuiltInConfigureModel, Data, Net, make_trainer
from tests.helpers.tensors import bit_equal, randomize, trainable
from tests.helpers.torch_models import VOCAB, Transformer, token_ids
from tests.helpers.unchanged import unchanged_check

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def add(model: nn.Module, name: str, seed: int = 0, **options: Any) -> nn.Module:
    """An adapter with values that matter."""
    inject_adapter(model, LoraConfig(**{"r": 2, **options}), name)
    torch.manual_seed(seed + len(name) + ord(name[0]))
    randomize([p for n, p in model.named_parameters() if f".adapters.{name}." in n], 0.3)
    return model


# -- an adapter for every row ------------------------------------------------------------------

KINDS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(5, 4, 6)),
    "conv1D": (lambda: Conv1D(8, 6), lambda: torch.randn(5, 4, 6)),
    "embedding": (lambda: nn.Embedding(9, 8), lambda: torch.randint(0, 9, (5, 4))),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: torch.randn(5, 6, 4, 4)),
    "grouped": (lambda: nn.Conv1d(6, 8, 3, groups=2), lambda: torch.randn(5, 6, 7)),
}
ROWS = ["a", None, "b", "a", "other place"]


class Place(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.proj = KINDS[kind][0]()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        y = y.flatten(2).mT if y.shape[-1] != 8 or y.dim() == 4 else y
        return self.head(torch.tanh(y))


def row_by_row(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    """The truth: a batch of its own for every row."""
    before = active_adapters(model)
    results = []
    for row, name in zip(x.split(1), names, strict=True):
        set_adapter(model, [name] if name else [])
        results.append(model(row))
    set_adapter(model, before)
    return torch.cat(results)


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_batches_of_their_own_are(kind: str, options: dict) -> None:
    if kind == "grouped" and "use_dora" in options:
        return  # not defined: see test_parity.py
    torch.manual_seed(0)
    model = Place(kind).double()
    add(model, "a", target_modules=["proj"], **options)
    add(model, "b", target_modules=["proj"], modules_to_save=["head"], r=4)
    add(model, "other place", target_modules=["head"])
    x = KINDS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    expected = row_by_row(model, x, ROWS)
    set_adapter(model, ["a", "other place"])  # which plays no part inside
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with adapters_per_row(model, ROWS):
        found = model(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    grads = gradients(model, found)
    assert {n.split(".adapters.")[1].split(".")[0] for n in grads if ".adapters." in n} == {
        "a", "b", "other place",
    }  # fmt: skip
    model.zero_grad()
    for row, name in zip(x.split(1), ROWS, strict=True):
        set_adapter(model, [name] if name else [])
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model(row).square().sum().backward()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, **CLOSE)


def test_rows_of_none_are_the_base() -> None:
    torch.manual_seed(0)
    base = Transformer().double()
    model = add(copy.deepcopy(base), "a", target_modules=["q", "embed"], modules_to_save=["head"])
    with adapters_per_row(model, [None, None]):
        assert bit_equal(model(token_ids()), base(token_ids()))
    assert not torch.allclose(model(token_ids()), base(token_ids()))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def test_generate_with_a_cache_keeps_every_row_with_its_adapter() -> None:
    model = llama()
    add(model, "a")
    add(model, "b", target_modules=["q_proj", "embed_tokens"])
    prompt = torch.tensor([[1, 5, 3]]).expand(4, 3)
    names = ["b", None, "a", "b"]
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt),
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with adapters_per_row(model, names):
        found = model.generate(prompt, **options)
    options["attention_mask"] = options["attention_mask"][:1]
    for i, name in enumerate(names):
        set_adapter(model, [name] if name else [])
        alone = model.generate(prompt[:1], **options)
        assert torch.equal(found.sequences[i], alone.sequences[0])
        for together, single in zip(found.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[i], single[0], **CLOSE)
    assert len({tuple(row.tolist()) for row in found.sequences}) == 3


def test_what_rows_refuse() -> None:
    model = add(nn.Sequential(nn.Linear(4, 4)), "french")
    before = unchanged_check(model)
    x = torch.randn(2, 4)
    with pytest.raises(AdapterStateError, match=r"No adapter 'frensh'.*Did you mean 'french'"):
        adapters_per_row(model, ["frensh", None]).__enter__()
    with (
        adapters_per_row(model, ["french"]),
        pytest.raises(AdapterStateError, match=r"each of 1 rows, but a Linear .* \(2, 4\)"),
    ):
        model(x)
    with disable_adapter(model), pytest.raises(AdapterStateError, match="disabled at present"):
        adapters_per_row(model, ["french", None]).__enter__()
    before()
    merge_adapter(model)
    with pytest.raises(AdapterStateError, match="merged into the base, which every row"):
        adapters_per_row(model, ["french", None]).__enter__()
    unmerge_adapter(model)
    before()
    biased = add(nn.Sequential(nn.Linear(4, 4)), "a", bias="lora_only")
    add(biased, "b")
    for rows in (["a", "b"], ["b", None]):
        with pytest.raises(AdapterStateError, match=r"'a' trains '0.bias' of the base itself"):
            adapters_per_row(biased, rows).__enter__()
    set_adapter(biased, "b")  # then the bias is the base's own
    with adapters_per_row(biased, ["b", None]):
        biased(x)


def test_rows_nest_and_end_with_an_error() -> None:
    model = add(nn.Sequential(nn.Linear(4, 4)).double(), "a")
    add(model, "b")
    set_adapter(model, ["a", "b"])
    x = torch.randn(2, 4, dtype=torch.float64)
    plain = model(x)
    before = unchanged_check(model)
    with adapters_per_row(model, ["a", None]):
        outer = model(x)
        with adapters_per_row(model, ["b", "b"]):
            assert not torch.allclose(model(x), outer)
        with pytest.raises(ZeroDivisionError), adapters_per_row(model, ["b", "b"]):
            1 / 0
        assert bit_equal(model(x), outer)
        with disable_adapter(model):
            assert bit_equal(model(x), model[0].base_forward(None, x))
        assert bit_equal(model(x), outer)
    before()
    assert bit_equal(model(x), plain)


def test_nothing_is_changed_inside_rows() -> None:
    model = add(nn.Sequential(nn.Linear(4, 4)), "a")
    add(model, "b")
    with adapters_per_row(model, ["a", None]):
        for action in (
            lambda: set_adapter(model, "b"),
            lambda: merge_adapter(model),
            lambda: delete_adapter(model, "a"),
            lambda: inject_adapter(model, LoraConfig(r=1), "c"),
        ):
            with pytest.raises(AdapterStateError, match="leave `with adapters_per_row"):
                action()


def test_a_batch_without_rows() -> None:
    model = add(nn.Sequential(nn.Linear(4, 3)), "a")
    with adapters_per_row(model, []):
        assert model(torch.randn(0, 4)).shape == (0, 3)


# -- scale_adapter -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1D", "embedding", "conv2d"])
def test_scaled_weight(kind: str) -> None:
    torch.manual_seed(0)
    model = Place(kind).double()
    weight = model.proj.weight.detach().clone()
    add(model, "a", target_modules=["proj"], lora_alpha=3)
    merge_adapter(model)
    delta = model.proj.weight.detach() - weight
    unmerge_adapter(model)
    x = KINDS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    trained = model(x)
    for factor in (0, 0.25, -1, 3.5):
        scale_adapter(model, "a", factor)
        dense = copy.deepcopy(model)
        delete_adapter(dense, "a")
        with torch.no_grad():
            dense.proj.weight.copy_(weight + factor * delta)
        torch.testing.assert_close(model(x), dense(x), **CLOSE)
        merge_adapter(model)
        torch.testing.assert_close(model.proj.weight, dense.proj.weight, **CLOSE)
        unmerge_adapter(model)
    scale_adapter(model, "a", 1)  # of its own config's, not of what it was last
    assert bit_equal(model(x), trained)


def test_scale_is_of_one_adapter_and_of_this_run(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4)).double()
    model = add(copy.deepcopy(base), "a", lora_bias=True)
    add(model, "b")
    set_adapter(model, ["a", "b"])
    x = torch.randn(2, 4, dtype=torch.float64)
    with disable_adapter(model):
        plain = model(x)
    set_adapter(model, "a")
    of_a = model(x) - plain
    set_adapter(model, "b")
    of_b = model(x) - plain
    set_adapter(model, ["a", "b"])
    scale_adapter(model, "a", 0.5)
    torch.testing.assert_close(model(x), plain + 0.5 * of_a + of_b, **CLOSE)
    save_adapter(model, tmp_path, "a")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), plain + of_a, **CLOSE)


def test_what_scaling_refuses() -> None:
    model = add(nn.Sequential(nn.Linear(4, 4)), "alpha")
    before = unchanged_check(model)
    with pytest.raises(AdapterStateError, match="Did you mean 'alpha'"):
        scale_adapter(model, "alfa", 2)
    for factor in (float("nan"), float("inf"), "2", None):
        with pytest.raises(LoraError, match="must be a finite number"):
            scale_adapter(model, "alpha", factor)
    before()
    merge_adapter(model)
    with pytest.raises(AdapterStateError, match="merged into the base"):
        scale_adapter(model, "alpha", 2)
    rows = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    options = {"target_modules": ["1"], "trainable_token_indices": {"0": [1]}}
    add(rows, "a", **options)
    before = unchanged_check(rows)
    with pytest.raises(AdapterStateError, match="TrainableTokensAdapter, which has no scaling"):
        scale_adapter(rows, "a", 2)
    before()


# -- hotswap_adapter ---------------------------------------------------------------------------


class CountingBackend:
    """Compiles nothing; counts how often it is asked to."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        return graph.forward


def folder(path: Path, base: nn.Module, seed: int, **options: Any) -> Path:
    """A PEFT folder of an adapter for `base`."""
    model = add(copy.deepcopy(base), "default", seed, **options)
    save_adapter(model, path)
    return path


SWAPS = {
    "same": {"target_modules": ["q", "k"], "r": 4},
    "smaller rank": {"target_modules": ["q", "k"], "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": ["q", "k"], "r": 2, "use_rslora": True},
    "fewer modules": {"target_modules": ["k"], "r": 1},
    "patterns": {
        "target_modules": ["q", "k"],
        "rank_pattern": {"layers.1.attn.q": 1},
        "alpha_pattern": {"k": 2.5},
    },
    "regular expression": {"target_modules": r"layers\.1\.attn\.q"},
}


def test_swaps_under_torch_compile(tmp_path: Path) -> None:
    torch._dynamo.reset()
    base = Transformer().double()
    slot = {"target_modules": ["q", "k"], "r": 4, "lora_alpha": 7}
    model = add(copy.deepcopy(base), "slot", **slot)
    ids = token_ids()
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    first = compiled(ids)
    tensors = {name: id(p) for name, p in model.named_parameters()}
    for seed, (name, options) in enumerate(SWAPS.items()):
        path = folder(tmp_path / name, base, seed, **options)
        hotswap_adapter(model, path, "slot")
        expected = copy.deepcopy(base)
        load_adapter(expected, path)
        torch.testing.assert_close(compiled(ids), expected(ids), **CLOSE)
        torch.testing.assert_close(model(ids), expected(ids), **CLOSE)
        assert not torch.allclose(compiled(ids), first)
        # what is on the model can be saved, and says the same
        save_adapter(model, tmp_path / "again", "slot")
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path / "again")
        torch.testing.assert_close(again(ids), expected(ids), **CLOSE)
    assert backend.graphs == 1
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["conv2d", "grouped", "embedding", "conv1D"])
def test_swaps_on_every_kind(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Place(kind).double()
    path = folder(tmp_path, base, 1, target_modules=["proj"], r=2, lora_alpha=3)
    model = add(copy.deepcopy(base), "default", target_modules=["proj"], r=4)
    hotswap_adapter(model, path)
    expected = copy.deepcopy(base)
    load_adapter(expected, path)
    x = KINDS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    torch.testing.assert_close(model(x), expected(x), **CLOSE)


def test_swaps_whatever_has_no_rank_as_a_whole(tmp_path: Path) -> None:
    base = Transformer().double()
    options: dict[str, Any] = {
        "target_modules": ["q"], "modules_to_save": ["head"], "bias": "lora_only",
        "trainable_token_indices": {"embed": [3, 1]},
    }  # fmt: skip
    path = folder(tmp_path, base, 1, **options)
    model = add(copy.deepcopy(base), "default", **options)
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.q.bias.add_(1)
    hotswap_adapter(model, path)
    expected = copy.deepcopy(base)
    load_adapter(expected, path)
    torch.testing.assert_close(model(token_ids()), expected(token_ids()), **CLOSE)
    with disable_adapter(model):
        assert bit_equal(model(token_ids()), base(token_ids()))


DOES_NOT_FIT = {
    "larger rank": ({"r": 5}, {}, "q.lora_A.weight is .5, 8., here .4, 8."),
    "other modules": ({"target_modules": ["v"]}, {}, "no place here"),
    "a head": ({"modules_to_save": ["head"]}, {}, "no place here.*head"),
    "no head": ({}, {"modules_to_save": ["head"]}, "that it lacks.*head"),
    "no bias": ({}, {"bias": "lora_only"}, "that it lacks.*bias"),
    "biases": ({"bias": "lora_only"}, {}, "no place here.*bias"),
    "dora": ({"use_dora": True}, {}, "no place here.*magnitude"),
    "no dora": ({}, {"use_dora": True}, "that it lacks.*magnitude"),
    "other dora": ({"use_dora": True, "r": 4}, {"use_dora": True, "lora_alpha": 2}, "lora_alpha"),
    "no tokens": ({}, {"trainable_token_indices": {"embed": [1]}}, "that it lacks.*tokens"),
    "other tokens": (
        {"trainable_token_indices": {"embed": [1, 2]}},
        {"trainable_token_indices": {"embed": [2, 1]}},
        r"of the tokens \[1, 2\], here \[2, 1\]",
    ),
    "from the base": ({}, {"init_lora_weights": "pissa"}, "starts from the base"),
}


@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_a_swap_that_does_not_fit_changes_nothing(case: str, tmp_path: Path) -> None:
    theirs, ours, words = DOES_NOT_FIT[case]
    base = Transformer()
    path = folder(tmp_path, base, 1, **{"target_modules": ["q"], **theirs})
    model = add(copy.deepcopy(base), "default", **{"target_modules": ["q"], "r": 4, **ours})
    before = unchanged_check(model)
    with pytest.raises(AdapterMismatchError, match=words) as caught:
        hotswap_adapter(model, path)
    assert "nothing was changed" in str(caught.value)
    before()


def test_what_a_swap_refuses(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    path = folder(tmp_path / "good", base, 1)
    model = add(copy.deepcopy(base), "default")
    before = unchanged_check(model)
    tensors = load_file(path / "adapter_model.safetensors")
    key = "base_model.model.0.lora_A.weight"
    for change, words in (
        ({key: tensors[key] * float("nan")}, "not finite"),
        ({key: tensors[key].long()}, "torch.int64"),
        ({key: tensors[key].t().contiguous()}, r"is \[4, 2\], here \[2, 4\]"),
        ({key: None}, "that it lacks"),
    ):
        changed = {k: t for k, t in {**tensors, **change}.items() if t is not None}
        save_file(changed, path / "adapter_model.safetensors")
        with pytest.raises(AdapterMismatchError, match=words):
            hotswap_adapter(model, path)
        before()
    with pytest.raises(LoraError, match="no folder or file"):
        hotswap_adapter(model, tmp_path / "none")
    with pytest.raises(AdapterStateError, match="no adapter 'other' to fill"):
        hotswap_adapter(model, path, "other")
    inject_adapter(model, LoraConfig(r=2), "empty", low_cpu_mem_usage=True)
    with pytest.raises(AdapterStateError, match="has no memory yet"):
        hotswap_adapter(model, path, "empty")
    merge_adapter(model)
    with pytest.raises(AdapterStateError, match="is merged into the base"):
        hotswap_adapter(model, path)
    loha = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapter(loha, lora_lightning.LohaConfig(r=2))
    save_file(tensors, path / "adapter_model.safetensors")
    before = unchanged_check(loha)
    with pytest.raises(AdapterMismatchError, match="of type LORA, this one of type LOHA"):
        hotswap_adapter(loha, path)
    before()


def test_a_swap_ends_what_scale_adapter_did(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4)).double()
    path = folder(tmp_path, base, 1)
    model = add(copy.deepcopy(base), "default")
    scale_adapter(model, "default", 3)
    hotswap_adapter(model, path)
    expected = copy.deepcopy(base)
    load_adapter(expected, path)
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x), **CLOSE)
    scale_adapter(model, "default", 1)
    torch.testing.assert_close(model(x), expected(x), **CLOSE)


# -- adapter_status ----------------------------------------------------------------------------


def test_status() -> None:
    model = add(Transformer(), "one", target_modules=["q", "v"], modules_to_save=["head"])
    add(model, "two", target_modules=["q"], bias="lora_only")
    inject_adapter(model, LoraConfig(r=1, target_modules=["v"]), "three", low_cpu_mem_usage=True)
    status = adapter_status(model)
    assert status.adapters == adapter_names(model)
    assert status.active == ["one"]
    assert status.irregular == []
    assert status.biases == {"two": ["layers.0.attn.q.bias", "layers.1.attn.q.bias"]}
    assert status.trainable_parameters == sum(p.numel() for p in trainable(model).values())
    assert status.total_parameters == sum(p.numel() for p in model.parameters())
    layers = {layer.path: layer for layer in status.layers}
    assert list(layers) == [f"layers.{i}.attn.{n}" for i in (0, 1) for n in "qv"] + ["head"]
    q, v = layers["layers.0.attn.q"], layers["layers.0.attn.v"]
    assert (q.module_type, q.enabled, q.active, q.merged) == ("Linear", True, ["one"], [])
    assert q.adapters == {"one": "LoraAdapter", "two": "LoraAdapter"}
    assert q.trainable == {"one": True, "two": False}
    assert q.parameters == {"one": 2 * (8 + 8), "two": 2 * (8 + 8)}
    assert v.devices == {"one": ["cpu"], "three": ["meta"]}
    assert v.dtypes == {"one": ["float32"], "three": ["float32"]}
    assert layers["head"].adapters == {"one": "ModulesToSaveCopy"}
    lines = str(status).splitlines()
    assert len(lines) == 3 + 9 + 1 + 2
    cells = [line.replace("│", " ").split() for line in lines]
    assert ["layers.0.attn.q", "Linear", "one", "LoraAdapter", "active", "yes", "32"] in cells
    assert ["layers.0.attn.q", "Linear", "two", "LoraAdapter", "inactive", "no", "32"] in cells
    assert [
        "layers.1.attn.v",
        "Linear",
        "three",
        "LoraAdapter",
        "without",
        "values",
        "no",
        "16",
    ] in cells
    assert lines[-2] == (
        "adapter 'two' trains 2 biases of the base: layers.0.attn.q.bias, layers.1.attn.q.bias"
    )
    shown = f"trainable {status.trainable_parameters:,} of {status.total_parameters:,} parameters"
    assert lines[-1] == shown
    assert "\x1b" not in str(status)
    delete_adapter(model, "three")
    with disable_adapter(model):
        assert "disabled" in str(adapter_status(model))
    set_adapter(model, ["one", "two"])
    merge_adapter(model)
    assert [layer.merged for layer in adapter_status(model).layers][:2] == [["one", "two"], ["one"]]


def test_status_tells_what_is_not_the_same_everywhere() -> None:
    model = add(Transformer(), "one", target_modules=["q"], trainable_token_indices={"embed": [1]})
    first = model.layers[0].attn.q
    first.active_adapters = []
    first.adapters["one"].lora_A.requires_grad_(False)
    status = adapter_status(model)
    assert status.irregular == [
        "adapter 'one': state differs between layers (active, inactive)",
        "adapter 'one': requires_grad differs between layers (None, True)",
    ]
    assert str(status).endswith("\n".join(status.irregular))
    tied = llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    add(tied, "one", target_modules=["q_proj"], trainable_token_indices=[1, 2])
    assert adapter_status(tied).irregular == []  # though the head has no tensor of its own
    assert len(adapter_status(tied).layers) == 4


def test_status_of_a_model_without_adapters() -> None:
    status = adapter_status(nn.Linear(3, 3))
    assert (status.layers, status.adapters, status.active, status.irregular) == ([], [], [], [])
    assert str(status).endswith("trainable 12 of 12 parameters")


# -- low_cpu_mem_usage -------------------------------------------------------------------------


class EveryKind(nn.Module):
    """A table, a convolution, a Linear, a norm with statistics and a head with a fixed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.proj = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)
        self.head.register_buffer("seen", torch.full((2,), 7.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).mT).mT
        return self.head(self.norm(self.proj(x).flatten(0, 1)))


EMPTY: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "target_modules": ["embed", "conv", "proj"]},
    "dora": {"r": 2, "target_modules": ["embed", "conv", "proj"], "use_dora": True},
    "lora_bias": {"r": 2, "target_modules": ["conv", "proj"], "lora_bias": True},
    "pissa": {"r": 2, "target_modules": ["proj"], "init_lora_weights": "pissa"},
    "copies": {"r": 2, "target_modules": ["proj"], "modules_to_save": ["head", "norm"]},
    "tokens": {"target_modules": [], "trainable_token_indices": {"embed": [5, 2]}},
    "biases": {"r": 2, "target_modules": ["proj"], "bias": "all"},
    "ADALORA": {"init_r": 2, "target_r": 1},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "OFT": {"oft_block_size": 4},
    "SHIRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "VERA": {"r": 2},
}


def empty_config(name: str) -> Any:
    options = {"target_modules": ["proj"], **EMPTY[name]}
    return config_types()[name if name.isupper() else "LORA"](**options)


def tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        f"{path}.{n}": t
        for path, adapter in adapters_named(model, name).items()
        for n, t in (*adapter.named_parameters(), *adapter.named_buffers())
    }


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", EMPTY)
def test_made_without_memory_then_filled(name: str, second: bool) -> None:
    torch.manual_seed(0)
    base, ids = EveryKind().eval(), token_ids()
    source, model = copy.deepcopy(base), copy.deepcopy(base)
    if second:
        for carrier in (source, model):
            inject_adapter(carrier, LoraConfig(r=1, target_modules=["proj"]), "before")
    inject_adapter(source, empty_config(name))
    set_adapter(source, "default")
    randomize([p for p in trainable(source).values() if p.is_floating_point()], 0.3)
    state = {key: tensor.clone() for key, tensor in adapter_state_dict(source).items()}

    random = torch.get_rng_state()
    inject_adapter(model, empty_config(name), low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), random)
    empty = tensors_of(model, "default")
    with_values = [key for key, tensor in empty.items() if not tensor.is_meta]
    assert with_values == [key for key in empty if key.endswith("seen")]  # is in no file
    assert active_adapters(model) == (["before"] if second else ["default"])
    set_adapter(model, "default")
    before = unchanged_check(model)
    with pytest.raises(AdapterStateError, match="no values yet"):
        model(ids)
    with pytest.raises(LoraError, match="no values"):
        merge_adapter(model)
    with pytest.raises(AdapterStateError, match="has no values to save"):
        save_adapter(model, "nowhere")
    if name != "biases":  # which rows refuse in any case
        with (
            adapters_per_row(model, ["default", None]),
            pytest.raises(AdapterStateError, match="no values yet"),
        ):
            model(ids)
    before()
    with disable_adapter(model):
        assert bit_equal(model(ids), base(ids))

    load_adapter_state_dict(model, state)
    filled = tensors_of(model, "default")
    assert filled.keys() == tensors_of(source, "default").keys()
    for key, tensor in tensors_of(source, "default").items():
        assert bit_equal(filled[key], tensor), key
        assert filled[key].requires_grad == tensor.requires_grad, key
    assert bit_equal(model(ids), source(ids))


@pytest.mark.parametrize("name", EMPTY)
def test_a_state_that_does_not_fit_leaves_it_empty(name: str) -> None:
    torch.manual_seed(0)
    source, model = EveryKind(), EveryKind()
    inject_adapter(source, empty_config(name))
    inject_adapter(model, empty_config(name), low_cpu_mem_usage=True)
    state = adapter_state_dict(source)
    before = unchanged_check(model)
    for key in list(state)[:1] + list(state)[-1:]:
        with pytest.raises(AdapterMismatchError, match="missing"):
            load_adapter_state_dict(model, {k: t for k, t in state.items() if k != key})
        before()


def test_a_base_without_values_comes_first() -> None:
    with torch.device("meta"):
        model = Transformer()
    inject_adapter(model, LoraConfig(r=2), low_cpu_mem_usage=True)
    with pytest.raises(AdapterMismatchError, match="load the base model before"):
        load_adapter_state_dict(
            model, {k: torch.zeros(t.shape) for k, t in adapter_state_dict(model).items()}
        )


# -- under a Trainer ---------------------------------------------------------------------------


def fit(folder: Path, module: nn.Module, *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    trainer = make_trainer(folder, *callbacks, **{"max_steps": 3, "max_epochs": -1, **options})
    trainer.fit(module, Data())
    return trainer


ONE = {"r": 2, "target_modules": ["embed"]}
TWO = {"r": 3, "target_modules": ["embed", "body.2"], "modules_to_save": ["head"]}


def values(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in adapter_state_dict(model, name).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(bit_equal(t, other[k]) for k, t in one.items())


def test_a_frozen_adapter_beside_one_that_trains(tmp_path: Path) -> None:
    module = Net()
    add(module, "kept", **ONE)
    before = values(module, "kept")
    base = {k: t.clone() for k, t in module.state_dict().items() if "adapters" not in k}
    kept = LoraCallback(**ONE, adapter_name="kept", trainable=False)
    trainer = fit(tmp_path, module, kept, LoraCallback(**TWO, adapter_name="new"))
    assert same(values(module, "kept"), before)
    assert active_adapters(module) == ["kept", "new"]
    fresh = Net()
    add(fresh, "kept", **ONE)
    inject_adapter(fresh, LoraConfig(**TWO), "new")
    assert not same(values(module, "new"), values(fresh, "new"))
    assert {n.split(".adapters.")[1].split(".")[0] for n in trainable(module)} == {"new"}
    in_optimizer = [p for g in trainer.optimizers[0].param_groups for p in g["params"]]
    assert {id(p) for p in in_optimizer} == {id(p) for p in trainable(module).values()}
    for name, tensor in base.items():
        assert bit_equal(module.state_dict()[name], tensor), name
    # the frozen one acted
    x = torch.randn(4, 8)
    module.eval()
    both = module(x)
    set_adapter(module, "new")
    assert not torch.allclose(module(x), both)


def test_both_train_and_the_checkpoint_holds_both(tmp_path: Path) -> None:
    module = Net()
    trainer = fit(
        tmp_path, module, LoraCallback(**ONE, adapter_name="a"),
        LoraCallback(**TWO, adapter_name="b"),
    )  # fmt: skip
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    start = Net()
    inject_adapter(start, LoraConfig(**ONE), "a")
    inject_adapter(start, LoraConfig(**TWO), "b")
    for name in "ab":
        assert not same(values(module, name), values(start, name))
    again = Net()
    assert load_adapter(again, tmp_path / "both.ckpt") == ["a", "b"]
    for name in "ab":
        assert same(values(again, name), values(module, name))
    single = Net()
    assert load_adapter(single, tmp_path / "both.ckpt", "b") == ["b"]
    assert same(values(single, "b"), values(module, "b"))


def test_resume_with_two_is_exact(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            LoraCallback(**ONE, adapter_name="a"),
            LoraCallback(**TWO, adapter_name="b", lora_dropout=0.1),
            ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False),
        ]

    def trained(epochs: int, **options: Any) -> Net:
        torch.manual_seed(3 if options else 1)
        module = Net()
        make_trainer(tmp_path, *callbacks(), max_epochs=epochs).fit(module, Data(), **options)
        return module

    whole = trained(4)
    trained(2)
    last = str(tmp_path / "last.ckpt")
    resumed = trained(4, ckpt_path=last)
    for name in "ab":
        assert same(values(resumed, name), values(whole, name))
    with pytest.raises(AdapterMismatchError, match="adapter 'b': only in the checkpoint"):
        make_trainer(tmp_path, callbacks()[0], max_epochs=5).fit(Net(), Data(), ckpt_path=last)


@pytest.mark.parametrize("kind", [Net, BuiltInConfigureModel])
def test_start_from_a_folder_and_from_a_checkpoint(kind: type, tmp_path: Path) -> None:
    source = Net()
    trainer = fit(tmp_path, source, LoraCallback(**TWO, adapter_name="b"))
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    style = add(Net(), "style", **ONE)
    save_adapter(style, tmp_path / "style", "style")
    module = kind()
    callbacks = [
        LoraCallback(adapter_name="style", init_from=str(tmp_path / "style"), trainable=False),
        LoraCallback(adapter_name="more", init_from=str(tmp_path / "b.ckpt")),
    ]
    make_trainer(tmp_path, *callbacks).validate(module, Data(), verbose=False)
    assert same(values(module, "style"), values(style, "style"))
    assert same(values(module, "more"), values(source, "b"))
    assert callbacks[0].config.r == 2
    fit(tmp_path, module, *callbacks)
    assert same(values(module, "style"), values(style, "style"))
    assert not same(values(module, "more"), values(source, "b"))


def test_adapters_come_and_go_between_runs(tmp_path: Path) -> None:
    module = Net()
    fit(tmp_path, module, LoraCallback(**ONE, adapter_name="a"))
    of_a = values(module, "a")
    with pytest.raises(AdapterStateError, match=r"adapters \['a'\], which no LoraCallback"):
        fit(tmp_path, module, LoraCallback(**TWO, adapter_name="b"))
    both = [
        LoraCallback(**ONE, adapter_name="a", trainable=False),
        LoraCallback(**TWO, adapter_name="b"),
    ]
    fit(tmp_path, module, *both)
    assert same(values(module, "a"), of_a)
    of_b = values(module, "b")
    add(module, "c", r=1, target_modules=["body.2"])
    with pytest.raises(AdapterStateError, match=r"adapters \['c'\], which no LoraCallback"):
        fit(tmp_path, module, *both)
    delete_adapter(module, "c")
    fit(tmp_path, module, *both)
    assert same(values(module, "a"), of_a)
    assert not same(values(module, "b"), of_b)


def test_an_adapter_added_during_a_run_is_noticed(tmp_path: Path) -> None:
    class Adds(Net):
        def on_train_start(self) -> None:
            add(self, "late", r=1, target_modules=["body.2"])
            set_adapter(self, ["default", "late"])

    with pytest.raises(LoraError, match="late"):
        fit(tmp_path, Adds(), LoraCallback(**ONE))

    class AddsInactive(Net):
        def on_train_start(self) -> None:
            add(self, "late", r=1, target_modules=["body.2"])

    module = AddsInactive()
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    fit(tmp_path, module, LoraCallback(**ONE), keep)
    assert active_adapters(module) == ["default"]
    again = Net()
    assert load_adapter(again, tmp_path / "kept" / "last.ckpt") == ["default"]
    assert same(values(again, "default"), values(module, "default"))
