"""The model card: README.md of an exported folder, with what a reader asks first."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

import lora_lightning
from lora_lightning.checkpoint.peft.base_model import plain_class
from lora_lightning.checkpoint.state_dict import KEY, adapter_state_dict
from lora_lightning.engine.injection import adapters_named
from lora_lightning.engine.targets.hints import shown_name
from lora_lightning.errors import first_few, printable
from lora_lightning.runs.run import Run
from lora_lightning.verbs.export.hub import why_no_repo
from lora_lightning.verbs.export.usage import Use, Way, ways_to_use

# PEFT's task types and the hub's names for what a pipeline does.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}
# Options that are shown where an adapter has them; None and other defaults of "off" are not.
_OPTIONS = (
    "r", "lora_alpha", "alpha", "init_r", "target_r", "use_rslora", "use_dora", "lora_dropout",
    "init_lora_weights", "rank_pattern", "alpha_pattern", "modules_to_save", "bias",
)  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, 0, "none", {}, [])
_TRAINING = ("learning_rate", "lr_schedule", "weight_decay", "quantize")


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        name: Of the folder or of the repository on the hub.
        form: The format.
        run: The run that it comes from.
        checkpoint: The content of its checkpoint.
        adapter_name: In the run.
        model: The model that the folder is for.
        options: adapter_config.json; empty where the format has none.

    """

    name: str
    form: str
    run: Run
    checkpoint: Mapping[str, Any]
    adapter_name: str
    model: nn.Module
    options: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The name of the base, a folder or a hub's."""
        found = getattr(getattr(self.model, "config", None), "name_or_path", None)
        return found if isinstance(found, str) and found else None

    @property
    def shown_base(self) -> str:
        """The base for readers: of a folder, whose path says more of the machine, its last part."""
        if self.base is None:
            return plain_class(self.model).__name__
        return self.base if is_hub_name(self.base) else Path(self.base).name

    def ways(self, place: str, base: str) -> list[Way]:
        """How it is used, called `place`, with the base called `base`."""
        kind = plain_class(self.model).__name__
        return ways_to_use(Use(place, self.form, base, self.options, kind))


def is_hub_name(name: str | None) -> bool:
    """True for a name that others can find on the hub."""
    if not name or Path(name).exists():
        return False
    return why_no_repo(name) is None


def card(subject: Subject) -> str:
    """The text of README.md."""
    kind = subject.checkpoint[KEY]["adapters"][subject.adapter_name].get("peft_type", "LORA")
    ways = subject.ways(subject.name, subject.shown_base)
    return "\n".join(
        (
            _front_matter(subject),
            f"# {_line(subject.name)}",
            "",
            f"An adapter ({kind}) for `{_line(subject.shown_base)}`, trained with lora_lightning "
            f"{lora_lightning.__version__} on PyTorch Lightning; files in the format "
            f"`{subject.form}`.",
            "",
            *_table(("", ""), _facts(subject)),
            "",
            "## Metrics",
            "",
            *_metrics(subject),
            "",
            "## How to use it",
            *(f"\n{way.title}:\n\n```{way.language}\n{way.text}\n```" for way in ways),
            "",
        )
    )


def _front_matter(subject: Subject) -> str:
    task = subject.options.get("task_type")
    library = {"diffusers": "diffusers"}.get(subject.form, "peft")
    content: dict[str, Any] = {
        "library_name": library if subject.base else "lora_lightning",
        "tags": ["lora", "lora_lightning"],
    }
    if is_hub_name(subject.base):
        content["base_model"] = subject.base
    if task in _PIPELINES:
        content["pipeline_tag"] = _PIPELINES[task]
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def _facts(subject: Subject) -> Iterable[tuple[str, str]]:
    entry = subject.checkpoint[KEY]["adapters"][subject.adapter_name]
    adapters = adapters_named(subject.model, subject.adapter_name)
    size = sum(t.numel() for t in adapter_state_dict(subject.model, subject.adapter_name).values())
    options = entry["config"]
    shown = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key in _OPTIONS
        if (value := options.get(key)) not in _OFF and (key, value) != ("init_lora_weights", True)
    ]
    names = dict.fromkeys(map(shown_name, adapters))
    yield "base", f"`{_line(subject.shown_base)}`"
    yield "options", _line(", ".join(shown))
    yield "modules", f"{len(adapters)}: {_line(first_few(names, 12))}"
    yield "parameters", f"{size:,}"
    if data := _data(subject.run.config):
        yield "data", data
    yield "training", _line(", ".join(_training(subject)))


def _data(config: Mapping[str, Any]) -> str:
    section = config.get("data") or {}
    options = (section.get("init_args") or {}) if isinstance(section, Mapping) else {}
    kind = str(section.get("class_path", "")) if isinstance(section, Mapping) else str(section)
    named = [
        f"{key}={_without_folders(options[key])}"
        for key in ("train", "val", "dataset", "path", "format", "max_length")
        if options.get(key) not in _OFF
    ]
    return _line(", ".join(filter(None, (kind.rpartition(".")[2], *named))))


def _without_folders(value: Any) -> Any:
    """A path says more of the machine than of the data: its last part alone."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    is_path = isinstance(value, str) and (value.startswith(("/", ".", "~")) or Path(value).exists())
    return Path(value).name if is_path else value


def _training(subject: Subject) -> Iterable[str]:
    checkpoint, config = subject.checkpoint, subject.run.config
    yield f"{checkpoint.get('global_step')} steps"
    section = config.get("model") or {}
    options = (section.get("init_args") or {}) if isinstance(section, Mapping) else {}
    options = {**options, **(checkpoint.get("module_options") or {})}
    yield from (f"{key} {options[key]}" for key in _TRAINING if options.get(key) not in _OFF)
    precision = (config.get("trainer") or {}).get("precision") or checkpoint.get("precision")
    if precision:
        yield f"precision {precision}"


# What says nothing of the adapter: how the run went on its machine.
_OF_TRAINING = ("train", "lr", "tokens_per_second", "samples_per_second", "peak_memory_gb")


def _metrics(subject: Subject) -> list[str]:
    """A table of what was measured with the weights of this checkpoint."""
    measured = {
        name: float(value)
        for name, value in (subject.checkpoint[KEY].get("metrics") or {}).items()
        if isinstance(value, (Tensor, float, int)) and not name.startswith(_OF_TRAINING)
    }
    step = subject.checkpoint.get("global_step")
    compared = _comparison(subject.run, step)
    if compared:
        rows = [(f"`{_line(name)}`", _number(a), _number(b)) for name, a, b in compared]
        return _table(("metric", "base", "with the adapter"), rows)
    if measured:
        rows_here = [(f"`{_line(name)}`", _number(value)) for name, value in measured.items()]
        return _table(("metric", f"at step {step}"), rows_here)
    return ["Nothing was measured when this checkpoint was written."]


def _comparison(run: Run, step: object) -> list[tuple[str, float, float]]:
    """(metric, of the base, with the adapter) that the run's CSV log has for `step`."""
    logs = run.directory.glob("logs/version_*/metrics.csv") if run.directory else ()
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return []
    with newest.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("step") == str(step)]
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        for column, value in row.items():
            name = str(column).removeprefix("base/")
            tuned = row.get(f"tuned/{name}")
            if str(column).startswith("base/") and value and tuned:
                found[name] = float(value), float(tuned)
    return [(name, *pair) for name, pair in found.items()]


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _line(text: str) -> str:
    """Text of others in one line of a table."""
    return printable(text).replace("\n", " ").replace("|", "\\|")
