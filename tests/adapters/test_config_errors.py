"""Habits from peft and elsewhere get words: where a config stands, and which options there are."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
import textwrap
from typing import Any, get_type_hints

import peft
import pytest
from torch import nn

import lora_lightning
from lora_lightning import (
    AdaLoraConfig,
    ConfigError,
    LohaConfig,
    LoraCallback,
    LoraConfig,
    inject_adapter,
)
from lora_lightning.training.options import LoraOptions

NO_CONFIGS: dict[str, tuple[Any, str]] = {
    "a rank": (8, r"given by name: \w+\(r=8\)"),
    "a dict": ({"r": 8}, r"by name: \w+\(\*\*options\)"),
    "a list": (["q_proj"], r"target_modules=\['q_proj'\]"),
    "a file": ("last.ckpt", r"init_from='last.ckpt'"),
    "a model": (nn.Linear(4, 4), r"takes the model first"),
    "a class": (LoraConfig, r"Make one of it: LoraConfig\(\)"),
    "peft's": (peft.LoraConfig(r=8), r"peft's own.*from lora_lightning import LoraConfig"),
    "peft's LoHa": (peft.LoHaConfig(), r"peft's own.*from lora_lightning import LoHaConfig"),
    "anything": (2.5, r"Make one, as LoraConfig\(r=8\)"),
}


@pytest.mark.parametrize(("value", "words"), NO_CONFIGS.values(), ids=NO_CONFIGS)
def test_what_is_no_config_is_named(value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^LoraCallback was given .*{words}.*\(lora.config\)$"):
        LoraCallback(value)
    model = nn.Sequential(nn.Linear(4, 4))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match=rf"^inject_adapter was given .*{words}"):
        inject_adapter(model, value)
    assert [name for name, _ in model.named_parameters()] == names


def test_the_order_of_arguments_of_peft() -> None:
    with pytest.raises(ConfigError, match=r"inject_adapter\(model, config\) takes the model first"):
        inject_adapter(LoraConfig(), nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"2 values without a name \(Linear, LoraConfig\)"):
        LoraCallback(nn.Linear(4, 4), LoraConfig())  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"\(int, int\).*by name: LoraCallback\(r=8, lora_alpha"):
        LoraCallback(16, 32)  # type: ignore[misc]


@pytest.mark.parametrize("config", [LoraConfig, LohaConfig, AdaLoraConfig])
@pytest.mark.parametrize("option", ["task_type", "inference_mode", "fan_in_fan_out", "peft_type"])
def test_options_of_peft_that_are_not_needed(config: Any, option: str) -> None:
    words = rf"{option}'\. [A-Z].*leave it out.*\(lora.{option}\)$"
    with pytest.raises(ConfigError, match=words):
        config(**{option: None})
    with pytest.raises(ConfigError, match=words):
        LoraCallback(r=8, **{option: None})


@pytest.mark.parametrize(
    "name", ["LoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig", "IA3Config"]
)
def test_every_option_of_peft_is_an_option_or_explained(name: str) -> None:
    ours: Any = getattr(lora_lightning, name)
    for option in getattr(peft, name)().to_dict().keys() - ours().to_dict().keys():
        with pytest.raises(ConfigError, match=f"'{option}'") as error:
            ours(**{option: None})
        assert "Known options" not in str(error.value), option


@pytest.mark.parametrize("word", ["rank", "lora_r", "alpha", "dropout", "lora_target_modules"])
def test_names_of_other_libraries(word: str) -> None:
    name = {"alpha": "lora_alpha", "dropout": "lora_dropout", "rank": "r", "lora_r": "r"}
    asked = name.get(word, "target_modules")
    for make in (LoraConfig, LoraCallback):
        with pytest.raises(ConfigError, match=f"Did you mean '{asked}'"):
            make(**{word: 8})


def test_options_go_by_name() -> None:
    with pytest.raises(ConfigError, match=re.escape("LoraConfig(r=8)")):
        LoraConfig(8)  # type: ignore[misc]


def test_configs_and_callbacks_are_copied_and_pickled_as_before() -> None:
    config = LoraConfig(r=3, target_modules=["a"])
    callback = LoraCallback(config, adapter_name="a")
    for again in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert again(config) == config
        assert (again(callback).config, again(callback).adapter_name) == (config, "a")


def test_editors_see_the_options_of_lora() -> None:
    """`LoraOptions`, which types the options of `LoraCallback`, lists those of `LoraConfig`."""
    options = {k: v for k, v in get_type_hints(LoraConfig).items() if k in LoraConfig().to_dict()}
    assert get_type_hints(LoraOptions) == options


def test_type_checkers_are_given_those_types() -> None:
    """By the annotation in the source; jsonargparse reads another one at run time."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(LoraCallback.__init__))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    assert definition.args.kwarg is not None
    assert ast.unparse(definition.args.kwarg.annotation) == "Unpack[LoraOptions]"  # type: ignore[arg-type]
