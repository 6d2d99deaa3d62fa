"""What "all-linear" and "all-layers" take and leave out: frozen submodules, kinds, sizes, routers."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_lightning import (
    AdaLoraConfig,
    Ia3Config,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    OftConfig,
    ShiraConfig,
    VeraConfig,
    adapter_status,
    delete_adapter,
    eva_start,
    inject_adapter,
    load_adapter,
    save_adapter,
)
from lora_lightning.engine.construction import BuildContext
from lora_lightning.engine.injection import extend_adapter
from lora_lightning.engine.targets.outputs import output_obstacle
from lora_lightning.engine.targets.selection import Selection, select_modules
from lora_lightning.errors import RankError, TargetError
from tests.helpers.messages import message_of
from tests.helpers.unchanged import unchanged_check


def mlp(*, frozen: bool = False) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return layers.requires_grad_(not frozen)


def modules(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(parts)


def distillation() -> nn.ModuleDict:
    return modules(student=mlp(), teacher=mlp(frozen=True))


def selected(model: nn.Module, **options: object) -> Selection:
    return select_modules(model, LoraConfig(r=2, **options))


# -- what the user froze -----------------------------------------------------------------------


def test_a_frozen_submodule_is_left_alone_and_named() -> None:
    model = distillation()
    x, y = torch.randn(4, 8), model["student"](torch.zeros(1, 8))
    before = model["teacher"](x)
    selection = inject_adapter(model, LoraConfig(r=2))
    assert list(selection.targets) == ["student.0", "student.2"]
    assert selection.passed_over.frozen == {"teacher": ["teacher.0", "teacher.2"]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(3):
        (model["student"](x) - model["teacher"](x)).square().mean().backward()
        optimizer.step()
    assert torch.equal(model["teacher"](x), before)
    assert not torch.equal(model["student"](torch.zeros(1, 8)), y)


@pytest.mark.parametrize("targets", [["teacher.0"], r"teacher\.0"])
def test_a_frozen_submodule_is_adapted_by_its_name(targets: list[str] | str) -> None:
    assert list(selected(distillation(), target_modules=targets).targets) == ["teacher.0"]


def partly_frozen() -> nn.ModuleDict:
    model = modules(student=mlp(), teacher=mlp())
    model["teacher"][0].requires_grad_(False)
    return model


def only_norms_train() -> nn.ModuleDict:
    return modules(body=mlp(frozen=True), norm=nn.LayerNorm(8))


def only_biases_train() -> nn.ModuleDict:
    model = modules(body=mlp())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    return model


def blocks_frozen() -> nn.ModuleDict:
    model = modules(layers=nn.ModuleList(mlp() for _ in range(3)), head=nn.Linear(8, 2))
    model["layers"][0].requires_grad_(False)
    model["layers"][1].requires_grad_(False)
    return model


BOTH = ["student.0", "student.2", "teacher.0", "teacher.2"]
BODY = ["body.0", "body.2"]


@pytest.mark.parametrize(
    ("build", "options", "targets", "frozen"),
    [
        (partly_frozen, {}, ["student.0", "student.2", "teacher.2"], ["teacher.0"]),
        # As a whole, by hand, before it gets adapters: that says nothing about where.
        (lambda: distillation().requires_grad_(False), {}, BOTH, []),
        (lambda: distillation().requires_grad_(False).eval(), {}, BOTH, []),
        (only_norms_train, {}, BODY, []),
        (only_biases_train, {}, BODY, []),
        (blocks_frozen, {}, ["layers.2.0", "layers.2.2", "head"], ["layers.0", "layers.1"]),
        # A linear probe, said in the table; the rest of it where the head trains in full
        (lambda: modules(body=mlp(frozen=True), head=nn.Linear(8, 2)), {}, ["head"], ["body"]),
        (
            lambda: modules(body=mlp(frozen=True), head=nn.Linear(8, 2)),
            {"modules_to_save": ["head"]},
            BODY,
            [],
        ),
        (
            lambda: modules(body=mlp(frozen=True), head=nn.Linear(8, 2)),
            {"exclude_modules": ["head"]},
            BODY,
            [],
        ),
        (distillation, {"target_modules": "all-layers"}, ["student.0", "student.2"], ["teacher"]),
    ],
)
def test_what_counts_as_frozen(build, options, targets, frozen) -> None:
    selection = selected(build(), **options)
    assert list(selection.targets) == targets
    assert list(selection.passed_over.frozen) == frozen


def second_adapter(model: nn.Module) -> nn.Module:
    return model


def taken_off(model: nn.Module) -> nn.Module:
    delete_adapter(model, "default")
    return model


@pytest.mark.parametrize(
    "then",
    [second_adapter, taken_off, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["second", "taken off", "copied", "pickled"],
)
def test_what_adapters_froze_is_not_what_the_user_froze(then) -> None:
    model = distillation()
    inject_adapter(model, LoraConfig(r=2))
    selection = inject_adapter(then(model), LoraConfig(r=2), "again")
    assert list(selection.targets) == ["student.0", "student.2"]
    assert list(selection.passed_over.frozen) == ["teacher"]


def test_tied_weights_are_all_free() -> None:
    """The second owner of a weight is not frozen because the first one was just now."""
    model = modules(one=nn.Linear(8, 8, bias=False), two=nn.Linear(8, 8, bias=False), three=mlp())
    model["two"].weight = model["one"].weight
    inject_adapter(model, LoraConfig(r=2, target_modules=["three.0"]))
    assert "two" in inject_adapter(model, LoraConfig(r=2), "second").targets


def test_a_refusal_leaves_no_trace_of_freezing() -> None:
    model = distillation()
    unchanged = unchanged_check(model)
    message_of(RankError, lambda: inject_adapter(model, LoraConfig(target_modules=["0"], r=99)))
    message_of(TargetError, lambda: inject_adapter(model, LoraConfig(target_modules=["1"])))
    unchanged()


def test_what_is_left_when_only_a_frozen_network_has_linears() -> None:
    model = modules(generator=nn.Conv2d(3, 3, 3), features=mlp(frozen=True))
    text = message_of(TargetError, lambda: inject_adapter(model, LoraConfig(r=2)))
    assert (
        "not trained: features; to adapt it, name its layers, target_modules: [features.0" in text
    )
    assert "left out by 'all-linear': 1 Conv2d; target_modules: all-layers takes them" in text
    assert list(selected(model, target_modules="all-layers").targets) == ["generator"]


# -- kinds of layers -----------------------------------------------------------------------------


def convolutions() -> nn.ModuleDict:
    return modules(
        table=nn.Embedding(5, 8),
        body=nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3)),
        up=nn.ConvTranspose1d(8, 8, 3),
        attention=nn.MultiheadAttention(8, 2),
        head=nn.Linear(8, 2),
    )


def test_layers_of_other_kinds_are_counted() -> None:
    left_out = selected(convolutions()).passed_over
    assert left_out.kinds == {"Embedding": 1, "Conv1d": 2, "MultiheadAttention": 1}
    assert left_out.lines() == [
        "left out by 'all-linear': 1 Embedding, 2 Conv1d, 1 MultiheadAttention; "
        "target_modules: all-layers takes them, too (lora.target_modules)"
    ]
    model = convolutions()
    inject_adapter(model, LoraConfig(r=2))  # which changes the classes
    assert selected(model).passed_over.kinds == left_out.kinds
    options = {"target_modules": ["head"]}
    assert not selected(convolutions(), **options).passed_over.lines()


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (LoraConfig(r=2), set()),
        (AdaLoraConfig(init_r=2, target_r=1), {"table"}),
        (LohaConfig(r=2), {"table"}),
        (LokrConfig(r=2), {"table"}),
        (OftConfig(oft_block_size=2), set()),
        (Ia3Config(), {"table"}),
        (ShiraConfig(r=1), {"table", "body.0", "body.2"}),
        (VeraConfig(r=2), {"table", "body.0", "body.2"}),
    ],
)
def test_all_layers_takes_every_kind_that_can_carry_the_type(config, left) -> None:
    every = {"table", "body.0", "body.2", "attention", "attention.out_proj", "head"}
    config = replace(config, target_modules="all-layers")
    assert set(inject_adapter(convolutions(), config).targets) == every - left


def test_all_layers_leaves_out_what_the_options_do_not_fit() -> None:
    def depthwise() -> nn.Module:
        return modules(
            depthwise=nn.Conv2d(6, 6, 3, groups=6), plain=nn.Conv2d(6, 6, 1), head=nn.Linear(6, 6)
        )

    options = {"target_modules": "all-layers"}
    model = depthwise()
    selection = inject_adapter(model, LoraConfig(r=4, **options))
    assert list(selection.targets) == ["plain", "head"]
    assert "6 groups of 'depthwise'" in selection.passed_over.unfit["depthwise"]
    assert type(model["depthwise"]) is nn.Conv2d
    assert len(inject_adapter(depthwise(), LoraConfig(r=6, **options)).targets) == 3
    pissa = inject_adapter(depthwise(), LoraConfig(init_lora_weights="pissa", **options))
    assert list(pissa.passed_over.unfit) == ["depthwise", "plain"]
    text = message_of(
        RankError,
        lambda: inject_adapter(
            modules(only=nn.Conv2d(6, 6, 3, groups=6)), LoraConfig(r=4, **options)
        ),
    )
    assert "6 groups of 'only'" in text


def test_all_layers_leaves_a_table_alone_that_is_tied_to_the_head() -> None:
    model = modules(table=nn.Embedding(5, 8), body=nn.Linear(8, 8), head=nn.Linear(8, 5))
    model["head"].weight = model["table"].weight
    selection = selected(model, target_modules="all-layers")
    assert list(selection.targets) == ["body", "head"]
    assert selection.passed_over.unfit == {"table": "its weight is that of head, too"}


def test_all_layers_beside_trained_token_rows() -> None:
    model = modules(table=nn.Embedding(5, 8), body=nn.Linear(8, 8))
    options = {"target_modules": "all-layers", "trainable_token_indices": {"table": [1]}}
    assert list(selected(model, **options).targets) == ["body"]


@pytest.mark.parametrize("option", ["modules_to_save", "exclude_modules"])
def test_when_the_only_linear_is_taken_away_convolutions_are_named(option: str) -> None:
    model = modules(
        body=nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), head=nn.Linear(8, 2)
    )
    text = message_of(TargetError, lambda: selected(model, **{option: ["head"]}))
    assert f"{option}=['head'] takes out all that target_modules='all-linear' selects" in text
    assert "2 Conv2d; target_modules: all-layers takes them" in text
    found = selected(model, target_modules="all-layers", **{option: ["head"]})
    assert list(found.targets) == ["body.0", "body.1"]


def test_a_folder_of_all_layers_names_them_for_peft(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2))

    model, x = build(), torch.randn(2, 3, 6, 6)
    inject_adapter(model, LoraConfig(r=2, target_modules="all-layers", init_lora_weights=False))
    save_adapter(model, tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["target_modules"] == ["0", "3"]
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path))
    assert torch.allclose(theirs(x), model(x), atol=1e-6)
    assert not torch.allclose(theirs(x), build()(x), atol=1e-2)


# -- ranks that small layers do not have ---------------------------------------------------------


def critic() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


@pytest.mark.parametrize(
    ("config", "ranks", "pattern"),
    [
        (LoraConfig(), [8, 1], {"^2": 1}),
        (LoraConfig(r=20), [16, 1], {"^0": 16, "^2": 1}),
        (LoraConfig(use_dora=True, use_rslora=True), [8, 1], {"^2": 1}),
        (LoraConfig(init_lora_weights="pissa"), [8, 1], {"^2": 2}),  # twice: see `file_options`
        (LoraConfig(rank_pattern={"0": 4}), [4, 1], {"0": 4, "^2": 1}),
        (LohaConfig(), [8, 1], {"^2": 1}),
        (AdaLoraConfig(), [12, 1], {"2.lora_E": [True, *[False] * 11]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")  # of peft
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_a_small_layer_gets_the_rank_that_it_has(config, ranks, pattern, tmp_path: Path) -> None:
    model, x = critic(), torch.randn(5, 16)
    inject_adapter(model, config)
    assert [model[i].adapters["default"].r for i in (0, 2)] == ranks
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["rank_pattern"] == pattern
    theirs = peft.PeftModel.from_pretrained(critic(), str(tmp_path)).eval()
    again = critic()
    load_adapter(again, tmp_path)
    expected = model.eval()(x)
    assert torch.allclose(theirs(x), expected, atol=1e-6)
    assert torch.equal(again.eval()(x), expected)
    assert not torch.allclose(critic()(x), expected, atol=1e-2)


@pytest.mark.parametrize("config", [Ia3Config(feedforward_modules=["2"]), VeraConfig(r=2)])
def test_options_that_look_at_all_targets_together(config) -> None:
    model = critic()
    assert len(inject_adapter(model, config).targets) == 2
    assert len(inject_adapter(critic(), config).targets) == 2
    assert len(extend_adapter(model, BuildContext(config, "default")).targets) == 2


def test_eva_shares_out_the_ranks_that_there_are() -> None:
    model = critic()
    batches = [torch.randn(64, 16) for _ in range(3)]
    config, start = eva_start(model, LoraConfig(r=8, init_lora_weights="eva"), batches, model)
    assert sum(len(a) for a in start.values()) == 8 + 1
    inject_adapter(model, config, start=start)
    assert model[2].adapters["default"].r == 1


def test_the_scaling_is_that_of_the_rank() -> None:
    model, x = critic(), torch.randn(5, 16, dtype=torch.float64)
    inject_adapter(model.double(), LoraConfig(lora_alpha=4, init_lora_weights=False))
    layer = model[2]
    a, b = (layer.adapters["default"].get_parameter(f"lora_{name}") for name in "AB")
    expected = x @ (layer.weight + 4 / 1 * b @ a).T + layer.bias
    assert torch.allclose(layer(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["0", "2"]},
        {"target_modules": "0|2"},
        {"rank_pattern": {"2": 8}},
        {"rank_pattern": {".*": 8}},
    ],
)
def test_a_rank_that_was_asked_for_by_name_stays_an_error(options: dict[str, object]) -> None:
    text = message_of(RankError, lambda: inject_adapter(critic(), LoraConfig(**options)))
    assert "r=8 is larger than '2' (weight (1, 16)) allows: at most 1" in text


def test_what_is_too_small_for_the_type_is_left_out() -> None:
    selection = inject_adapter(critic(), ShiraConfig(r=2))
    assert list(selection.targets) == ["0"]
    assert selection.passed_over.unfit["2"].startswith("r=2 asks for 34 entries of '2'")
    text = message_of(RankError, lambda: inject_adapter(critic(), ShiraConfig(r=32)))
    assert "at most r=8 fits" in text
    narrow = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8))
    assert list(inject_adapter(narrow, OftConfig(oft_block_size=4)).targets) == ["1"]


# -- layers that return no tensor -----------------------------------------------------------------


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores, scores.topk(1, dim=-1).indices


class Indirect(nn.Linear):
    def forward(self, x):
        return self.route(super().forward(x))

    def route(self, scores):
        return {"scores": scores}


class WhileTraining(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return (y, y.sum()) if self.training else y


class TakesMore(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x) * mask, mask


class Streaming(nn.Conv1d):
    def forward(self, x, mask=None):
        return super().forward(x), mask


class Masking(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids), ids == 0


class Doubling(nn.Linear):
    calls = 0

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        return 2 * super().forward(x)


ROUTERS = {
    "a tuple": (partial(Router, 8, 4), "tuple"),
    "a dict, by a method": (partial(Indirect, 8, 4), "dict"),
    "a tuple in training": (partial(WhileTraining, 8, 4), "tuple"),
    "by its annotation": (partial(TakesMore, 8, 4), "tuple"),
}


@pytest.mark.parametrize(("build", "kind"), ROUTERS.values(), ids=ROUTERS)
def test_a_layer_that_returns_no_tensor(build, kind: str) -> None:
    model = modules(router=build(), body=mlp())
    selection = selected(model, target_modules="all-layers")
    assert list(selection.targets) == BODY
    reason = f"its forward returns a {kind}, not a tensor"
    assert selection.passed_over.unfit == {"router": reason}
    for targets in (["router", "body.0"], "router"):
        text = message_of(TargetError, lambda t=targets: selected(model, target_modules=t))
        assert f"selects 'router', a {type(model['router']).__name__}, but {reason}" in text
        assert "exclude_modules: [router]" in text
    assert list(selected(model, target_modules=["router", "0"], exclude_modules=["router"]).targets)


def test_other_kinds_may_return_what_they_like() -> None:
    """Adapters change their weight, where their forward is not torch's own."""
    model = modules(conv=Streaming(8, 4, 3), table=Masking(8, 4), body=mlp())
    config = LoraConfig(r=2, target_modules="all-layers", init_lora_weights=False)
    assert list(inject_adapter(model, config).targets) == ["conv", "table", *BODY]
    x, conv = torch.randn(2, 8, 6), model["conv"]
    adapter = conv.adapters["default"]
    delta = torch.einsum("or,rik->oik", adapter.lora_B[..., 0], adapter.lora_A) * 8 / 2
    y, mask = conv(x, "mask")
    expected = nn.functional.conv1d(x, conv.weight + delta, conv.bias)
    assert torch.allclose(y, expected, atol=1e-5)
    assert mask == "mask"
    assert model["table"](torch.tensor([0, 1]))[1].tolist() == [True, False]


def test_trying_a_layer_leaves_no_trace() -> None:
    layer = Doubling(8, 4)
    unchanged, state = unchanged_check(layer), torch.get_rng_state()
    assert output_obstacle(layer) is None
    unchanged()
    assert layer.calls == len(layer.seen) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert list(selected(modules(layer=layer)).targets) == ["layer"]


def test_a_layer_that_turns_out_to_return_no_tensor_says_so_at_once() -> None:
    layer = nn.Linear(8, 8)
    plain = layer.forward
    layer.forward = lambda x: (plain(x), x)
    model = modules(block=modules(router=layer), body=mlp())
    inject_adapter(model, LoraConfig(r=2))
    text = message_of(TargetError, lambda: model["block"]["router"](torch.zeros(1, 8)))
    assert text.startswith("'block.router' (Linear) returned a tuple, not a tensor")
    assert "exclude_modules: ['block.router']" in text


@pytest.mark.parametrize("kind", ["Llama4", "Phimoe"])
def test_routers_of_transformers(kind: str) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    if kind == "Llama4":
        sizes |= {"intermediate_size_mlp": 16, "head_dim": 8, "pad_token_id": 0}
    config = getattr(transformers, "Llama4TextConfig" if kind == "Llama4" else "PhimoeConfig")
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**sizes))
    selection = inject_adapter(model, LoraConfig(r=2))
    assert [path.rpartition(".")[2] for path in selection.passed_over.unfit] == ["router"]
    assert not any("router" in path for path in selection.targets)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert not adapter_status(model).idle


# -- parameters alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"target_modules": None}, {"target_modules": []}])
def test_parameters_alone(options: dict[str, object]) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_parameters=["0.weight"]))
    wanted = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in wanted} == {"0"}
    model = build()
    inject_adapter(model, LoraConfig(r=2, target_parameters=["0.weight"], **options))
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"0"}
    both = LoraConfig(r=2, target_parameters=["0.weight"], target_modules=["1"])
    assert list(inject_adapter(build(), both).targets) == ["1", "0"]


def test_the_default_is_all_linear() -> None:
    assert (
        LoraConfig().target_modules
        == "all-linear"
        == LoraConfig(target_modules=None).target_modules
    )
    assert OftConfig().target_modules == "all-linear"
    assert LoraConfig(target_parameters=["0.weight"]).target_modules == []


# -- exclusion and hints --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({"target_modules": ["0", "2"], "exclude_modules": ["0"]}, ["2"]),
        ({"target_modules": ["body.0", "2"], "exclude_modules": ["body.0"]}, ["body.2"]),
        ({"target_modules": ["0", "2"], "exclude_modules": r".*\.0"}, ["body.2"]),
    ],
)
def test_excluding_what_is_named_is_a_wish(options, targets) -> None:
    model = modules(body=mlp()) if "body" in str(targets) else mlp()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **options))
    assert theirs.targeted_module_names == targets
    assert list(selected(model, **options).targets) == targets


def test_a_name_that_is_in_no_module_is_an_error_beside_one_that_is_excluded() -> None:
    options = {"target_modules": ["0", "nowhere"], "exclude_modules": ["0"]}
    text = message_of(
        TargetError, lambda: selected(modules(body=mlp(), q=nn.Linear(8, 8)), **options)
    )
    assert "exclude_modules=['0'] takes out all" in text
    options = {"target_modules": ["0", "nowhere", "q"], "exclude_modules": ["0"]}
    text = message_of(
        TargetError, lambda: selected(modules(body=mlp(), q=nn.Linear(8, 8)), **options)
    )
    assert "1 of 3 names matched nothing" in text


def test_hints_name_what_can_be_adapted_as_one_would_type_it() -> None:
    model = modules(
        body=mlp(), norms=nn.LayerNorm(8), normal=nn.Linear(8, 8), emb=nn.Embedding(3, 8)
    )
    text = message_of(TargetError, lambda: selected(model, target_modules=["norm"]))
    assert "'norm' -> did you mean 'normal' (1 module)?" in text
    assert "Adaptable names in this model: body.0 x1, body.2 x1, normal x1, emb x1" in text
    text = message_of(TargetError, lambda: selected(model, target_modules=["bdy.0"]))
    assert "did you mean 'body.0' (1 module)?" in text
    text = message_of(TargetError, lambda: selected(model, target_modules="normall"))
    assert "did you mean 'normal' (1 module)?" in text
    text = message_of(TargetError, lambda: selected(model, exclude_modules=["norm"]))
    assert "excludes nothing. -> did you mean 'normal' (1 module)? Correct it" in text
    # Nor the very module that was asked for
    tokens = {"trainable_token_indices": {"norms": [1]}}
    text = message_of(TargetError, lambda: selected(model, **tokens))
    assert "'norms' is a LayerNorm, no nn.Embedding" in text
    assert "mean 'norms'" not in text
    text = message_of(TargetError, lambda: selected(model, trainable_token_indices={"embb": [1]}))
    assert "did you mean 'emb' (1 module)?" in text


def test_the_nearest_module_is_never_the_module_itself(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = mlp()
    inject_adapter(model, LoraConfig(r=2))
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {
        k.replace("lora_A.weight", "a.b.c.lora_A.weight"): v for k, v in load_file(file).items()
    }
    save_file(tensors, file)
    from lora_lightning.errors import AdapterMismatchError

    text = message_of(AdapterMismatchError, lambda: load_adapter(mlp(), tmp_path))
    assert "Nearest module: '0'" not in text
