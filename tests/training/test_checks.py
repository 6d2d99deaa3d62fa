"""What LoraCallback refuses or warns about, before the first step and in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning import (
    LoraCallback,
    LoraConfig,
    active_adapters,
    adapter_names,
    inject_adapter,
    merge_and_unload,
    set_adapter,
)
from lora_lightning.errors import AdapterMismatchError, AdapterStateError, ConfigError, TargetError
from tests.helpers.lightning_modules import (
    OPTIONS,
    BuiltInConfigureModel,
    BuiltInSetup,
    Data,
    Net,
    make_trainer,
)
from tests.helpers.messages import message_of
from tests.helpers.tensors import adapter_tensors


def test_a_bypassed_adapter_is_noticed_in_the_first_step(tmp_path: Path) -> None:
    class ReadsTheWeight(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.linear(x, self.embed.weight)  # past the module
            return hidden[:, :3] + self.bias

        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]).requires_grad_(), batch[1])

    with pytest.raises(AdapterStateError) as error:
        make_trainer(tmp_path, LoraCallback(r=2, target_modules=["embed"])).fit(
            ReadsTheWeight(), Data()
        )
    assert "After the first backward pass no adapter has a gradient" in str(error.value)
    assert "(lora.target_modules)" in str(error.value)


def test_a_partly_bypassed_adapter_is_a_warning(tmp_path: Path) -> None:
    class SkipsBody(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.embed(x)))

    with pytest.warns(UserWarning, match=r"2 of 6 trainable tensors had no gradient.*body\.2"):
        make_trainer(tmp_path, LoraCallback(**OPTIONS), max_steps=1).fit(SkipsBody(), Data())


def text_of(error: type[Exception], act: Any) -> str:
    return message_of(error, act)


def test_options_are_checked_when_they_are_given() -> None:
    text = text_of(ConfigError, lambda: LoraCallback(rank=4))
    assert "LoraCallback has no option 'rank'" in text
    assert text_of(ConfigError, lambda: LoraCallback(lora_alhpa=4)).startswith(
        "LoraCallback has no option 'lora_alhpa'. Did you mean 'lora_alpha'?"
    )
    text = text_of(ConfigError, lambda: LoraCallback(LoraConfig(r=2), r=4))
    assert text.startswith("LoraCallback was given config and also r: two sources")
    assert LoraCallback(LoraConfig(r=2)).config.r == 2
    passed_on = {**vars(LoraConfig()), "r": 4}  # as the command line does it: all of them
    text = text_of(ConfigError, lambda: LoraCallback(LoraConfig(r=2), **passed_on))
    assert text.startswith("LoraCallback was given config and also r: two sources")
    assert text.endswith("goes back to its default with --lora.r 8. (lora.config)")
    text = text_of(ConfigError, lambda: LoraCallback(init_from="there", **passed_on))
    assert text.startswith("LoraCallback was given init_from='there' and also r: the adapter")


def test_wrong_submodule(tmp_path: Path) -> None:
    act = lambda: make_trainer(tmp_path, LoraCallback(module="bodi")).fit(Net(), Data())  # noqa: E731
    text = text_of(ConfigError, act)
    assert text == (
        "module='bodi': Net has no such submodule. Did you mean 'body'? "
        "At its top: embed, norm, body, head. (lora.module)"
    )


def test_wrong_target_is_found_before_the_first_step(tmp_path: Path) -> None:
    for kind in (Net, BuiltInSetup, BuiltInConfigureModel):
        module = kind()
        fit = make_trainer(tmp_path, LoraCallback(target_modules=["embd"])).fit
        assert "did you mean 'embed'" in text_of(TargetError, partial(fit, module, Data()))
        assert not adapter_tensors(module)


def test_other_options_on_the_same_module(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2)).validate(module, Data(), verbose=False)
    text = text_of(
        AdapterMismatchError,
        lambda: make_trainer(tmp_path, LoraCallback(r=3)).validate(module, Data(), verbose=False),
    )
    assert "The model carries an adapter 'default' already ('embed', for one)" in text
    assert "r: 2 there, 3 here" in text


def test_adapters_that_nobody_would_save(tmp_path: Path) -> None:
    module = Net()
    inject_adapter(module, LoraConfig(r=2, target_modules=["embed"]), "older")
    with pytest.raises(AdapterStateError) as error:
        make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    assert "The model carries adapters ['older'], which no LoraCallback" in str(error.value)
    assert "merge_and_unload(module)" in str(error.value)


def test_an_adapter_that_was_injected_by_hand(tmp_path: Path) -> None:
    module = Net()
    inject_adapter(module, LoraConfig(**OPTIONS))
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    assert len(adapter_tensors(module)) == 6
    assert all(v.abs().sum() > 0 for v in adapter_tensors(module).values())


def test_an_adapter_that_was_switched_off_trains_again(tmp_path: Path) -> None:
    module = Net()
    inject_adapter(module, LoraConfig(**OPTIONS))
    set_adapter(module, [])
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    assert active_adapters(module) == ["default"]
    assert all(v.abs().sum() > 0 for v in adapter_tensors(module).values())


def test_merged_adapters_do_not_train(tmp_path: Path) -> None:
    from lora_lightning import merge_adapter

    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2)).validate(module, Data(), verbose=False)
    merge_adapter(module)
    with pytest.raises(AdapterStateError, match="Call unmerge_adapter"):
        make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())


def test_unsupported_strategies_are_refused() -> None:
    from lightning.pytorch.strategies import DDPStrategy

    from lora_lightning.training.checks import check_strategy

    class XLAStrategy:
        """Stands for one that nobody has tried."""

    with pytest.raises(ConfigError, match="does not support XLAStrategy in this version"):
        check_strategy(SimpleNamespace(strategy=XLAStrategy()))
    check_strategy(SimpleNamespace(strategy=DDPStrategy()))


def test_another_submodule_than_before(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    act = lambda: make_trainer(tmp_path, LoraCallback(r=2, module="body")).validate(module, Data())  # noqa: E731
    text = text_of(AdapterMismatchError, act)
    assert "on 'embed', for one, which is outside the submodule" in text
    assert text.endswith("(lora.module)")


def test_two_copies_of_one_module_are_refused_before_the_second_is_made(tmp_path: Path) -> None:
    module = Net()
    save = {"r": 2, "target_modules": ["embed"], "modules_to_save": ["head"]}
    one, two = LoraCallback(**save), LoraCallback(adapter_name="two", **save)
    text = text_of(AdapterStateError, lambda: make_trainer(tmp_path, one, two).fit(module, Data()))
    assert text.endswith("(lora.modules_to_save)")
    assert adapter_names(module) == ["default"]


def test_a_later_trainer_without_the_callback_is_warned_about(tmp_path: Path) -> None:
    module = Net()
    make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    other = make_trainer(tmp_path)
    other.validate(module, Data())  # the trained adapters act, which is what one wants
    for trainer in (other, make_trainer(tmp_path, LoraCallback(r=2, enabled=False))):
        with pytest.warns(UserWarning, match=r"adapters \['default'\] of an earlier run, but this"):
            trainer.fit(module, Data())
    make_trainer(tmp_path, LoraCallback(r=2)).fit(module, Data())
    merge_and_unload(module)
    other.fit(module, Data())
