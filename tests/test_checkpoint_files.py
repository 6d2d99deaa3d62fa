"""Checkpoint files: whole or not there, checked when read, the old one kept whatever happens."""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import seed_everything
from modules import Data, Net, run
from torch import nn

from lora_lightning import LoraCallback, load_adapter
from lora_lightning.content_hash import content_hash, content_hashes, damaged_parts, with_hashes
from lora_lightning.errors import CheckpointError
from lora_lightning.training import checkpoint_files
from lora_lightning.training.checkpoint_files import DurableCheckpointIO, newest_good

OPTIONS: dict[str, Any] = {
    "r": 2,
    "lora_dropout": 0.2,
    "target_modules": ["embed", "body.2"],
    "modules_to_save": ["head"],
}


def fit(folder: Path, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    seed_everything(7, verbose=False)
    module = Net()
    trainer = run(folder, LoraCallback(**OPTIONS), *callbacks, **options)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    return trainer


def adapters(trainer: Any) -> dict[str, Any]:
    return {k: v for k, v in trainer.model.state_dict().items() if ".adapters." in k}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def same_content(first: Any, second: Any) -> bool:
    return content_hash(first) == content_hash(second)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    fit(folder).save_checkpoint(folder / "good.ckpt")
    return folder / "good.ckpt"


def load(path: Path, **options: Any) -> None:
    run(path.parent, LoraCallback(**OPTIONS), **options).validate(
        Net(), Data(), ckpt_path=str(path), verbose=False
    )


# -- the hash ------------------------------------------------------------------------------------

VALUES: list[Any] = [
    0, 1, -1, True, False, None, 0.0, -0.0, 1.0, 1e-300, "", "a", "1", b"a", b"", 1j,
    [], (), {}, set(), [1], (1,), {1}, {"a": 1}, {"a": 1, "b": 2}, {"b": 2, "a": 1}, [[1], 2], [1, [2]],
    ["ab", "c"], ["a", "bc"], torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("meta"),
    torch.zeros(2), torch.zeros(3), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32),
    torch.zeros(2, dtype=torch.bfloat16), torch.tensor(0.0), torch.tensor([0.0]), torch.tensor([-0.0]),
    torch.tensor([True]), torch.zeros(0), torch.zeros(0, 1), torch.tensor([1j]),
    torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(3, 2),
]  # fmt: skip


def test_values_that_differ_hash_differently() -> None:
    assert len({content_hash(value) for value in VALUES}) == len(VALUES)
    assert content_hash({"a": VALUES}) == content_hash({"a": VALUES})


def test_what_does_not_matter_hashes_alike() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert content_hash(x[1:, ::2]) == content_hash(x[1:, ::2].clone())
    assert content_hash(torch.tensor([1j]).conj()) == content_hash(torch.tensor([complex(0, -1)]))
    assert content_hash(OrderedDict(a=1)) == content_hash({"a": 1})
    assert content_hash(nn.Parameter(x)) == content_hash(x)
    assert content_hash(torch.Size([1])) == content_hash((1,))
    assert content_hash({3, 1, 2}) == content_hash({1, 2, 3})


def test_a_checkpoint_carries_its_hashes(good: Path) -> None:
    for weights_only in (True, False):
        content = torch.load(good, weights_only=weights_only)
        hashes = content["lora_lightning"]["content"]
        assert hashes == content_hashes(content)
        assert damaged_parts(content) == []
    tensors = {f"state_dict/{key}" for key in content["state_dict"]}
    assert set(hashes) == tensors | (set(content) - {"state_dict"})
    key = next(iter(content["state_dict"]))
    content["state_dict"][key][0, 0] += 1e-6
    content["loops"]["fit_loop"]["epoch_progress"]["total"]["ready"] += 1
    content["stranger"] = 1
    del content["lr_schedulers"]
    assert set(damaged_parts(content) or []) == {
        f"state_dict/{key}", "loops", "stranger", "lr_schedulers",
    }  # fmt: skip


@pytest.mark.parametrize("weights_only", [True, False], ids=["weights only", "all"])
def test_every_kind_of_checkpoint_has_them(tmp_path: Path, weights_only: bool) -> None:
    fit(tmp_path).save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    assert damaged_parts(torch.load(tmp_path / "a.ckpt", weights_only=True)) == []
    load(tmp_path / "a.ckpt")


def test_a_checkpoint_without_hashes_loads(good: Path, tmp_path: Path) -> None:
    """One of version 0.1.0."""
    content = torch.load(good, weights_only=True)
    del content["lora_lightning"]["content"]
    torch.save(content, tmp_path / "old.ckpt")
    load(tmp_path / "old.ckpt")


# -- damage --------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value)


def test_edited_content_is_refused_by_name(good: Path, tmp_path: Path) -> None:
    content = torch.load(good, weights_only=True)
    content["state_dict"]["embed.adapters.default.lora_A"][1, 2] += 1e-6
    torch.save(content, tmp_path / "bad.ckpt")
    text = refusal(tmp_path / "bad.ckpt")
    assert "state_dict/embed.adapters.default.lora_A is not what was written" in text
    assert "if you edited it yourself, delete its ['lora_lightning']['content']" in text
    assert text.endswith("Nothing was loaded. No good one is beside it. (ckpt_path)")
    with pytest.raises(CheckpointError, match=r"embed\.adapters\.default\.lora_A is not what"):
        load_adapter(Net(), tmp_path / "bad.ckpt")


def test_twin_it_is_the_hash_that_notices(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(good, weights_only=True)
    content["state_dict"]["embed.adapters.default.lora_A"][1, 2] += 1e-6
    torch.save(content, tmp_path / "bad.ckpt")
    monkeypatch.setattr(checkpoint_files, "damaged_parts", lambda _: [])
    load(tmp_path / "bad.ckpt")


def test_the_newest_good_one_is_named(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    for age, name in enumerate(["newest", "damaged", "second", "oldest"]):
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(whole if name in ("second", "oldest") else whole[:-100])
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "last.ckpt").symlink_to("newest.ckpt")
    (tmp_path / "dangling.ckpt").symlink_to("nowhere.ckpt")
    text = refusal(tmp_path / "newest.ckpt")
    assert f"({len(whole) - 100:,} bytes) is truncated or damaged: File is not a zip file" in text
    assert f"The newest good one beside it is '{tmp_path / 'second.ckpt'}'." in text
    assert "second.ckpt" in refusal(tmp_path / "last.ckpt")
    assert newest_good(tmp_path, tmp_path / "second.ckpt") == tmp_path / "oldest.ckpt"


def flips(path: Path, count: int, io: Any) -> tuple[int, int]:
    """(refused, loaded as it was) of `count` files with one bit turned; a third one is an error."""
    whole = path.read_bytes()
    truth = torch.load(path, weights_only=True)
    target = path.with_name("flipped.ckpt")
    draw = random.Random(0)
    refused = harmless = 0
    for _ in range(count):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        target.write_bytes(content)
        try:
            loaded = io.load_checkpoint(target, weights_only=True)
        except CheckpointError:
            refused += 1
        else:
            assert same_content(loaded, truth)
            harmless += 1
    return refused, harmless


def test_a_turned_bit_anywhere_is_noticed(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(good.read_bytes())
    refused, harmless = flips(path, 150, DurableCheckpointIO())
    assert refused > 75
    # Padding between the parts of the archive, and fields of its directory that nobody reads.
    assert harmless < 75


def test_twin_without_checks_turned_bits_are_loaded(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(good.read_bytes())

    class Plain(TorchCheckpointIO):
        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().load_checkpoint(*args, **kwargs)
            except Exception as error:
                raise CheckpointError from error

    with pytest.raises(AssertionError):
        flips(path, 150, Plain())


def test_every_length_is_noticed(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    path = tmp_path / "short.ckpt"
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            DurableCheckpointIO().load_checkpoint(path, weights_only=True)
    with pytest.raises(FileNotFoundError):
        DurableCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_whole_files_that_torch_refuses_keep_its_words(good: Path, tmp_path: Path) -> None:
    content = torch.load(good, weights_only=True)
    content["hyper_parameters"] = {"path": tmp_path}  # no plain type
    torch.save(with_hashes(content), tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load(tmp_path / "a.ckpt")
    io = DurableCheckpointIO()
    assert io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"]
