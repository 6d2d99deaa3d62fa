"""Options are checked once, with words that help, and never change afterwards."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch

from lora_lightning import LoraConfig, inject_adapter
from lora_lightning.errors import ConfigError, LoraError, RankError

BAD = {  # options, error type, the whole message or its parts
    "r=0": ({"r": 0}, RankError, ["r is 0; a rank is an integer of at least 1. (lora.r)"]),
    "r=-1": ({"r": -1}, RankError, ["r is -1;", "(lora.r)"]),
    "r=2.0": ({"r": 2.0}, RankError, ["r is 2.0; a rank is an integer"]),
    "r='8'": ({"r": "8"}, RankError, ["r is '8'; a rank is an integer"]),
    "r=True": ({"r": True}, RankError, ["r is True; a rank is an integer"]),
    "rank_pattern": (
        {"rank_pattern": {"q": 0}},
        RankError,
        ["rank_pattern['q'] is 0; a rank is an integer of at least 1. (lora.rank_pattern"],
    ),
    "names": (
        {"target_modules": ["q", 1]},
        ConfigError,
        ["target_modules lists 1; names are strings: '1'. (lora.target_modules)"],
    ),
    "names that train in full": (
        {"modules_to_save": [0]},
        ConfigError,
        ["modules_to_save lists 0; names are strings: '0'. (lora.modules_to_save)"],
    ),
    "pattern of a number": (
        {"rank_pattern": {0: 4}},
        ConfigError,
        ["rank_pattern 0 is no regular expression", "(lora.rank_pattern)"],
    ),
    "layers_pattern": (
        {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "(["},
        ConfigError,
        ["layers_pattern '([' is no regular expression", "(lora.layers_pattern)"],
    ),
    "one token": (
        {"trainable_token_indices": 5},
        ConfigError,
        ["trainable_token_indices is 5; token ids are integers."],
    ),
    "alpha=0": (
        {"lora_alpha": 0},
        ConfigError,
        ["lora_alpha is 0; it must be a number above 0. (lora.lora_alpha)"],
    ),
    "alpha=nan": ({"lora_alpha": float("nan")}, ConfigError, ["lora_alpha is nan;"]),
    "alpha=inf": ({"lora_alpha": float("inf")}, ConfigError, ["lora_alpha is inf;"]),
    "alpha=None": ({"lora_alpha": None}, ConfigError, ["lora_alpha is None;"]),
    "alpha_pattern": (
        {"alpha_pattern": {"q": -1}},
        ConfigError,
        ["alpha_pattern['q'] is -1; it must be a number above 0. (lora.alpha_pattern"],
    ),
    "dropout=1": (
        {"lora_dropout": 1.0},
        ConfigError,
        ["lora_dropout is 1.0; it is a probability, 0 <= p < 1. (lora.lora_dropout)"],
    ),
    "dropout<0": ({"lora_dropout": -0.1}, ConfigError, ["lora_dropout is -0.1;"]),
    "dropout=nan": ({"lora_dropout": float("nan")}, ConfigError, ["lora_dropout is nan;"]),
    "dropout='a'": ({"lora_dropout": "a"}, ConfigError, ["lora_dropout is 'a';"]),
    "init typo": (
        {"init_lora_weights": "gausian"},
        ConfigError,
        [
            "init_lora_weights is 'gausian'; known values: True, False, 'gaussian', ",
            "Did you mean 'gaussian'?",
            "(lora.init_lora_weights)",
        ],
    ),
    "unknown init": ({"init_lora_weights": "corda"}, ConfigError, ["known values: True"]),
    "dora='no'": (
        {"use_dora": "no"},
        ConfigError,
        ["use_dora is 'no'; known values: True, False. (lora.use_dora)"],
    ),
    "bias and dora": ({"lora_bias": True, "use_dora": True}, ConfigError, ["(lora.lora_bias)"]),
    "init=1": ({"init_lora_weights": 1}, ConfigError, ["init_lora_weights is 1;"]),
    "bias typo": (
        {"bias": "lora-only"},
        ConfigError,
        [
            "bias is 'lora-only'; known values: 'none', 'lora_only', 'all'.",
            "Did you mean 'lora_only'?",
            "(lora.bias)",
        ],
    ),
    "bias=None": ({"bias": None}, ConfigError, ["bias is None; known values: 'none'"]),
    "no targets": (
        {"target_modules": []},
        ConfigError,
        [
            "target_modules is []: nothing would be adapted.",
            "Use 'all-linear', a list of module names, or a regular expression.",
            "(lora.target_modules)",
        ],
    ),
    "empty target": ({"target_modules": ""}, ConfigError, ["target_modules is '': nothing"]),
    "saved as a string": (
        {"modules_to_save": "head"},
        ConfigError,
        [
            "modules_to_save is the string 'head'; it is a list of names: ['head'].",
            "(lora.modules_to_save)",
        ],
    ),
    "layers with all-linear": (
        {"layers_to_transform": [1]},
        ConfigError,
        [
            "layers_to_transform cannot be combined with target_modules='all-linear'",
            "it only narrows a list of names.",
            "List the names, or put the layer index into the regular expression.",
            "(lora.layers_to_transform)",
        ],
    ),
    "layers_pattern with a regex": (
        {"target_modules": ".*q", "layers_pattern": "h"},
        ConfigError,
        ["layers_pattern cannot be combined with target_modules='.*q'", "(lora.layers_pattern)"],
    ),
    "layers_pattern alone": (
        {"target_modules": ["q"], "layers_pattern": "h"},
        ConfigError,
        [
            "layers_pattern='h' says where to count layers, but layers_to_transform does not say",
            "Set both or neither.",
            "(lora.layers_to_transform)",
        ],
    ),
    "broken regex": (
        {"target_modules": "layers.(q"},
        ConfigError,
        ["target_modules", "'layers.(q'", "regular expression", "(lora.target_modules)"],
    ),
    "broken exclusion": (
        {"exclude_modules": "*q"},
        ConfigError,
        ["exclude_modules", "'*q'", "regular expression", "(lora.exclude_modules)"],
    ),
    "broken rank_pattern": (
        {"rank_pattern": {"(q": 2}},
        ConfigError,
        ["rank_pattern", "'(q'", "regular expression", "(lora.rank_pattern)"],
    ),
}


@pytest.mark.parametrize(("options", "kind", "parts"), BAD.values(), ids=BAD)
def test_message(options, kind, parts):
    with pytest.raises(LoraError) as caught:
        LoraConfig(**options)
    assert type(caught.value) is kind
    assert isinstance(caught.value, ValueError)
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_dict({"r": 4, "lora_aplha": 8})
    assert str(caught.value) == (
        "Unknown LoraConfig option 'lora_aplha'. Did you mean 'lora_alpha'? (lora.lora_aplha)"
    )
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_dict({"zzz": 4})
    for name in [
        "Unknown LoraConfig option 'zzz'",
        "Known options: target_modules,",
        "bias",
        "(lora.zzz)",
    ]:
        assert name in str(caught.value)


FULL = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "use_dora": True,
    "lora_bias": False,
    "init_lora_weights": "gaussian",
    "eva_config": None,
    "loftq_config": None,
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": {"embed": [1, 2]},
    "target_modules": ["q", "v"],
    "exclude_modules": ["k"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "h",
    "rank_pattern": {"q": 2},
    "alpha_pattern": {"v": 3.5},
    "modules_to_save": ["head"],
    "bias": "lora_only",
}


def test_to_dict_and_back():
    assert {field.name for field in dataclasses.fields(LoraConfig)} == set(FULL)
    config = LoraConfig(**FULL)
    assert config.to_dict() == FULL
    assert LoraConfig.from_dict(config.to_dict()) == config
    assert LoraConfig.from_dict(LoraConfig().to_dict()) == LoraConfig()


def test_names_and_defaults_are_pefts():
    theirs = peft.LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        # peft has a table of model types instead of a default; and LoftQ on unrounded bases only
        if field.name not in ("target_modules", "loftq_config"):
            assert getattr(LoraConfig(), field.name) == getattr(theirs, field.name), field.name


def test_a_config_never_changes():
    config = LoraConfig(**FULL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 5
    out = config.to_dict()
    out["target_modules"].append("x")
    out["rank_pattern"]["x"] = 1
    assert config.to_dict() == FULL


@pytest.mark.parametrize("key", [key for key, v in FULL.items() if isinstance(v, (list, dict))])
def test_the_callers_lists_stay_the_callers(key):
    mine = FULL[key].copy()
    config = LoraConfig(**{**FULL, key: mine})
    mine.clear()
    assert getattr(config, key) == FULL[key]


def test_lists_inside_of_options_are_copies_too():
    tokens = {"embed": [1]}
    config = LoraConfig(trainable_token_indices=tokens)
    tokens["embed"].append(2)
    assert config.trainable_token_indices == {"embed": [1]}


def test_no_pattern_is_an_empty_one():
    assert LoraConfig(rank_pattern=None).rank_pattern == {}


def test_sets_and_tuples_become_lists_in_a_fixed_order():
    config = LoraConfig(target_modules={"v", "q", "k"}, modules_to_save=("b", "a"))
    assert config.target_modules == ["k", "q", "v"]
    assert config.modules_to_save == ["b", "a"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 6 / 4), ({"use_rslora": True}, 6 / 4**0.5)],
    ids=["lora", "rslora"],
)
def test_scaling(options, expected):
    layer = torch.nn.Linear(5, 5)
    inject_adapter(model := torch.nn.Sequential(layer), LoraConfig(r=4, lora_alpha=6, **options))
    assert model[0].adapters["default"].scaling == expected
