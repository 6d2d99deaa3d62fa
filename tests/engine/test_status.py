"""adapter_status: which adapters are where, in which state, and what is irregular."""

from __future__ import annotations

from torch import nn

from lora_lightning import (
    LoraConfig,
    adapter_names,
    adapter_status,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    set_adapter,
)
from tests.helpers.adapted_models import add_adapter, small_llama
from tests.helpers.tensors import trainable
from tests.helpers.torch_models import Transformer


def test_status() -> None:
    model = add_adapter(Transformer(), "one", target_modules=["q", "v"], modules_to_save=["head"])
    add_adapter(model, "two", target_modules=["q"], bias="lora_only")
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
    model = add_adapter(
        Transformer(), "one", target_modules=["q"], trainable_token_indices={"embed": [1]}
    )
    first = model.layers[0].attn.q
    first.active_adapters = []
    first.adapters["one"].lora_A.requires_grad_(False)
    status = adapter_status(model)
    assert status.irregular == [
        "adapter 'one': state differs between layers (active, inactive)",
        "adapter 'one': requires_grad differs between layers (None, True)",
    ]
    assert str(status).endswith("\n".join(status.irregular))
    tied = small_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    add_adapter(tied, "one", target_modules=["q_proj"], trainable_token_indices=[1, 2])
    assert adapter_status(tied).irregular == []  # though the head has no tensor of its own
    assert len(adapter_status(tied).layers) == 4


def test_status_of_a_model_without_adapters() -> None:
    status = adapter_status(nn.Linear(3, 3))
    assert (status.layers, status.adapters, status.active, status.irregular) == ([], [], [], [])
    assert str(status).endswith("trainable 12 of 12 parameters")
