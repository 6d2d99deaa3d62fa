"""What a Hugging Face folder holds beside the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lora_lightning.data.encoding.chat_template import read_template
from lora_lightning.errors import CheckpointError, ModelError
from lora_lightning.utilities.hub import load_pretrained, resolve_model_path

END_TOKENS = "end_tokens"  # of a checkpoint: the tokens that turns were taught to end with


def save_config(network: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json: that of the base, with what the weights are now."""
    config = network.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(network).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)


def save_generation_config(task: Any, checkpoint: dict[str, Any], folder: Path) -> str | None:
    """Write generation_config.json of a model that writes text, with all tokens that end it.

    Returns:
        A line about the tokens that were added; None where there are none.

    Raises:
        CheckpointError: If the checkpoint's entry is no list of tokens.

    """
    network = task.network
    if not network.can_generate():
        return None
    learned = checkpoint.get(END_TOKENS) or []
    rows = network.config.get_text_config().vocab_size
    if not isinstance(learned, (list, tuple)) or not all(
        isinstance(token, int) and 0 <= token < rows for token in learned
    ):
        raise CheckpointError(
            f"The checkpoint's entry {END_TOKENS!r} is no list of tokens of the model: {learned!r}."
        )
    try:
        options = task.options.hub()
        generation = load_pretrained("GenerationConfig", task.model_name, **_revision(options))
    except ModelError:  # a base may have none
        generation = network.generation_config
    own = generation.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else [*own]
    every = [*dict.fromkeys([*own, *learned])]
    added = [token for token in every if token not in own]
    if added:
        generation.eos_token_id = every
    generation.save_pretrained(folder)
    return (
        f"generation ends at the tokens {every}, of which {added} were learned" if added else None
    )


def _revision(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key == "revision"}


def save_processor(task: Any, checkpoint: dict[str, Any], config: Any, folder: Path) -> str | None:
    """Write the tokenizer with its chat template, or what prepares images.

    Args:
        task: The task.
        checkpoint: Of its run; it names the tokenizer that the texts were read with.
        config: The run's, which may have another chat template.
        folder: Where it is written.

    Returns:
        A line where there is none.

    """
    data = (config.get("data") or {}) if isinstance(config, dict) else {}
    options = (data.get("init_args") or {}) if isinstance(data, dict) else {}
    images = task.auto_class.endswith("ForImageClassification")
    kind = "AutoImageProcessor" if images else "AutoTokenizer"
    name = checkpoint.get("tokenizer") or options.get("tokenizer") or task.model_name
    try:
        hub = task.options.hub() if name == task.model_name else {}
        found = load_pretrained(kind, str(name), **hub)
        if not images and options.get("chat_template"):
            text = read_template(options["chat_template"], found)
            known = found.chat_template if isinstance(found.chat_template, dict) else {}
            found.chat_template = known.get(text, text)
        found.save_pretrained(folder)
    except (ModelError, ValueError) as error:
        what = "image processor" if images else "tokenizer"
        return f"no {what} was written: {str(error).splitlines()[0]}"
    return None


def copy_code(task: Any, folder: Path) -> None:
    """Copy Python code that lies in the base's folder and that its config names."""
    place = Path(resolve_model_path(task.model_name))
    if getattr(task.network.config, "auto_map", None) and place.is_dir():
        for file in place.glob("*.py"):
            shutil.copyfile(file, folder / file.name)
