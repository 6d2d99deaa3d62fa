"""Checkpoints that do not belong to the run: refused with the difference, before anything loads."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning import (
    LohaConfig,
    LoraCallback,
    LoraConfig,
    adapter_names,
    inject_adapter,
    save_adapter,
)
from lora_lightning.errors import (
    AdapterMismatchError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
    LoraError,
)
from tests.helpers.lightning_modules import OPTIONS, BuiltInConfigureModel, Data, Net, make_trainer
from tests.helpers.tensors import adapter_tensors, assert_same_state


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    return tmp_path / "good.ckpt"


def refused(path: Path, error: type[Exception], module: Any = None, **changed: Any) -> str:
    """The text of the refusal; the module must be exactly as it was before."""
    module = module or Net()
    callback = LoraCallback(**{**OPTIONS, **changed})
    trainer = make_trainer(path.parent, callback)
    trainer.validate(module, Data(), verbose=False)  # grows the adapters
    before = copy.deepcopy(module.state_dict())
    for entry in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(error) as caught:
            entry(module, datamodule=Data(), ckpt_path=str(path))
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(caught.value)


def edited(path: Path, edit: Any) -> Path:
    content = torch.load(path, weights_only=True)
    edit(content)
    content["lora_lightning"].pop("content")  # the hashes, which would notice any edit
    torch.save(content, path.with_name("edited.ckpt"))
    return path.with_name("edited.ckpt")


def accepted(path: Path, module: Net, **changed: Any) -> None:
    """The checkpoint is loaded: the module has its tensors."""
    callback = LoraCallback(**{**OPTIONS, **changed})
    make_trainer(path.parent, callback).validate(module, Data(), str(path), verbose=False)
    assert_same_state(adapter_tensors(module), torch.load(path, weights_only=True)["state_dict"])


def test_the_good_one_is_accepted(checkpoint: Path) -> None:
    accepted(checkpoint, Net())


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "strict_loading=False"])
def test_other_rank(checkpoint: Path, strict: bool) -> None:
    module = Net()
    module.strict_loading = strict
    text = refused(checkpoint, AdapterMismatchError, module, r=3)
    assert text.startswith(
        "The checkpoint's adapters are not those of this run; nothing was loaded."
    )
    assert "adapter 'default': r: 2 in the checkpoint, 3 here (lora.r)" in text
    assert "body.2.adapters.default.lora_A [2, 16] in the checkpoint, [3, 16] here" in text
    assert "Use the options that the checkpoint was trained with" in text


def test_other_alpha_or_scaling(checkpoint: Path) -> None:
    text = refused(checkpoint, AdapterMismatchError, lora_alpha=32)
    assert "lora_alpha: 8 in the checkpoint, 32 here (lora.lora_alpha)" in text
    text = refused(checkpoint, AdapterMismatchError, use_rslora=True)
    assert "use_rslora: False in the checkpoint, True here (lora.use_rslora)" in text


def test_other_targets(checkpoint: Path) -> None:
    text = refused(checkpoint, AdapterMismatchError, target_modules=["embed"])
    assert (
        "only in the checkpoint: body.2.adapters.default.lora_A, body.2.adapters.default.lora_B"
        in text
    )
    text = refused(checkpoint, AdapterMismatchError, modules_to_save=None)
    assert "only in the checkpoint: head.adapters.default.module.bias" in text
    text = refused(checkpoint, AdapterMismatchError, adapter_name="style")
    assert "adapter 'default': only in the checkpoint" in text
    assert "adapter 'style': not in the checkpoint, which has ['default']" in text


def test_same_targets_spelled_differently_are_accepted(checkpoint: Path) -> None:
    accepted(checkpoint, Net(), target_modules=r"embed|body\.2")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "strict_loading=False"])
def test_missing_extra_and_misshapen_tensors(checkpoint: Path, strict: bool) -> None:
    module = Net()
    module.strict_loading = strict
    key = "embed.adapters.default.lora_B"
    path = edited(checkpoint, lambda c: c["state_dict"].pop(key))
    assert f"missing in the checkpoint: {key}" in refused(path, AdapterMismatchError, module)
    path = edited(checkpoint, lambda c: c["state_dict"].update({key: torch.zeros(16, 5)}))
    assert f"{key} [16, 5] in the checkpoint, [16, 2] here" in refused(path, AdapterMismatchError)
    path = edited(checkpoint, lambda c: c["state_dict"].update(stranger=torch.zeros(1)))
    assert "tensors that no adapter owns: stranger" in refused(path, AdapterMismatchError)


def test_other_base(checkpoint: Path) -> None:
    other = Net()
    with torch.no_grad():
        other.embed.weight[3, 3] += 1e-6
    text = refused(checkpoint, AdapterMismatchError, other)
    assert text.startswith("The checkpoint's adapters were trained on another base model")
    assert "1 of 9 base tensors differ:\n  embed.weight: other values\n" in text
    text = refused(checkpoint, AdapterMismatchError, Net(width=8))
    assert "embed.weight: shape [16, 8] in the checkpoint, [8, 8] here" in text


def test_negative_control_the_fingerprint_is_what_notices(
    checkpoint: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        "lora_lightning.training.checkpoint_io.metadata.base_mismatch", lambda *_: ""
    )
    other = Net()
    with torch.no_grad():
        other.embed.weight[3, 3] += 1e-6
    accepted(checkpoint, other)


def test_a_full_model_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    text = refused(tmp_path / "full.ckpt", CheckpointError)
    assert text.startswith("This is a full-model checkpoint (it holds the base model's 11 tensors)")
    assert "module.load_state_dict(torch.load(path)['state_dict'])" in text


def test_not_a_checkpoint_of_ours(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    text = refused(tmp_path / "a.ckpt", CheckpointError)
    assert "it has no 'lora_lightning' entry" in text


def test_a_newer_format(checkpoint: Path) -> None:
    path = edited(checkpoint, lambda c: c["lora_lightning"].update(format=99))
    assert "has format 99" in refused(path, CheckpointError)


@pytest.mark.parametrize("keep", [0, 1, 500, 0.5, 0.99], ids=str)
def test_truncated_file(checkpoint: Path, keep: float) -> None:
    content = checkpoint.read_bytes()
    size = int(keep * len(content)) if isinstance(keep, float) else keep
    broken = checkpoint.with_name("broken.ckpt")
    broken.write_bytes(content[:size])
    text = refused(broken, CheckpointError)
    assert f"broken.ckpt' ({size:,} bytes) is truncated or damaged: " in text
    assert f"The newest good one beside it is '{checkpoint}'." in text
    assert text.endswith("(ckpt_path)")


def test_foreign_file(checkpoint: Path) -> None:
    broken = checkpoint.with_name("notes.ckpt")
    broken.write_text("not a checkpoint at all\n" * 100)
    assert "is truncated or damaged" in refused(broken, CheckpointError)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: Net().state_dict(), "a dict with 'embed.weight', 'embed.bias', 'norm.weight', "),
        (lambda: {"model": 1}, "a dict with 'model'. Name a file"),
        (dict, "a dict with nothing in it. Name a file"),
        (lambda: [1, 2], "a list. Name a file"),
    ],
    ids=["state_dict", "dict", "empty", "list"],
)
def test_a_file_that_no_trainer_wrote(checkpoint: Path, content: Any, said: str) -> None:
    path = checkpoint.with_name("other.bin")
    torch.save(content(), path)
    text = refused(path, CheckpointError)
    assert text.startswith(f"'{path}' is no checkpoint of a Trainer: it holds {said}")
    assert ("module.load_state_dict(torch.load(path))" in text) is ("embed" in said)


def test_another_optimizer(checkpoint: Path) -> None:
    class Other(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    trainer = make_trainer(checkpoint.parent, LoraCallback(**OPTIONS), max_epochs=2)
    with pytest.raises(CheckpointError) as caught:
        trainer.fit(Other(), Data(), ckpt_path=str(checkpoint))
    assert "is of another kind than this run's SGD: it has amsgrad, betas, " in str(caught.value)


def test_options_that_a_newer_torch_adds_are_no_other_optimizer(checkpoint: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for group in content["optimizer_states"][0]["param_groups"]:
            del group["decoupled_weight_decay"]

    trainer = make_trainer(checkpoint.parent, LoraCallback(**OPTIONS), max_epochs=2)
    trainer.fit(Net(), Data(), ckpt_path=str(edited(checkpoint, edit)))
    assert trainer.global_step == 8
    again = make_trainer(checkpoint.parent, LoraCallback(**OPTIONS), max_epochs=2)
    again.fit(Net(), Data(), ckpt_path=str(checkpoint))
    assert_same_state(adapter_tensors(trainer.model), adapter_tensors(again.model))


def test_a_peft_folder(checkpoint: Path) -> None:
    module, folder = Net(), str(checkpoint.with_name("adapter"))
    inject_adapter(module, LoraConfig(r=2))
    save_adapter(module, folder)
    text = refused(Path(folder), CheckpointError)
    assert text.startswith(f"{folder!r} is a PEFT folder: an adapter, not the checkpoint of a run.")
    make_trainer(checkpoint.parent, LoraCallback(init_from=folder)).fit(
        Net(), Data()
    )  # as it advises


def test_no_such_file(checkpoint: Path) -> None:
    text = refused(checkpoint.with_name("goood.ckpt"), CheckpointError)
    assert "does not exist. Did you mean" in text
    assert "good.ckpt'" in text


def test_nothing_that_trains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.trainable"):
        make_trainer(tmp_path, LoraCallback(r=2, trainable=False)).fit(Net(), Data())


def test_another_kind_of_start_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraCallback(r=2, init_lora_weights="pissa"))
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(AdapterMismatchError, match="init_lora_weights: 'pissa' in the checkpoint"):
        make_trainer(tmp_path, LoraCallback(r=2)).validate(
            Net(), Data(), ckpt_path=tmp_path / "x.ckpt"
        )


def test_another_type(checkpoint: Path) -> None:
    trainer = make_trainer(
        checkpoint.parent, LoraCallback(LohaConfig(r=2, target_modules=["embed"]))
    )
    with pytest.raises(AdapterMismatchError, match="LORA in the checkpoint, LOHA here"):
        trainer.validate(Net(), Data(), ckpt_path=checkpoint)


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def partly_on_meta() -> Net:
    module = Net()
    module.body[2].to("meta")
    return module


class MetaInConfigureModel(BuiltInConfigureModel):
    def configure_model(self) -> None:
        super().configure_model()
        self.embed.to("meta")


@pytest.mark.parametrize(
    ("make", "count", "name"),
    [
        (on_meta, 11, "embed.weight, embed.bias, norm.weight, ... (11 in all)"),
        (partly_on_meta, 2, "body.2.weight, body.2.bias"),
        (MetaInConfigureModel, 2, "embed.weight, embed.bias"),
    ],
)
def test_base_on_the_meta_device(tmp_path: Path, make: Any, count: int, name: str) -> None:
    """Nothing would ever give it values: an adapter checkpoint holds none."""
    module = make()
    with pytest.raises(AdapterStateError) as error:
        make_trainer(tmp_path, LoraCallback(r=2, target_modules=["embed"])).fit(module, Data())
    assert str(error.value).startswith(f"{count} tensors of the base are on the meta device")
    assert f"no values: {name}. Load the base model where" in str(error.value)
    assert not adapter_names(module)
    module.trainer = None
    assert type(pickle.loads(pickle.dumps(module))) is type(module)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["body.2"]}])
def test_lazy_layers(options: dict[str, Any], tmp_path: Path) -> None:
    """Wherever they are: what they become is a base that nobody has."""

    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.LazyLinear(3)

    trainer = make_trainer(tmp_path, LoraCallback(r=2, **options), num_sanity_val_steps=0)
    with pytest.raises(LoraError, match=r"'head(.weight)?' .*is lazy and has no size yet"):
        trainer.fit(Lazy(), Data())
