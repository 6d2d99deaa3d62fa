"""The options of runs as flat rows, and in what several runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Of the place, not of the training.
_LEFT_OUT = {"trainer.default_root_dir", "ckpt_path", "lora.config"}


def flat_options(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested options by dotted names, as text; what is None or empty is left out.

    Options of a class stand behind its own name: `model: CausalLM`, `model.learning_rate: 0.01`.
    """
    rows: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in _LEFT_OUT or value is None or value in ({}, []):
            continue
        if key == "class_path" and prefix:
            rows[prefix[:-1]] = str(value).removeprefix("lora_lightning.")
        elif key == "init_args" and isinstance(value, Mapping):
            rows.update(flat_options(value, prefix))
        elif isinstance(value, Mapping):
            rows.update(flat_options(value, f"{name}."))
        elif isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
            for part in value:
                last = str(part.get("class_path", "")).rpartition(".")[2]
                rows[f"{name}.{last}"] = "yes"
                rows.update(flat_options(part.get("init_args") or {}, f"{name}.{last}."))
        else:
            rows[name] = _text(value)
    return rows


def differences(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The options that are not the same in all runs, with the value of each; "-": not set."""
    names = dict.fromkeys(name for run in runs for name in run)
    found = {name: [run.get(name, "-") for run in runs] for name in names}
    return {name: values for name, values in found.items() if len({*values}) > 1}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)
