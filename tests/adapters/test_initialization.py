"""Start values depend on seed and name alone, and nobody's random state is disturbed."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from lora_lightning import (
    LoraConfig,
    adapter_state_dict,
    inject_adapter,
    load_adapter_state_dict,
)
from lora_lightning.adapters.initialization import generator_for, kaiming_uniform_, normal_
from tests.helpers.tensors import bit_equal, trainable
from tests.helpers.torch_models import ScaledEmbedding, Transformer

WIDE = LoraConfig(r=2, target_modules=["q", "v", "embed"], init_lora_weights=False)
NARROW = LoraConfig(r=2, target_modules=["v"], init_lora_weights=False)


def start(config=WIDE, name="default", seed: int | None = 7, before=lambda: None, model=None):
    model = Transformer() if model is None else model
    before()
    inject_adapter(model, config, name, seed=seed)
    return {key: value.clone() for key, value in adapter_state_dict(model, name).items()}


def assert_same(found, expected):
    assert found
    for name, value in found.items():
        assert bit_equal(value, expected[name]), name


def consume():
    torch.rand(13)
    np.random.rand(3)
    random.random()


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("random numbers were drawn before", {"before": consume}),
        ("fewer modules are adapted", {"config": NARROW}),
        ("other weights", {"before": lambda: torch.manual_seed(99)}),
        ("double base", {"model": Transformer().bfloat16()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_same_values_whatever_happened_before(how, options):
    assert_same(start(**options), start())


def test_order_of_injection_does_not_matter():
    model = Transformer()
    inject_adapter(model, NARROW, "first", seed=7)
    assert_same(start(model=model), start())


def test_dtype_of_the_base_changes_no_value():
    doubles = start(model=Transformer().double())
    assert_same({k: v.float() for k, v in doubles.items()}, start())


def test_default_seed_is_torchs():
    torch.manual_seed(7)
    consume()
    assert_same(start(seed=None), start(seed=7))


@pytest.mark.parametrize("other", [{"seed": 8}, {"name": "second"}], ids=["seed", "adapter name"])
def test_other_values(other):
    one, two = start(), start(**other)
    assert one.keys() == two.keys()
    assert all(not torch.equal(one[key], two[key]) for key in one)


def test_every_tensor_starts_differently():
    values = list(start().values())
    for i, one in enumerate(values):
        for two in values[:i]:
            assert one.shape != two.shape or not torch.equal(one, two)


def test_the_random_state_is_not_disturbed():
    model = Transformer()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    inject_adapter(model, LoraConfig(r=2, lora_dropout=0.1, modules_to_save=["head"]))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_a_layer_made_by_torch_would_disturb_it():
    """The negative control."""
    before = torch.get_rng_state()
    nn.Linear(3, 3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = Transformer()
    before = torch.get_rng_state()
    inject_adapter(model, WIDE, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert trainable(model)
    assert all(p.is_meta for p in model.parameters())
    # Given memory later, the adapters start as they would have.
    model.to_empty(device="cpu")
    for module in model.modules():
        if type(module).__name__.startswith("Lora"):
            module.reset_parameters()
    assert_same(adapter_state_dict(model), start())


def test_what_no_file_holds_is_there_after_an_injection_without_memory():
    """The scaling that compiled code reads, and buffers of a copy that no state dict has."""
    model = nn.ModuleDict(
        {"mha": nn.MultiheadAttention(4, 2), "table": ScaledEmbedding(5, 4, padding_idx=0)}
    )
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["mha"], modules_to_save=["table"])
    filled = copy.deepcopy(model)
    inject_adapter(model, config)
    state = adapter_state_dict(model)
    inject_adapter(filled, config, low_cpu_mem_usage=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # empty memory is NaN
    try:
        load_adapter_state_dict(filled, state)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = dict(model.named_buffers())
    assert any(name.endswith("in_proj_weight.scaling_tensor") for name in expected)
    assert_same(dict(filled.named_buffers()), expected)


def test_the_fast_svd_disturbs_no_random_state_of_any_device(monkeypatch):
    """torch.manual_seed would seed all GPUs too, also those that nothing is on."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model, state = Transformer(), torch.get_rng_state()
    start(LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa_niter_4"), model=model)
    assert not seeded
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_is_where_it_should_be():
    state = start(LoraConfig(r=2, target_modules=["q", "embed"]))
    zeros = {key for key, value in state.items() if not value.any()}
    assert zeros == {
        "embed.lora_embedding_A",
        "layers.0.attn.q.lora_B",
        "layers.1.attn.q.lora_B",
    }


def test_kaiming_uniform_is_what_torch_draws():
    torch_draft, ours = torch.empty(20, 300), torch.empty(20, 300)
    generator = generator_for(1, "x")
    nn.init.kaiming_uniform_(torch_draft, a=5**0.5, generator=generator)
    kaiming_uniform_(ours, generator_for(1, "x"))
    torch.testing.assert_close(ours, torch_draft, rtol=1e-6, atol=0)


def test_normal_has_the_spread_it_says():
    """40,000 values: the standard error of the spread is 0.35 %."""
    values = torch.empty(200, 200)
    normal_(values, 0.25, generator_for(1, "x"))
    assert values.std().item() == pytest.approx(0.25, rel=0.02)
    assert abs(values.mean().item()) < 0.005
