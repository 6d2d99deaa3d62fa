"""The model of a run or an adapter folder, with further adapters put beside its own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_lightning.checkpoint.loading import load_adapter
from lora_lightning.checkpoint.peft.config import CONFIG as PEFT_CONFIG
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import TASK
from lora_lightning.engine.switching import active_adapters, adapter_names, set_adapter
from lora_lightning.errors import CheckpointError, ConfigError, ModelError, printable
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import Run, find_run
from lora_lightning.tasks.causal_lm import CausalLM
from lora_lightning.tasks.language_model import LanguageModel
from lora_lightning.tasks.seq2seq_lm import Seq2SeqLM
from lora_lightning.tasks.stop_tokens import as_ids, saved_end_tokens

_TASKS: dict[Any, type[LanguageModel]] = {"CAUSAL_LM": CausalLM, "SEQ_2_SEQ_LM": Seq2SeqLM}

Place = str | os.PathLike[str]


def open_module(place: Place, ckpt: str | None) -> tuple[LanguageModel, Run | None]:
    """The language model of a run, or of a PEFT folder, which is no run.

    Raises:
        ConfigError: If it is another kind of model.
        CheckpointError: If there is nothing, or it is damaged.

    """
    if _is_folder(place):
        if ckpt is not None:
            raise ConfigError(
                f"{str(place)!r} is an adapter's folder, which has no checkpoints. (ckpt)"
            )
        return _of_folder(Path(place)), None
    run = find_run(place, ckpt)
    task = read_adapter_checkpoint(run.checkpoint).get(TASK)
    module = trained_module(run) if task in ("CausalLM", "Seq2SeqLM", "LanguageModel") else None
    if not isinstance(module, LanguageModel):
        section = run.config.get("model") or {}
        kind = section.get("class_path") if isinstance(section, dict) else section
        what = f"a {kind or task}" if kind or task else "a module of your own"
        raise ConfigError(
            f"{str(place)!r} was trained as {what}, which is no language model of this library "
            "(CausalLM, Seq2SeqLM), so it has no chat and no generated text. What its predict_step "
            f"returns: lora-lightning predict {printable(str(place))} --data.predict FILE. (run)"
        )
    return module, run


def add_adapters(module: LanguageModel, places: Sequence[Place]) -> dict[str, list[str]]:
    """Put further adapters on; all voices by name, that of the run first.

    Raises:
        ConfigError, CheckpointError: If there is none at a place.
        AdapterMismatchError: If it does not fit the base.

    """
    own = active_adapters(module)
    voices = {"+".join(own): own}
    for place in places:
        path = Path(place)
        if not _is_folder(path):
            path = find_run(place).checkpoint
            module.end_tokens += saved_end_tokens(read_adapter_checkpoint(path))
        else:
            module.end_tokens += _ends_of_folder(path)
        name = _free_name(module, Path(place))
        voices[name] = load_adapter(module, path, name)
    module.end_tokens = sorted({*module.end_tokens})
    return voices


def on_device(module: LanguageModel, device: str | None) -> LanguageModel:
    """Move it to a device, by default the one that is fastest here; in eval mode."""
    if device is None:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    try:
        return module.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"device={device!r} cannot be had: {reason} (device)") from error


def _is_folder(place: Place) -> bool:
    return (Path(place) / PEFT_CONFIG).is_file()


def _free_name(module: LanguageModel, place: Path) -> str:
    """A name for an adapter, from its place."""
    if place.is_file():  # a checkpoint, mostly called "best"
        place = next((p for p in place.parents if p.name not in ("", "checkpoints")), place)
    name = re.sub(r"\W", "_", place.resolve().name) or "adapter"
    taken, number = {*adapter_names(module), "base"}, 2
    found = name
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found


def _of_folder(folder: Path) -> LanguageModel:
    options = _read(folder / PEFT_CONFIG)
    base, task = options.get("base_model_name_or_path"), options.get("task_type")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{str(folder)!r} does not name its base (base_model_name_or_path in {PEFT_CONFIG}); "
            "name the run. (run)"
        )
    if task not in _TASKS:
        raise ConfigError(
            f"{str(folder)!r} is an adapter of the kind {task!r}; text is written by those of "
            f"{', '.join(_TASKS)} (task_type in {PEFT_CONFIG}). (run)"
        )
    module = _TASKS[task](base, revision=options.get("revision"))
    module.configure_model()
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        try:
            module.tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # of files that anybody may have written
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"The tokenizer in {str(folder)!r} cannot be read: {reason}"
            ) from error
    module.end_tokens = _ends_of_folder(folder)
    set_adapter(module, load_adapter(module, folder))
    return module


def _ends_of_folder(folder: Path) -> list[int]:
    file = folder / "generation_config.json"
    return as_ids(_read(file).get("eos_token_id")) if file.is_file() else []


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}. (run)") from error
    return content if isinstance(content, dict) else {}
