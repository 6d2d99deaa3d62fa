"""An adapter grows on a module and the module stays itself: class, names, copies, fast paths."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lora_lightning import (
    LoraConfig,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter_state_dict,
    merge_adapter,
    set_adapter,
    unload,
)
from lora_lightning.adapters.base import AdapterDict
from lora_lightning.adapters.lora.linear import LoraAdapter
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers import autocast_cache as shared_cast
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters
from tests.helpers.tensors import bit_equal, randomize, trainable
from tests.helpers.torch_models import (
    LAYERS,
    WIDTH,
    Attention,
    OneLayerNet,
    ScaledEmbedding,
    Transformer,
    example_input,
    token_ids,
)

PROJ = LoraConfig(r=2, target_modules=["proj"])


class Doubled(nn.Linear):
    """A user's Linear with a forward of its own, a buffer, and constructor arguments."""

    def __init__(self, factor: float, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("factor", torch.tensor(factor))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return super().forward(x) * self.factor


def adapted(model: nn.Module, config: LoraConfig = PROJ, name: str = "default") -> nn.Module:
    inject_adapter(model, config, name)
    randomize(p for key, p in named_parameters(model) if f".adapters.{name}." in key)
    return model


# -- the module stays itself -------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_start_is_bit_equal_and_the_old_state_dict_loads(layer):
    base = OneLayerNet(layer)
    model = copy.deepcopy(base)
    inject_adapter(model, PROJ)
    x = example_input(layer)
    assert bit_equal(model(x), base(x))
    for before, after in zip(base.modules(), model.modules(), strict=False):
        if after is model.layers[0].proj:
            assert isinstance(after, type(before))
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert len(result.missing_keys) == 4
    assert all(".adapters.default." in key for key in result.missing_keys)
    names = dict(base.named_parameters()).keys()
    assert [n for n, _ in model.named_parameters() if ".adapters." not in n] == list(names)


@pytest.mark.parametrize("layer", LAYERS)
def test_deepcopy_pickle_and_torch_save(layer):
    model = adapted(
        OneLayerNet(layer), LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"])
    )
    randomize([model.head.adapters["default"].module.weight])
    x = example_input(layer)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False),
    }
    for how, other in copies.items():
        assert bit_equal(other(x), expected), how
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()], how
        assert trainable(other).keys() == trainable(model).keys(), how
        randomize(trainable(other).values())
        assert not torch.equal(other(x), expected), how
        assert bit_equal(model(x), expected), f"{how} shares tensors"
        unload(other)
        assert type(other.layers[0].proj) is type(LAYERS[layer]()), how


def test_repr_shows_module_rank_and_alpha():
    model = adapted(nn.Sequential(nn.Linear(3, 4)), LoraConfig(r=2, lora_alpha=5))
    text = repr(model)
    assert "Linear(\n" in text
    assert "in_features=3, out_features=4, bias=True" in text
    assert "r=2, lora_alpha=5" in text


def parametrized(module: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(module, "weight", nn.Tanh())
    return module


def patched(module: nn.Linear) -> nn.Linear:
    """As accelerate does it: a partial on the instance that ends in the bound old forward."""
    old = module.forward
    module.forward = functools.partial(lambda self, x: old(x) + 1, module)
    return module


SPECIAL = {
    "plain": lambda: nn.Linear(6, 5),
    "subclass": lambda: Doubled(2.0, 6, 5),
    "parametrized": lambda: parametrized(nn.Linear(6, 5)),
    "parametrized-subclass": lambda: parametrized(Doubled(3.0, 6, 5)),
    "patched": lambda: patched(nn.Linear(6, 5)),
    "patched-subclass": lambda: patched(Doubled(2.0, 6, 5)),
}


@pytest.mark.parametrize("build", SPECIAL.values(), ids=SPECIAL)
def test_two_adapters_on_and_off_leave_no_trace(build):
    module = build()
    model = nn.Sequential(OrderedDict(proj=module))
    x = torch.randn(3, 6)
    cls, attributes, children = type(module), dict(module.__dict__), list(module._modules)
    keys = list(model.state_dict())
    base = model(x)

    adapted(model, LoraConfig(r=2, lora_alpha=6, target_modules=["proj"]))
    adapted(model, LoraConfig(r=3, target_modules=["proj"]), "second")
    assert isinstance(module, cls)
    set_adapter(model, ["default", "second"])
    deltas = [
        s * a.lora_B @ a.lora_A for s, a in zip((3, 8 / 3), module.adapters.values(), strict=True)
    ]
    torch.testing.assert_close(model(x), base + x @ sum(deltas).T)
    with disable_adapter(model):
        assert bit_equal(model(x), base)

    delete_adapter(model, "default")
    torch.testing.assert_close(model(x), base + x @ deltas[1].T)
    assert type(module) is not cls
    delete_adapter(model, "second")
    assert type(module) is cls
    assert module.__dict__.keys() == attributes.keys()
    assert module.__dict__.get("forward") is attributes.get("forward")
    assert list(module._modules) == children
    assert list(model.state_dict()) == keys
    assert bit_equal(model(x), base)


def test_unload_of_a_module_wrapped_later_is_refused_and_changes_nothing():
    model = adapted(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), LoraConfig(r=2))
    parametrized(model[1])
    x = torch.randn(3, 6)
    expected, keys = model(x), list(model.state_dict())
    with pytest.raises(AdapterStateError) as caught:
        unload(model)
    assert "was wrapped by other code after its adapters were added" in str(caught.value)
    assert list(model.state_dict()) == keys
    assert bit_equal(model(x), expected)
    parametrize.remove_parametrizations(model[1], "weight")
    unload(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


def test_modules_may_be_called_by_keyword_as_before():
    linear, embedding = nn.Linear(3, 4), nn.Embedding(5, 4)
    model = adapted(nn.Sequential(linear, embedding), LoraConfig(r=2, target_modules=["0", "1"]))
    x, ids = torch.randn(2, 3), torch.tensor([1, 4])
    assert torch.equal(model[0](input=x), model[0](x))
    assert torch.equal(model[1](input=ids), model[1](ids))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4))

    def forward(self, ids: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.table * scale if ids is None else self.table[ids]


def test_a_trained_copy_is_called_like_the_module():
    model = nn.ModuleDict({"lin": nn.Linear(4, 4), "positions": Positions()})
    inject_adapter(model, LoraConfig(r=2, target_modules=["lin"], modules_to_save=["positions"]))
    randomize(trainable(model).values())
    table = model["positions"].adapters["default"].module.table
    assert bit_equal(model["positions"](), table)
    assert bit_equal(model["positions"](scale=3.0), 3 * table)
    assert bit_equal(model["positions"](torch.tensor([1])), table[[1]])


def test_forward_hooks_still_fire_with_the_adapted_output():
    model = OneLayerNet("linear")
    seen = {"before": [], "after": []}
    proj = model.layers[0].proj
    proj.register_forward_pre_hook(lambda m, args: seen["before"].append(args[0]))
    proj.register_forward_hook(lambda m, args, y: seen["after"].append(y))
    x = example_input("linear")
    plain = proj(x)
    adapted(model)
    model(x)
    assert len(seen["before"]) == len(seen["after"]) == 2
    assert seen["before"][1] is x
    assert not torch.equal(seen["after"][1], plain)
    unload(model)
    assert bit_equal(proj(x), plain)
    assert len(seen["after"]) == 3


def test_one_module_under_two_names_gets_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    adapted(model, LoraConfig(r=2))
    assert [path for path, _ in named_adapted_layers(model)] == ["a"]
    assert len(trainable(model)) == 2


# -- what cannot be adapted --------------------------------------------------------------------


class OwnRun(nn.Linear):
    """Its method would be hidden by the layer's of the same name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        return super().forward(x)


def own_state() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear._enabled = "mine"
    return linear


class OwnAdapters(nn.Linear):
    adapters = ("taken",)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: OwnAdapters(3, 3), ["'0' (OwnAdapters)", "attribute `adapters` of its own"]),
        (lambda: OwnRun(3, 3), ["'0' (OwnRun)", "attribute `run` of its own"]),
        (own_state, ["'0' (Linear)", "attribute `_enabled` of its own"]),
        (
            lambda: nn.LazyLinear(3),
            ["'0' (LazyLinear)", "is lazy", "Run one batch through the model"],
        ),
        (lambda: torch.jit.script(nn.Linear(3, 3)), ["'0'", "scripted", "before torch.jit"]),
        (lambda: torch.jit.trace(nn.Linear(3, 3), torch.zeros(1, 3)), ["'0'", "scripted"]),
    ],
    ids=["own-adapters", "own-method", "own-state", "lazy", "scripted", "traced"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_refused_before_anything_is_touched(build, words, option):
    model = nn.Sequential(build(), nn.Linear(3, 3))
    options = {"target_modules": ["1"], "modules_to_save": ["0"]}
    if option == "target_modules":
        options = {"target_modules": ["0", "1"]}
    with pytest.raises(TargetError) as caught:
        inject_adapter(model, LoraConfig(r=2, **options))
    for word in [*words, f"(lora.{option})"]:
        assert word in str(caught.value)
    assert type(model[1]) is nn.Linear
    assert model[1].weight.requires_grad


# -- fast paths of torch's own transformer -----------------------------------------------------


def encoder(layers: int | None = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return layer if layers is None else nn.TransformerEncoder(layer, layers)


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
ENCODERS = {
    "layer": (lambda: encoder(None), {}),
    "layer-padding": (lambda: encoder(None), {"src_key_padding_mask": PADDING}),
    "encoder": (encoder, {}),
    "encoder-padding": (encoder, {"src_key_padding_mask": PADDING}),
}


@pytest.mark.parametrize("saved", [None, ["self_attn"], ["norm1"]], ids=str)
@pytest.mark.parametrize(("build", "kwargs"), ENCODERS.values(), ids=ENCODERS)
def test_transformer_encoder_adapts_in_eval_as_in_training(build, kwargs, saved):
    model = build()
    x = torch.randn(2, 5, 8)
    real = ~PADDING if kwargs else torch.ones(2, 5, dtype=torch.bool)
    with torch.inference_mode():
        base = model.eval()(x, **kwargs)
    closed = [m.__dict__.copy() for m in model.modules()]

    adapted(model, LoraConfig(r=2, modules_to_save=saved))
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = model.train()(x, **kwargs).detach()
    model.eval()
    with torch.inference_mode():
        found = model(x, **kwargs)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[real], base[real], atol=1e-3)
        with disable_adapter(model):
            assert bit_equal(model(x, **kwargs), base)
        torch.testing.assert_close(model(x, **kwargs), found)
    unload(model)
    with torch.inference_mode():
        assert bit_equal(model(x, **kwargs), base)
    for before, module in zip(closed, model.modules(), strict=True):
        assert before.keys() == module.__dict__.keys()
        for switch in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert before.get(switch) == module.__dict__.get(switch)


def test_without_closing_the_fast_path_adapters_would_be_bypassed():
    """The negative control of the test above: torch really has that road, and it really bypasses."""
    model = adapted(encoder(None).eval(), LoraConfig(r=2))
    x = torch.randn(2, 5, 8)
    with torch.inference_mode():
        right = model(x)
        model.activation_relu_or_gelu = 1
        wrong = model(x)
    assert not torch.allclose(right, wrong, atol=1e-3)


def test_dora_on_top_of_a_trained_copy_leaves_the_bias_of_the_copy_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapter(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]), "one")
    inject_adapter(model, LoraConfig(r=2, target_modules=["1"], use_dora=True), "two")
    set_adapter(model, ["one", "two"])
    randomize(p for name, p in named_parameters(model[1]) if ".one." in name)
    copied, dora = model[1].adapters["one"].module, model[1].adapters["two"]
    with torch.no_grad():
        dora.lora_magnitude_vector *= 2
    x = torch.randn(3, 4)
    expected = 2 * model[0](x) @ copied.weight.T + copied.bias
    torch.testing.assert_close(model(x), expected)


def test_dora_on_rows_of_zeros_starts_as_a_no_op_and_learns():
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    model = nn.Sequential(linear)
    inject_adapter(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    x = torch.randn(5, 4)
    assert bit_equal(model(x), linear.bias.expand(5, 3))
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    assert model(x).isfinite().all()
    assert not torch.allclose(model(x), linear.bias.expand(5, 3))


def test_dropout_drops_no_token_ids():
    model = nn.Sequential(nn.Embedding(5, 4))
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    inject_adapter(model.train(), config)
    ids = torch.arange(5)
    randomize(trainable(model).values())
    assert bit_equal(model(ids), model.eval()(ids))


def test_attention_inside_a_trained_copy_runs():
    model = nn.ModuleDict(
        {"mha": nn.MultiheadAttention(8, 2, batch_first=True), "l": nn.Linear(8, 8)}
    )
    x = torch.randn(2, 5, 8)
    base = model["mha"](x, x, x)[0]
    inject_adapter(model, LoraConfig(r=2, modules_to_save=["mha"]))
    assert bit_equal(model["mha"](x, x, x)[0], base)
    assert set(trainable(model)) >= {"mha.adapters.default.module.in_proj_weight"}


# -- precision ---------------------------------------------------------------------------------


def saved_for_backward(model: nn.Module, *args: Tensor) -> list[Tensor]:
    """What autograd keeps; the list keeps it alive too, so that no storage is used twice."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*args)
    return kept


def copies_of(x: Tensor, kept: list[Tensor]) -> int:
    """Distinct half-precision copies of x among the kept tensors."""
    narrow = x.to(torch.bfloat16)
    return len(
        {
            tensor.untyped_storage().data_ptr()
            for tensor in kept
            if tensor.dtype == torch.bfloat16
            and tensor.numel() == x.numel()
            and torch.equal(tensor.reshape(x.shape), narrow)
        }
    )


@pytest.mark.parametrize("needs_grad", [False, True])
def test_q_k_and_v_share_one_autocast_copy_of_x(needs_grad, monkeypatch):
    model = adapted(Attention(), LoraConfig(r=2, target_modules=["q", "k", "v"]))
    x = torch.randn(4, 5, WIDTH, requires_grad=needs_grad)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_for_backward(model, x)
        shared = model(x)
        assert copies_of(x, kept) == 1
        # The negative control: a cast per layer.
        monkeypatch.setattr("lora_lightning.layers.linear.autocast_input", lambda x: x.bfloat16())
        assert copies_of(x, saved_for_backward(model, x)) == 3
        assert bit_equal(model(x), shared)


def test_the_shared_cast_is_never_stale():
    cast = shared_cast.autocast_input
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            first = cast(x)
        assert not first.requires_grad
        second = cast(x)
        assert second.requires_grad
        assert cast(x) is second
        with torch.no_grad():
            x += 1
        assert torch.equal(cast(x), x.bfloat16())
        with torch.autocast("cpu", torch.float16):
            assert cast(x).dtype == torch.float16
        wide = x.double()
        assert cast(wide) is wide
        with torch.inference_mode():
            inside = cast(torch.ones(2))
            also = cast(x)
        assert inside.dtype == also.dtype == torch.bfloat16
        (cast(x).float().sum()).backward()  # not the one made in inference mode
    assert cast(x) is x
    assert x.grad is not None


def test_autocast_gives_a_users_own_forward_what_it_was_given():
    model = adapted(nn.Sequential(Doubled(2.0, 6, 5)), LoraConfig(r=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(3, 6)).dtype == torch.bfloat16
    assert model[0].seen == [torch.float32]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing_the_base_keeps_the_adapters_exact(layer, narrow):
    model = adapted(OneLayerNet(layer))
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    identities = {name: id(p) for name, p in trainable(model).items()}
    model.to(narrow)
    assert model.layers[0].proj.weight.dtype == narrow
    for name, parameter in trainable(model).items():
        assert bit_equal(parameter, before[name]), name
        assert id(parameter) == identities[name], name  # an optimizer built before still holds it
    assert model(example_input(layer, narrow)).dtype == narrow
    model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_adapters_are_fp32_or_wider(base):
    model = adapted(OneLayerNet("linear").to(base))
    expected = torch.float64 if base == torch.float64 else torch.float32
    assert {p.dtype for p in trainable(model).values()} == {expected}


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_a_bf16_base_never_widens_its_activations(layer):
    model = adapted(OneLayerNet(layer).bfloat16(), LoraConfig(r=2, target_modules=["proj"]))
    x = example_input(layer, torch.bfloat16).requires_grad_()
    own = {p.data_ptr() for p in model.parameters()}  # the fp32 masters are no activations
    kept = saved_for_backward(model.layers[0].proj, x)
    kept = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert any(tensor.numel() == x.numel() for tensor in kept)
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert max(tensor.numel() for tensor in kept) == x.numel()


@pytest.mark.parametrize("layer", LAYERS)
def test_bf16_outputs_are_near_float64(layer):
    """Within two roundings of bf16 (2^-8 relative each) of the exact value."""
    exact = adapted(OneLayerNet(layer).bfloat16().double())
    narrow = OneLayerNet(layer)
    narrow.load_state_dict({k: v for k, v in exact.state_dict().items() if ".adapters." not in k})
    narrow = adapted(narrow.bfloat16())
    for one, other in zip(trainable(narrow).values(), trainable(exact).values(), strict=True):
        other.data.copy_(one.data)
    x = example_input(layer, torch.bfloat16)
    wide = x.double() if x.is_floating_point() else x
    found, expected = narrow.layers[0].proj(x), exact.layers[0].proj(wide)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).abs().max() <= 2 * 2**-7 * expected.abs().max()


def test_adapters_are_found_by_type_not_by_name():
    """A base with modules called like ours and peft's parts is no adapter."""
    model = nn.ModuleDict({"lora_A": nn.Linear(3, 3), "exploration_head": nn.Linear(3, 3)})
    assert list(named_adapted_layers(model)) == []
    inject_adapter(model, LoraConfig(r=1, target_modules=["lora_A"]))
    assert [path for path, _ in named_adapted_layers(model)] == ["lora_A"]
    assert isinstance(model["lora_A"].adapters, AdapterDict)
    assert isinstance(model["lora_A"].adapters["default"], LoraAdapter)
    assert set(trainable(model)) == {
        "lora_A.adapters.default.lora_A",
        "lora_A.adapters.default.lora_B",
    }


def test_whole_transformer_through_state_dict_into_a_fresh_one():
    from lora_lightning import adapter_state_dict

    config = LoraConfig(r=2, target_modules=["q", "v", "mlp.0", "embed"], modules_to_save=["head"])
    base = Transformer()
    one = adapted(copy.deepcopy(base), config)
    other = copy.deepcopy(base)
    inject_adapter(other, config)
    load_adapter_state_dict(other, adapter_state_dict(one))
    assert bit_equal(one(token_ids()), other(token_ids()))
    merge_adapter(other)
    torch.testing.assert_close(other(token_ids()), one(token_ids()))


def test_scaled_embedding_with_a_plain_number():
    table = ScaledEmbedding(5, 4, 0)
    del table.embed_scale
    table.embed_scale = torch.tensor(2.0)
    model = adapted(nn.Sequential(table), LoraConfig(r=2, target_modules=["0"]))
    ids = torch.arange(5)
    adapter = table.adapters["default"]
    rows = table.weight + adapter.scaling * (adapter.lora_embedding_B @ adapter.lora_embedding_A).T
    torch.testing.assert_close(model(ids), 2 * rows)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, autocast):
    model = adapted(Attention(), LoraConfig(r=2))
    x = torch.randn(4, 5, WIDTH, requires_grad=True)

    def gradients(forward) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(x)
        x.grad = None
        model.zero_grad()
        y.float().square().sum().backward()
        return [x.grad, *(p.grad for p in trainable(model).values())]

    plain = gradients(model)
    found = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    noise = 0.05 if autocast else 1e-6  # gradients of x are summed in bf16, in another order
    for one, other in zip(found, plain, strict=True):
        assert (one - other).norm() <= noise * other.norm()
