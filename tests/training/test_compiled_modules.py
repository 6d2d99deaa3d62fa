"""Modules compiled before or after their adapters: same files, same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lora_lightning import LoraCallback, load_adapter, save_adapter
from lora_lightning.errors import TargetError
from tests.helpers.lightning_modules import KEYS, OPTIONS, Data, Net, make_trainer, saved, trained


class Compiled(Net):
    """Two of its children are what torch.compile returned, a target and a trained copy among them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")  # type: ignore[assignment]
        self.head = torch.compile(self.head, backend="eager")  # type: ignore[assignment]


def go(kind: type, folder: Path, epochs: int, ckpt_path: Any = None) -> dict[str, Any]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    module, saver = kind(), ModelCheckpoint(folder, save_last=True)
    trainer = make_trainer(folder, LoraCallback(**OPTIONS), saver, max_epochs=epochs)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    return {k.replace("_orig_mod.", ""): v for k, v in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
@pytest.mark.parametrize(
    ("starts", "resumes"),
    [
        (Net, Compiled),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in [(Net, Net), (Compiled, Net), (Compiled, Compiled)]
        ),
    ],
)
def test_compiled_submodules(tmp_path: Path, starts: type, resumes: type) -> None:
    """`self.net = torch.compile(self.net)` puts `_orig_mod.` into every key and path."""
    torch._dynamo.reset()
    straight = go(Net, tmp_path / "straight", 3)
    go(starts, tmp_path / "broken", 1)
    content = saved(tmp_path / "broken/last.ckpt")
    assert sorted(content["state_dict"]) == sorted(KEYS)
    assert not any("_orig_mod" in name for name in content["lora_lightning"]["base"])
    resumed = go(resumes, tmp_path / "broken", 3, "last")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_negative_control_names_as_they_are_would_not_be_found(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("lora_lightning.layers.traversal.WRAPPED", ())
    with pytest.raises(TargetError, match=r"'head' matched nothing.*_orig_mod"):
        trained(tmp_path, Compiled())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_compiled_after_growth_and_as_a_folder(tmp_path: Path) -> None:
    """Compiled modules in adapted ones, adapted ones compiled: files and folders fit both."""
    torch._dynamo.reset()
    _, module = trained(tmp_path, Compiled())
    module.embed = torch.compile(module.embed, backend="eager")
    trainer, module = trained(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(saved(tmp_path / "a.ckpt")["state_dict"]) == sorted(KEYS)
    save_adapter(module, tmp_path / "folder")
    assert "_orig_mod" not in (tmp_path / "folder/adapter_config.json").read_text()
    x = torch.randn(4, 8)
    expected = module.eval()(x)
    for kind in (Net, Compiled):
        for path in ("a.ckpt", "folder"):
            fresh = kind()
            load_adapter(fresh, tmp_path / path)
            assert torch.equal(fresh.eval()(x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
@pytest.mark.slow
def test_compiled_as_a_whole(tmp_path: Path) -> None:
    """`trainer.fit(torch.compile(module))`; self.log cannot be compiled, with or without adapters."""
    torch._dynamo.reset()

    class Quiet(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    module, trainer = Quiet(), make_trainer(tmp_path, LoraCallback(**OPTIONS))
    trainer.fit(torch.compile(module, backend="eager"), Data())  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(saved(tmp_path / "a.ckpt")["state_dict"]) == sorted(KEYS)
    assert all(module.state_dict()[key].any() for key in KEYS)
