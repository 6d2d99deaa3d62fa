"""A class by its import path, as the command line and a run's config name it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError, nearest_hint


def object_at(path: str, option: str) -> Any:
    """What the import path `my_module.Net` names.

    Args:
        path: The path.
        option: Who names it, for the message.

    Raises:
        ConfigError: If there is no such module, or nothing of that name in it.

    """
    home, _, name = path.rpartition(".")
    if not home or not name:
        raise ConfigError(
            f"{path!r} is no import path of a class: name its module, too, my_module.Net. "
            f"({option})"
        )
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if not f"{home}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{path} imports {missing!r}, which is not there. ({option})"
            ) from error
        file = Path.cwd().joinpath(*missing.split(".")).with_suffix(".py")
        near = nearest_hint(file.name, [path.name for path in file.parent.glob("*.py")])
        raise ConfigError(
            f"There is no module {missing!r} for {path!r}: it is not installed, and there is no "
            f"{file.name} in {str(file.parent)!r}.{near} Work in the folder that "
            f"holds it, or name that in PYTHONPATH. ({option})"
        ) from error
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(f"{home} has no class {name!r}.{nearest_hint(name, own)} ({option})")
    return getattr(module, name)
