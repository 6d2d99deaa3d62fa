"""Runs that `lora-lightning fit` has made: of a module of one's own, and of a causal LM."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora_lightning.cli.main
from tests.helpers.paths import ROOT
from tests.helpers.tiny_lm import tiny_llama

_TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "callbacks": [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "val_loss", "filename": "best", "save_last": True},
        }
    ],
}
OWN_MODULE: dict[str, Any] = {
    "lora": {"r": 2, "modules_to_save": ["head"]},
    "model": {"class_path": "own_modules.Net"},
    "data": {"class_path": "own_modules.Data"},
    "trainer": {**_TRAINER, "default_root_dir": "runs/own"},
}
LANGUAGE_MODEL: dict[str, Any] = {
    "lora": {"r": 4, "lora_alpha": 8},
    "model": {
        "class_path": "lora_lightning.CausalLM",
        "init_args": {"model": "base", "learning_rate": 1e-2, "max_new_tokens": 8},
    },
    "data": {
        "class_path": "lora_lightning.TextDataModule",
        "init_args": {"train": "chats.jsonl", "val": 0.25, "max_length": 64, "batch_size": 4},
    },
    "trainer": {**_TRAINER, "default_root_dir": "runs/lm"},
}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def chat_rows() -> list[dict[str, Any]]:
    """Twenty chats of two turns: a number word is asked for, and answered by the next."""
    pairs = [(a, b) for a, b in zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{again} {word}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for again in ("After", "Next to")
        for word, answer in pairs
    ]


def fit(folder: Path, config: dict[str, Any], *options: str) -> Path:
    """Run `lora-lightning fit` with this config, in `folder` and this process; the run directory."""
    name = f"{Path(config['trainer']['default_root_dir']).name}.yaml"
    (folder / name).write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.syspath_prepend(str(folder))
        arguments = ["fit", "--config", name, *options]
        patched.setattr(sys, "argv", ["lora-lightning", *arguments])
        lora_lightning.cli.main.main()
    return folder / config["trainer"]["default_root_dir"]


def own_module_run(folder: Path) -> Path:
    """A run of `own_modules.Net`, which lies in `folder`; to use it, work in there."""
    source = ROOT / "tests/helpers/lightning_modules.py"
    (folder / "own_modules.py").write_text(source.read_text())
    return fit(folder, OWN_MODULE)


def language_model_run(folder: Path, template: str = "chatml", **options: Any) -> Path:
    """A run of a tiny Llama on chats; base, data and run directory lie in `folder`.

    `options`: of LlamaConfig.
    """
    tiny_llama(folder / "base", template, **options)
    lines = [json.dumps(row) for row in chat_rows()]
    (folder / "chats.jsonl").write_text("\n".join(lines) + os.linesep)
    return fit(folder, LANGUAGE_MODEL)
