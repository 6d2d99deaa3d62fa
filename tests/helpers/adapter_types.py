"""Every adapter type and every layer kind, and a table that says what each pair is compared with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lightning
from lora_lightning import inject_adapter

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
dora                p        p        p        p        p        p        p        p        p        d        d        q        n        n        o
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
