"""Layers whose class has a forward of its own: what they compute, merge and write into files."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_lightning.layers.registry as registry
from lora_lightning import (
    AdapterMismatchError,
    AdapterStateError,
    ConfigError,
    Ia3Config,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    OftConfig,
    adapters_per_row,
    disable_adapter,
    hotswap_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.layers.by_weight import AdaptedByWeight
from lora_lightning.layers.conv import AdaptedConv
from tests.helpers.tensors import bit_equal

# -- convolutions: W * x in a geometry of their own -------------------------------------------------


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class CausalByHand(nn.Conv1d):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.left = self.kernel_size[0] - 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(F.pad(x, (self.left, 0)), self.weight, groups=self.groups)
        return y if self.bias is None else y + self.bias[:, None]


class KeepsSize(nn.Conv2d):
    """Output of ceil(size / stride), as TensorFlow pads."""

    def forward(self, x: Tensor) -> Tensor:
        edges: list[int] = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            missing = max((-(size // -stride) - 1) * stride + kernel - size, 0)
            edges = [missing // 2, missing - missing // 2, *edges]
        x = F.pad(x, edges)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class Wrapped(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)


# -- convolutions: another function of the weight ---------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return self._conv_forward(x, (self.weight - mean) / spread, self.bias)


class WithActivation(nn.Conv2d):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(x)))


class WithGain(nn.Conv2d):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.gain, self.bias)


class Larger(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(x), 2)


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


# -- tables -----------------------------------------------------------------------------------------


class Tripled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


class ScaledByRoot(nn.Embedding):
    embed_scale = 4.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale**0.5


class Slice(nn.Embedding):
    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        return self.weight[past : past + ids.shape[1]].repeat(len(ids), 1, 1)


class OfMask(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward((ids > 3).long().cumsum(1) + 2)


class OnCircle(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(super().forward(ids), dim=-1)


class AlsoDecodes(nn.Embedding):
    def forward(self, x: Tensor, decode: bool = False) -> Tensor:
        return F.linear(x, self.weight) if decode else super().forward(x)


# -- Linears ----------------------------------------------------------------------------------------


class TimesThree(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class FewBits(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 7
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.clamp(-0.05, 0.05), self.bias)


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Scored(nn.Linear):
    def forward(self, x: Tensor, weight: float) -> Tensor:
        return super().forward(x) * weight


class Flattened(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class OfSequences(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        _, _, _ = x.shape
        return super().forward(x)


class Counting(nn.Linear):
    """Counts its calls in a buffer and is noisy in training: a trial must leave no trace."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


IMAGE, SEQUENCE, IDS, ROWS = (2, 4, 8, 8), (2, 4, 9), None, (2, 3, 8)
PADDING = {
    "causal": (lambda: Causal(4, 6, 3), SEQUENCE),
    "causal, dilated": (lambda: Causal(4, 6, 3, dilation=2), SEQUENCE),
    "causal, depthwise": (lambda: Causal(4, 4, 3, groups=4), SEQUENCE),
    "causal, no bias": (lambda: CausalByHand(4, 6, 3, bias=False), SEQUENCE),
    "causal by hand": (lambda: CausalByHand(4, 6, 3), SEQUENCE),
    "same size": (lambda: KeepsSize(4, 6, 3, stride=2), IMAGE),
    "same size, groups": (lambda: KeepsSize(4, 8, 3, groups=2), IMAGE),
    "same size, depthwise": (lambda: KeepsSize(4, 8, 3, groups=4, stride=2), IMAGE),
    "circular": (lambda: Wrapped(4, 6, 3), IMAGE),
}
OF_WEIGHT = {
    "standardised": (lambda: Standardised(4, 6, 3), IMAGE),
    "activation": (lambda: WithActivation(4, 6, 3), IMAGE),
    "gain": (lambda: WithGain(4, 6, 3), IMAGE),
    "pixel shuffle": (lambda: Larger(4, 8, 3), IMAGE),
    "halved": (lambda: Halved(4, 6, 3), IMAGE),
    "times three": (lambda: Tripled(12, 8), IDS),
    "root": (lambda: ScaledByRoot(12, 8), IDS),
    "slice": (lambda: Slice(12, 8), IDS),
    "mask": (lambda: OfMask(12, 8), IDS),
    "circle": (lambda: OnCircle(12, 8), IDS),
    "two modes": (lambda: AlsoDecodes(12, 8), IDS),
}
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["layer"]),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["layer"]),
    "loha": lambda: LohaConfig(r=4, target_modules=["layer"]),
    "lokr": lambda: LokrConfig(r=4, target_modules=["layer"]),
    "oft": lambda: OftConfig(oft_block_size=2, target_modules=["layer"]),
    "ia3": lambda: Ia3Config(target_modules=["layer"]),
    "rows": lambda: LoraConfig(
        r=2, target_modules=["out"], trainable_token_indices={"layer": [1, 3, 5]}
    ),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module, width: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(width, 3) if width else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.out(self.layer(x))


def network(make: Any, shape: Any) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net(make(), 8 if shape is IDS else None).eval()
    x = torch.arange(10).view(2, 5) if shape is IDS else torch.randn(shape)
    return net, x


def shaken(net: nn.Module, amount: float = 0.2) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * torch.randn_like(parameter))


def peft_type(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["peft_type"])


def with_peft(base: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # groups that cannot be merged
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


CELLS = [
    (kind, name)
    for kind in (*PADDING, *OF_WEIGHT)
    for name in CONFIGS
    if not (name == "rows" and (PADDING | OF_WEIGHT)[kind][1] is not IDS)
    and not (name in ("loha", "lokr", "ia3") and (PADDING | OF_WEIGHT)[kind][1] is IDS)
    and not (name == "oft" and "depthwise" in kind)  # blocks of 2 do not divide a kernel
]


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_layer(kind: str, name: str, tmp_path: Path) -> None:
    net, x = network(*(PADDING | OF_WEIGHT)[kind])
    base, before = copy.deepcopy(net), net(x)
    inject_adapter(net, CONFIGS[name]())
    assert bit_equal(net(x), before)
    shaken(net)
    y = net(x)
    assert (y - before).abs().max() > 1e-3
    y.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert bit_equal(again(x), y)

    save_adapter(net, tmp_path)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded(x), y)
    if not peft_type(tmp_path).startswith("LORA_LIGHTNING"):
        torch.testing.assert_close(with_peft(base, tmp_path)(x), y)

    if name in ("lora", "dora") and getattr(net.layer, "groups", 1) > 1:
        with pytest.raises(AdapterStateError, match="reads all input channels"):
            merge_adapter(net)
    else:
        merge_adapter(net)
        torch.testing.assert_close(net(x), y)
        unmerge_adapter(net)
    unload(net)
    assert type(net.layer) is type(base.layer)
    assert bit_equal(net(x), before)
    assert all(bit_equal(net.state_dict()[k], t) for k, t in base.state_dict().items())


@pytest.mark.parametrize("kind", PADDING)
def test_lora_beside_peft(kind: str, tmp_path: Path) -> None:
    """What PEFT trained is what we compute, also where it pads by itself; else it is refused."""
    base, x = network(*PADDING[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    if kind in ("causal, dilated", "circular"):  # PEFT's A does not dilate; cannot pad its 1x1 B
        with pytest.raises(AdapterMismatchError, match=r"'layer' \((Causal|Wrapped)\)"):
            load_adapter(ours, tmp_path)
        assert type(ours.layer) is type(base.layer)
        return
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours.layer, AdaptedConv)
    assert not isinstance(ours.layer, AdaptedByWeight)


@pytest.mark.parametrize("kind", OF_WEIGHT)
def test_folders_of_changed_weights_are_not_for_peft(kind: str, tmp_path: Path) -> None:
    net, _ = network(*OF_WEIGHT[kind])
    inject_adapter(net, LoraConfig(r=2, target_modules=["layer"]))
    assert isinstance(net.layer, AdaptedByWeight)
    save_adapter(net, tmp_path)
    assert peft_type(tmp_path) == "LORA_LIGHTNING_LORA"


def test_a_table_that_decodes_uses_the_same_weight_for_both() -> None:
    net, ids = network(lambda: AlsoDecodes(12, 8), IDS)
    inject_adapter(net, LoraConfig(r=2, target_modules=["layer"]))
    shaken(net)
    adapter, layer = net.layer.adapters["default"], net.layer
    delta = adapter.scaling * (adapter.lora_embedding_B @ adapter.lora_embedding_A).T
    weight = (layer.weight + delta).detach().double()
    decoded = layer(layer(ids), decode=True).double()
    torch.testing.assert_close(decoded, weight[ids] @ weight.T, rtol=1e-5, atol=1e-6)


def test_trained_rows_of_a_scaled_table_are_not_for_peft(tmp_path: Path) -> None:
    """PEFT looks rows up past the table's forward."""
    net, _ = network(lambda: Tripled(12, 8), IDS)
    inject_adapter(net, LoraConfig(target_modules=[], trainable_token_indices={"layer": [1]}))
    save_adapter(net, tmp_path)
    assert peft_type(tmp_path).startswith("LORA_LIGHTNING_")


def test_a_layer_that_is_taken_for_a_plain_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the trial, merging a standardised kernel gives something else."""
    plain = [(fits, kind) for fits, kind in registry.LAYER_TYPES if "ByWeight" not in kind.__name__]
    monkeypatch.setattr(registry, "LAYER_TYPES", plain)
    net, x = network(*OF_WEIGHT["standardised"])
    inject_adapter(net, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    y = net(x)
    merge_adapter(net)
    assert (net(x) - y).abs().max() > 0.1


@pytest.mark.parametrize("option", ["lora_dropout", "groups", "lora_bias"])
def test_what_a_weight_cannot_hold_is_refused(option: str) -> None:
    groups = 2 if option == "groups" else 1
    make = lambda: Standardised(4, 6, 3, groups=groups, bias=option != "lora_bias")  # noqa: E731
    net, x = network(make, IMAGE)
    before = net(x)
    options: dict[str, Any] = {"lora_dropout": 0.1} if option == "lora_dropout" else {}
    options |= {"lora_bias": True} if option == "lora_bias" else {}
    with pytest.raises(ConfigError, match=r"'layer' \(Standardised\) has a forward of its own"):
        inject_adapter(net, LoraConfig(r=2, target_modules=["layer"], **options))
    assert type(net.layer) is Standardised
    assert bit_equal(net(x), before)


def test_rows_of_several_adapters_are_refused_where_they_share_a_weight() -> None:
    net, x = network(*OF_WEIGHT["standardised"])
    inject_adapter(net, LoraConfig(r=2, target_modules=["layer"]))
    refused = pytest.raises(AdapterStateError, match="rows share it")
    with adapters_per_row(net, ["default", None]), refused:
        net(x)


def base_output(net: nn.Module, x: Tensor) -> Tensor:
    with disable_adapter(net):
        return net(x)


LINEARS = {
    "times three": TimesThree,
    "cosine": Cosine,
    "few bits": FewBits,
    "clipped": Clipped,
    "rectified": Rectified,
}


@pytest.mark.parametrize("amount", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LINEARS)
def test_merging_into_another_function_is_refused(kind: str, dtype: Any, amount: float) -> None:
    torch.manual_seed(0)
    net = Net(nn.Sequential(nn.Linear(8, 8), LINEARS[kind](8, 8))).to(dtype)
    inject_adapter(net, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    with torch.no_grad():
        for layer in net.layer:
            layer.adapters["default"].lora_B.mul_(amount)
    x = torch.randn(ROWS).to(dtype)
    y, state = net(x), {key: tensor.clone() for key, tensor in net.state_dict().items()}
    shows = (y - base_output(net, x)).norm() > 0.1 * y.norm()
    if shows or dtype == torch.float32:
        for merge in (merge_adapter, merge_and_unload):
            with pytest.raises(AdapterStateError, match=r"'layer\.1'.*changes its output"):
                merge(net)
        assert bit_equal(net(x), y)
    else:  # so small an effect that bfloat16 does not show it
        merge_adapter(net)
        assert (net(x) - y).norm() <= 0.04 * y.norm()
        unmerge_adapter(net)
    assert all(bit_equal(net.state_dict()[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("cls", [Flattened, OfSequences, Counting])
def test_merging_into_the_same_function_works(cls: Any) -> None:
    torch.manual_seed(0)
    net = Net(cls(8, 8))
    inject_adapter(net, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(ROWS)
    y = net.eval()(x)
    net.train()
    calls, random = net.state_dict().get("layer.calls"), torch.get_rng_state()
    calls = None if calls is None else calls.clone()
    merge_adapter(net)
    assert net.layer.training
    assert torch.equal(torch.get_rng_state(), random)
    assert calls is None or net.layer.calls == calls
    torch.testing.assert_close(net.eval()(x), y)


def test_a_layer_that_cannot_be_tried_is_not_merged() -> None:
    net = Scored(8, 8)
    model = nn.ModuleDict({"layer": net})
    inject_adapter(model, LoraConfig(r=2, target_modules=["layer"]))
    x = torch.randn(ROWS)
    torch.testing.assert_close(model["layer"](x, 2.0), F.linear(x, net.weight, net.bias) * 2)
    with pytest.raises(AdapterStateError, match=r"'layer' \(Scored\).*cannot be tried"):
        merge_adapter(model)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_forward_patched_onto_the_instance_is_tried(factor: int) -> None:
    net = Net(nn.Linear(8, 8))
    own = net.layer.forward
    net.layer.forward = lambda x: own(x) * factor  # type: ignore[method-assign]
    inject_adapter(net, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(ROWS)
    y = net(x)
    if factor == 1:
        merge_adapter(net)
        torch.testing.assert_close(net(x), y)
    else:
        with pytest.raises(AdapterStateError, match="changes its output"):
            merge_adapter(net)


def test_oft_of_peft_on_a_kernel_is_refused(tmp_path: Path) -> None:
    """PEFT's forward there is not what it merges, not even without a rotation."""
    base = Net(nn.Conv2d(4, 6, 3))
    config = peft.OFTConfig(r=2, oft_block_size=0, target_modules=["layer"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"type OFT.*'layer' \(Conv2d\).*Merge it"):
        load_adapter(base, tmp_path)
    assert type(base.layer) is nn.Conv2d
    inject_adapter(base, OftConfig(r=2, oft_block_size=0, target_modules=["layer"]))
    with pytest.raises(AdapterMismatchError, match="type OFT"):
        hotswap_adapter(base, tmp_path)


@pytest.mark.parametrize("kind", ["causal", "same size, depthwise", "standardised", "slice"])
def test_compiled(kind: str) -> None:
    net, x = network(*(PADDING | OF_WEIGHT)[kind])
    inject_adapter(net, LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    y = net(x)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
