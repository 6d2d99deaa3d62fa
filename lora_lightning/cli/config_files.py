"""The files behind `--config`: shipped ones by name, and mistakes in them before anything loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError
from lora_lightning.utilities.shipped_configs import config_path

_FLAGS = ("--config", "-c")


def with_config_paths(arguments: list[str]) -> list[str]:
    """The arguments with the path of a config file in the place of a shipped config's name.

    Raises:
        ConfigError: If there is no such config.

    """
    return _replaced(arguments, lambda name: str(config_path(name)))


def config_files(arguments: list[str]) -> list[Path]:
    """The config files that the arguments name, in their order.

    Raises:
        ConfigError: If there is no such config.

    """
    found: list[Path] = []

    def note(name: str) -> str:
        found.append(config_path(name))
        return name

    _replaced(arguments, note)
    return found


def contents(files: list[Path]) -> list[dict[str, Any]]:
    """What YAML files say.

    Raises:
        ConfigError: If one is no YAML; names file, line and column.

    """
    return [_content(file) for file in files]


def _replaced(arguments: list[str], replace: Callable[[str], str]) -> list[str]:
    """The arguments with `replace` of what follows `--config`, text of a config left as it is."""
    replaced = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, name = argument.partition("=")
        if before in _FLAGS and not _is_text(argument):
            argument = replace(argument)
        elif flag in _FLAGS and equals and not _is_text(name):
            argument = f"{flag}={replace(name)}"
        replaced.append(argument)
    return replaced


def _is_text(config: str) -> bool:
    return config.lstrip().startswith("{") or "\n" in config


def _content(file: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        begun = error.context_mark
        since = f" ({error.context} from line {begun.line + 1})" if begun and error.context else ""
        raise ConfigError(f"{str(file)!r}{where}: {error.problem}{since}. (config)") from error
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{str(file)!r} cannot be read as YAML: {reason} (config)") from error
    if not isinstance(found, (dict, type(None))):
        raise ConfigError(
            f"{str(file)!r} holds {type(found).__name__} {str(found)[:40]!r}; a config is a "
            "mapping with sections lora, model, data, trainer. (config)"
        )
    return found or {}
