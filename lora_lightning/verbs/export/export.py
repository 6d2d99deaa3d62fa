"""The verb `export`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from lora_lightning.checkpoint.peft.base_model import folder_target, pretrained_inside
from lora_lightning.checkpoint.peft.config import CONFIG
from lora_lightning.checkpoint.peft.reading import read_config
from lora_lightning.checkpoint.peft.writing import adapter_files
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.errors import ConfigError, first_few, nearest_hint
from lora_lightning.runs.run import Run, find_run
from lora_lightning.runs.skeleton import adapted_module
from lora_lightning.training.messages import show
from lora_lightning.utilities.new_output import check_new_folder, new_folder
from lora_lightning.verbs.export.card import Subject, card, is_hub_name
from lora_lightning.verbs.export.diffusers import write_diffusers
from lora_lightning.verbs.export.hub import check_push
from lora_lightning.verbs.export.hub import push as push_folder
from lora_lightning.verbs.export.portable import write_portable

Format = Literal["peft", "portable", "diffusers"]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        folder: The folder.
        format: Its format.
        adapter: The adapter's name in the run.
        files: Bytes of each file.
        url: Of the repository on the hub; None where nothing was pushed.

    """

    folder: Path
    format: str
    adapter: str
    files: dict[str, int]
    url: str | None = None

    def __repr__(self) -> str:  # what a notebook shows below the printed lines
        return f"adapter {self.adapter!r} as {self.format} in {str(self.folder)!r}"


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Format = "peft",
    push: str | None = None,
    ckpt: str | None = None,
    force: bool = False,
    module: Any = None,
    adapter: str | None = None,
) -> Exported:
    """Write the adapter of a run as a folder that other programs load, with a model card.

    `peft`: for peft, transformers and this library; every type and option that peft has.
    `portable`: plain LoRA of one rank, lora_alpha = r, for programs that know one scale for all
    modules (vLLM, SGLang, TensorRT-LLM, llama.cpp); what is plain LoRA in disguise becomes it
    exactly, what is more is refused. `diffusers`: the same in the file of `load_lora_weights`.

    Args:
        run: The run's directory, a checkpoint of it, or its config.
        out: The folder to make.
        format: `peft`, `portable` or `diffusers`.
        push: Repository on the hub to upload the folder to, `me/my-adapter`. A new one is private.
        ckpt: Of a run directory, the checkpoint: `best`, `last` or a path. Default: the best, where
            something was monitored, else the last.
        force: Put the folder in the place of one that is there; add a commit to a repository that
            is there.
        module: The LightningModule's class, or an instance with the same base, where the run does
            not say how it is made.
        adapter: Which adapter, where the run has several.

    Raises:
        ConfigError: If something is there already, or the format cannot hold the adapter.
        CheckpointError: If there is no such run, or the checkpoint is damaged.
        AdapterMismatchError: If the adapter does not fit the base.

    """
    _check_format(format)
    check_new_folder(out, force)
    if push is not None:
        check_push(push)
    found = find_run(run, ckpt)
    checkpoint = read_adapter_checkpoint(found.checkpoint)
    name = _adapter_name(found, [*checkpoint[KEY]["adapters"]], adapter)
    made = adapted_module(found, module)
    model, prefix = folder_target(made, name)
    _say_what_moved(checkpoint, prefix)
    folder = Path(out)
    with new_folder(folder, force) as draft:
        _write(made, model, draft, name, format)
        options = read_config(draft) if (draft / CONFIG).is_file() else {}
        subject = Subject(push or folder.name, format, found, checkpoint, name, model, options)
        (draft / "README.md").write_text(card(subject), encoding="utf-8")
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    _show(folder, files, subject)
    url = None if push is None else push_folder(folder, push, force)
    if url is not None:
        show(f"pushed to {url}")
    return Exported(folder, format, name, files, url)


def _check_format(form: str) -> None:
    if form not in get_args(Format):
        known = get_args(Format)
        raise ConfigError(
            f"format is {form!r}; it is peft, portable or diffusers."
            f"{nearest_hint(str(form), known)} (format)"
        )


def _write(made: Any, model: nn.Module, draft: Path, name: str, form: str) -> None:
    if form == "peft":
        for path, content in adapter_files(made, draft, name).items():
            path.write_bytes(content)
    elif form == "portable":
        write_portable(model, draft, name)
    else:
        # Of all models of a pipeline, not of one.
        write_diffusers(made if pretrained_inside(made) else model, draft, name)


def _say_what_moved(checkpoint: dict[str, Any], prefix: str) -> None:
    """Training can change more than the adapter, and a folder of an adapter has no place for it."""
    owned = {key for entry in checkpoint[KEY]["adapters"].values() for key in entry["tensors"]}
    left = [key for key in checkpoint["state_dict"] if key not in owned and key.startswith(prefix)]
    # Carried by a teacher, say.
    moved = [key.removeprefix(prefix) for key in left if key in checkpoint[KEY]["base"]]
    if moved:
        show(
            "the run has moved some of its base, too, which no folder of an adapter holds:",
            f"  {first_few(moved)}",
            "what loads it computes with the base's own; lora-lightning merge keeps it",
        )


def _adapter_name(run: Run, names: list[str], asked: str | None) -> str:
    if asked is None and len(names) > 1:
        raise ConfigError(
            f"{str(run.checkpoint)!r} holds the adapters {', '.join(names)}: say which one. "
            "(adapter)"
        )
    if asked is not None and asked not in names:
        raise ConfigError(
            f"{str(run.checkpoint)!r} holds no adapter {asked!r}, but {', '.join(names)}."
            f"{nearest_hint(asked, names)} (adapter)"
        )
    return names[0] if asked is None else asked


def _show(folder: Path, files: dict[str, int], subject: Subject) -> None:
    which = "the best checkpoint" if subject.run.monitored else "checkpoint"
    show(
        f"{which} {subject.run.checkpoint}: adapter {subject.adapter_name!r} as {subject.form}",
        *(f"  {folder / name}  {size:,} bytes" for name, size in files.items()),
    )
    if subject.options and subject.base and not is_hub_name(subject.base):
        show(
            "the base is named by a folder of this machine; for others, change",
            f"  base_model_name_or_path: {subject.base}",
        )
    way = subject.ways(str(folder), subject.base or "BASE")[0]
    show(f"to use it ({way.title}):", *(f"  {line}" for line in way.text.split("\n") if line))
