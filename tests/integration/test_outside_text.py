"""Text from files, folders and models does nothing to a terminal, and files keep it as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    LoraCallback,
    LoraConfig,
    LoraError,
    adapter_status,
    inject_adapter,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lora_lightning.callbacks.text_loggers import log_texts
from lora_lightning.callbacks.text_samples import as_table
from lora_lightning.cli.predictions import save_predictions
from lora_lightning.data.sources.read_rows import read_rows
from lora_lightning.errors import RecordError
from lora_lightning.training.messages import rendered
from lora_lightning.utilities.hub import resolve_model_path
from tests.helpers.lightning_modules import Data, Net, make_trainer

ESCAPE = "\x1b]52;c;aGk=\x07"
SPELLED = r"\x1b]52;c;aGk=\x07"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = network()
    inject_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def with_option(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), ESCAPE: 1}))


def with_value(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": ESCAPE}))


def with_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{ESCAPE}.lora_A.weight": torch.zeros(2, 8)}, file)


def with_one_more(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.0.{ESCAPE}": torch.zeros(2, 8)}, file)


def with_file(folder: Path) -> None:
    (folder / "adapter_config.json").rename(folder / f"{ESCAPE}.json")


@pytest.mark.parametrize("spoil", [with_option, with_value, with_tensor, with_one_more, with_file])
def test_adapter_folders(spoil: Callable[[Path], None], folder: Path) -> None:
    spoil(folder)
    with pytest.raises(LoraError) as error:
        load_adapter(network(), folder)
    assert ESCAPE[:2] not in str(error.value)
    assert "x1b]52;c;aGk=" in str(error.value)


def test_names_of_adapters() -> None:
    for name in (ESCAPE, "a\u202eb", "a\nb", "def\u200bault"):
        with pytest.raises(ConfigError, match="can be printed"):
            inject_adapter(network(), LoraConfig(r=2, target_modules=["0"]), name)
    inject_adapter(model := network(), LoraConfig(r=2, target_modules=["0"]), "наш стиль")
    assert "наш стиль" in str(adapter_status(model))


def test_names_in_a_checkpoint(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "one")
    make_trainer(tmp_path, LoraCallback(r=2), saver, max_steps=1).fit(Net(), Data())
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    own = content["lora_lightning"]
    del own["content"]
    entry = own["adapters"].pop("default")
    entry["tensors"] = {
        k.replace(".default.", f".{ESCAPE}."): v for k, v in entry["tensors"].items()
    }
    own["adapters"][ESCAPE] = entry
    state = content["state_dict"].items()
    content["state_dict"] = {k.replace(".default.", f".{ESCAPE}."): v for k, v in state}
    torch.save(content, tmp_path / "two.ckpt")
    with pytest.raises(LoraError, match=r"x1b\]52") as error:
        load_from_checkpoint(Net, tmp_path / "two.ckpt")
    assert "\x1b" not in str(error.value)
    with pytest.raises(LoraError, match=r"x1b\]52") as error:
        make_trainer(tmp_path, LoraCallback(r=2)).validate(
            Net(), Data(), ckpt_path=tmp_path / "two.ckpt", verbose=False
        )
    assert "\x1b" not in str(error.value)


def test_names_and_content_of_data_files(tmp_path: Path) -> None:
    for name, content in (
        (f"{ESCAPE}.jsonl", "{"),
        ("a.jsonl", json.dumps({ESCAPE: 1})),
        ("a.csv", f"{ESCAPE},b\n1,2,3\n"),
        ("b.csv", f"{ESCAPE},{ESCAPE}\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(RecordError) as error:
            list(read_rows(str(tmp_path / name), key="data.train", columns={"text": "data.text"}))
        assert "\x1b" not in str(error.value)
        assert "x1b]52" in str(error.value)
    with pytest.raises(LoraError) as missing:
        resolve_model_path(f"/no/{ESCAPE}")
    assert "\x1b" not in str(missing.value)


def test_a_file_name_that_is_no_text_can_be_named(tmp_path: Path) -> None:
    path = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")
    Path(path).write_text("{")
    with pytest.raises(RecordError) as error:
        list(read_rows(path, key="data.train"))
    str(error.value).encode()
    assert r"caf\udce9.jsonl" in str(error.value)


def test_samples_are_shown_escaped_and_kept_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    monkeypatch.setenv("COLUMNS", "80")
    text = f"a{ESCAPE}[red]b[/red]\r:smile:\u202e 你好"
    rows = [{"prompt": text, "tuned": "c"}]
    lines = rendered(as_table(rows, "samples at step 1")).splitlines()
    assert rf"a{SPELLED}[red]b[/red]\r:smile:\u202e 你好" in lines[2]
    assert {line[0] + line.rstrip()[-1] for line in lines[2:-1] if "│" in line} == {"││"}
    log_texts(CSVLogger(tmp_path, "logs"), "samples", rows, 1)
    kept = next(tmp_path.rglob("samples.jsonl")).read_text(encoding="utf-8")
    assert json.loads(kept)["prompt"] == text
    files = save_predictions([[text]], tmp_path / "predictions", [{"prediction": text}])
    assert json.loads(files[0].read_text(encoding="utf-8")) == {"prediction": text}


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('model: {"a\\e]52;c;aGk=\\ab": 1}\n')
    code = "from lora_lightning.cli.main import main; main()"
    command = [sys.executable, "-c", code, "fit", "--config", "a.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 2
    assert b"x1b]52" in done.stderr
    assert b"\x1b" not in done.stderr + done.stdout


def test_the_table_of_a_run(tmp_path: Path, capsys: Any) -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body.add_module("[red]\x1b[2Jx", nn.Linear(16, 16))

    make_trainer(tmp_path, LoraCallback(r=2), max_steps=1).fit(Named(), Data())
    shown = capsys.readouterr().out
    assert r"[red]\x1b[2Jx" in shown
    assert "\x1b" not in shown


# -- what else a file may hold, or be --------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    def fit(name: str, **options: Any) -> None:
        saver = ModelCheckpoint(tmp_path, name)
        make_trainer(tmp_path, LoraCallback(r=2, nonfinite="ignore"), saver, **options).fit(
            Net(), Data(), ckpt_path=tmp_path / "one.ckpt" if name == "two" else None
        )

    fit("one", max_steps=1)
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    del content["lora_lightning"]["content"]
    name = "body.2.adapters.default.lora_A"
    content["state_dict"][name][0, 0] = value
    torch.save(content, tmp_path / "one.ckpt")
    words = rf"not finite \(NaN or infinity\) in {name}: the run"
    with pytest.warns(UserWarning, match=words):
        fit("two", max_steps=2)
    with pytest.warns(UserWarning, match=words):
        make_trainer(tmp_path, LoraCallback(r=2)).validate(
            Net(), Data(), ckpt_path=tmp_path / "one.ckpt", verbose=False
        )
    with pytest.raises(AdapterMismatchError, match="not finite"):
        load_from_checkpoint(Net, tmp_path / "one.ckpt")


def test_pipes_are_no_adapters_and_no_checkpoints(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    for load in (
        lambda: load_adapter(network(), tmp_path / "pipe.ckpt"),
        lambda: load_from_checkpoint(Net, tmp_path / "pipe.ckpt"),
        lambda: make_trainer(tmp_path, LoraCallback(init_from=str(tmp_path / "pipe.ckpt"))).fit(
            Net(), Data()
        ),
        lambda: make_trainer(tmp_path, LoraCallback(r=2)).fit(
            Net(), Data(), ckpt_path=tmp_path / "pipe.ckpt"
        ),
    ):
        with pytest.raises(CheckpointError, match="is no ordinary file but a device, a pipe"):
            load()
