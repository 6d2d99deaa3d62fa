"""`export` on finished runs: what is written is what was trained, and every mistake has a word."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning import export
from lora_lightning.errors import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    ModelError,
)
from lora_lightning.runs import skeleton
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import find_run
from lora_lightning.verbs.export.diffusers import write_diffusers
from tests.helpers.command import run_command
from tests.helpers.strict_readers import of_diffusers, of_vllm, with_updates
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_pipeline import Pipeline, text_encoder
from tests.helpers.trained_runs import fit, language_model_run

IDS = torch.arange(24).reshape(2, 12) + 5
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def logits_of_run(run: Path, ckpt: str | None = None) -> Tensor:
    return trained_module(find_run(run, ckpt))({"input_ids": IDS})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model.eval()(ids).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["peft", "portable"])
def test_all_of_hugging_face_loads_it(lm_run: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    found = export(lm_run, out, format=form)
    assert (found.folder, found.format, found.adapter, found.url) == (out, form, "default", None)
    assert found.files == {name: len(content) for name, content in files(out).items()}
    base = transformers.AutoModelForCausalLM.from_pretrained(lm_run.parents[1] / "base")
    expected, untouched = logits_of_run(lm_run), logits(base)
    assert (expected - untouched).abs().max() > 1e-2
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(auto), expected, **CLOSE)
    given = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(given), expected, **CLOSE)
    if form == "portable":
        updates = of_vllm(out, base)
        torch.testing.assert_close(logits(with_updates(base, updates)), expected, **CLOSE)
    model = peft.PeftModel.from_pretrained(base, out)
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_an_own_module(own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own_run.parents[1])
    import own_modules

    export(own_run, tmp_path / "out")
    x = torch.randn(4, 8)
    expected = trained_module(find_run(own_run))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing keys, if there were some
        model = peft.PeftModel.from_pretrained(own_modules.Net().eval(), tmp_path / "out")
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ConfigError, match="head trains in full"):
        export(own_run, tmp_path / "plain", format="portable")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    lone = shutil.copy(own_run / "checkpoints/best.ckpt", tmp_path / "lone.ckpt")
    with pytest.raises(ConfigError, match="does not say which module"):
        export(lone, tmp_path / "lone")
    export(lone, tmp_path / "lone", module=own_modules.Net)
    tensors = "adapter_model.safetensors"
    assert files(tmp_path / "lone")[tensors] == files(tmp_path / "out")[tensors]


@pytest.mark.slow
def test_a_classifier(tmp_path: Path) -> None:
    """Its head trains in full; as PEFT adds one of that name, all is in the folder."""
    save_tiny_bert(tmp_path / "bert")
    lines = [{"text": f"the {w} film", "label": w} for w in ("good", "bad") for _ in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config: Any = {
        "lora": {"r": 2, "modules_to_save": ["classifier"]},
        "model": {"class_path": "lora_lightning.SequenceClassification",
                  "init_args": {"model": "bert"}},
        "data": {"class_path": "lora_lightning.TextClassificationDataModule",
                 "init_args": {"train": "a.jsonl", "val": 0.3, "max_length": 16}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": "runs/a"},
    }  # fmt: skip
    run = fit(tmp_path, config)
    export(run, tmp_path / "out")
    module = trained_module(find_run(run))
    ids = torch.arange(4, 12)[None]
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(model, ids), logits_of(module.network, ids), **CLOSE)
    text = (tmp_path / "out/README.md").read_text()
    assert "text-classification" in text
    with pytest.raises(ConfigError, match="classifier trains in full"):
        export(run, tmp_path / "plain", format="portable")


# -- without the base's weights ------------------------------------------------------------------


def test_the_bases_weights_are_not_loaded(
    lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were loaded")

    with monkeypatch.context() as patched:
        patched.setattr("lora_lightning.tasks.network._loaded", no_weights)
        patched.setattr(skeleton, "trained_module", no_weights)
        for form in ("peft", "portable"):
            export(lm_run, tmp_path / "light" / form, format=form)
    monkeypatch.setattr(skeleton, "_skeleton", lambda *_: None)
    for form in ("peft", "portable"):
        export(lm_run, tmp_path / "full" / form, format=form)
        assert files(tmp_path / "light" / form) == files(tmp_path / "full" / form)


@pytest.mark.slow
def test_another_base_is_refused(tmp_path: Path) -> None:
    run = language_model_run(tmp_path)
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] + 1e-3}, file, metadata={"format": "pt"})
    with pytest.raises(AdapterMismatchError, match=r"another base model.*(?s:.*)up_proj"):
        export(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match="is no existing folder"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_is_needed(lm_run: Path, tmp_path: Path) -> None:
    base = lm_run.parents[1] / "base"
    kept = {path: path.read_bytes() for path in base.glob("*token*")}
    try:
        for path in kept:
            path.unlink()
        export(lm_run, tmp_path / "out")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


# -- the card ------------------------------------------------------------------------------------


def test_the_card(lm_run: Path, tmp_path: Path) -> None:
    export(lm_run, tmp_path / "two-words", format="portable")
    text = (tmp_path / "two-words/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front  # a folder: the hub refuses what is no name of its own
    (log,) = (lm_run / "logs").glob("*/metrics.csv")
    header, *rows = [line.split(",") for line in log.read_text().splitlines()]
    compared = dict(zip(header, rows[-1], strict=True))
    for name in ("val_loss", "val_perplexity"):
        base, tuned = (float(compared[f"{which}/{name}"]) for which in ("base", "tuned"))
        assert f"| `{name}` | {base:.4g} | {tuned:.4g} |" in text
    for words in ("r=4, lora_alpha=8", "train=chats.jsonl", "learning_rate 0.01", "14: q_proj"):
        assert words in text
    assert "vllm serve base \\\n    --enable-lora --max-lora-rank 8 \\\n" in text
    assert "AutoPeftModelForCausalLM.from_pretrained('two-words')" in text
    assert str(lm_run.parents[1]) not in text  # a path of the machine


def test_a_base_of_the_hub_is_named() -> None:
    from lora_lightning.verbs.export.card import is_hub_name

    assert is_hub_name("org/name")
    assert not is_hub_name("/some/folder")
    assert not is_hub_name(None)


# -- diffusers -----------------------------------------------------------------------------------


def test_diffusers_computes_the_same(tmp_path: Path) -> None:
    from lora_lightning import LoraConfig, inject_adapter
    from tests.helpers.tensors import randomize, trainable

    base = text_encoder()
    module = Pipeline(text_encoder())
    options: Any = {"rank_pattern": {"layers.1.*": 3}, "use_rslora": True, "lora_alpha": 5}
    inject_adapter(module, LoraConfig(r=2, target_modules=["q_proj", "fc1"], **options))
    randomize(trainable(module).values(), 0.3)
    write_diffusers(module, tmp_path, "default")
    updates = of_diffusers(tmp_path / "pytorch_lora_weights.safetensors", "text_encoder")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = module.text_encoder(ids).last_hidden_state
        found = with_updates(base, updates)(ids).last_hidden_state
        assert (expected - base(ids).last_hidden_state).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, **CLOSE)


def test_diffusers_itself_loads_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from lora_lightning import LoraConfig, inject_adapter
    from tests.helpers.tensors import randomize, trainable

    def unet() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        ).eval()  # fmt: skip

    base, module = unet(), nn.Module()
    module.unet = unet()
    options: Any = {"rank_pattern": {"down_blocks.*": 3}, "use_rslora": True, "lora_alpha": 5}
    inject_adapter(module, LoraConfig(r=2, target_modules=["to_q", "conv1"], **options))
    randomize(trainable(module).values(), 0.1)
    write_diffusers(module, tmp_path, "default")
    x = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16))
    with torch.no_grad():
        expected, before = module.unet(*x).sample, base(*x).sample
        base.load_lora_adapter(
            tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors"
        )
        found = base(*x).sample
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, **CLOSE)


def test_what_is_no_pipeline(lm_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies in no model of a pipeline"):
        export(lm_run, tmp_path / "out", format="diffusers")
    assert not (tmp_path / "out").exists()


# -- mistakes ------------------------------------------------------------------------------------


def test_what_is_asked_wrong(lm_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"no run .*Did you mean .*lm"):
        export(lm_run.with_name("lmm"), out)
    with pytest.raises(ConfigError, match=r"Did you mean 'portable'\? \(format\)"):
        export(lm_run, out, format="portabel")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no adapter 'defalt', but default.*Did you mean"):
        export(lm_run, out, adapter="defalt")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already.*--force"):
        export(tmp_path / "not looked at", out)
    assert files(out) == {"mine.txt": b"mine"}
    export(lm_run, out, force=True)
    assert "mine.txt" not in files(out)
    with pytest.raises(CheckpointError, match="PEFT folder"):
        export(out, tmp_path / "again")


def test_a_full_disk_leaves_nothing(
    lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(lm_run, out)
    before = files(out)

    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    for form in ("peft", "portable"):
        with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
            export(lm_run, tmp_path / "new", format=form)
        with pytest.raises(ConfigError, match="cannot be written"):
            export(lm_run, out, format=form, force=True)
    monkeypatch.undo()
    assert files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- the command ---------------------------------------------------------------------------------


def test_the_command(
    lm_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    home = lm_run.parents[1]
    out = tmp_path / "out"
    said = run_command(
        home, monkeypatch, capfd, "export", "--config", "lm.yaml", str(out), "--format", "portable"
    )
    assert "the best checkpoint" in said
    assert said.splitlines()[-4].startswith("to use it (vLLM):")
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 4
    said = run_command(home, monkeypatch, capfd, "export", "runs/lm", str(out), fails=1)
    assert "is there already" in said
    said = run_command(home, monkeypatch, capfd, "export", "runs/lm", str(out), "--forc", fails=2)
    assert "Did you mean '--force'?" in said
    said = run_command(
        home, monkeypatch, capfd, "export", "runs/lm", str(out), "--force", "--ckpt", "last"
    )
    assert "last.ckpt" in said
    torch.testing.assert_close(
        logits(peft.AutoPeftModelForCausalLM.from_pretrained(out)), logits_of_run(lm_run, "last")
    )


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from lora_lightning.cli.main import main
main(sys.argv[1:])
"""


def in_a_process(folder: Path, *command: str) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "lm"])
def test_in_a_process_of_its_own(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Path = request.getfixturevalue(f"{name}_run")
    folder, verb = run.parents[1], [str(Path(sys.executable).parent / "lora-lightning"), "export"]
    out = str(tmp_path / "out")
    code, said = in_a_process(folder, *verb, f"runs/{name}", out)
    assert code == 0, said
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    code, said = in_a_process(folder, *verb, f"runs/{name}", out)
    assert (code, "is there already" in said, "Traceback" in said) == (1, True, False), said
    limited = [sys.executable, "-c", LIMITED, "export", f"runs/{name}", str(tmp_path / "b")]
    code, said = in_a_process(folder, *limited)
    assert (code, "cannot be written" in said, "Traceback" in said) == (1, True, False), said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
