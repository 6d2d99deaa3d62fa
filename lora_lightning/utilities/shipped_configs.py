"""The configs that come with the package, by name: `sft` is configs/sft.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lora_lightning.errors import ConfigError, did_you_mean, nearest_file

_SUFFIXES = (".yaml", ".yml")


@cache
def configs_folder() -> Path:
    """Where they lie: in an installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name -> file, overlays last."""
    folder = configs_folder()
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("overlays/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def config_path(name: str) -> Path:
    """The config file that is meant by a path, or by the name of a shipped config.

    A file in the working directory comes first: `sft`, then `sft.yaml`, then the shipped one.

    Raises:
        ConfigError: If there is none.

    """
    path = Path(name)
    beside = path.with_name(f"{path.name}.yaml") if path.name else path
    for found in (path, *([] if path.suffix in _SUFFIXES else [beside])):
        if found.is_file():
            return found
    shipped = shipped_configs()
    if (key := name.removesuffix(".yaml")) in shipped:
        return shipped[key]
    if path.is_dir():
        raise ConfigError(f"{name!r} is a folder, no config file.{_choice(shipped)} (config)")
    hint = nearest_file(path)
    near = did_you_mean(key.removeprefix("configs/"), shipped)
    hint = hint or (f" Did you mean {near!r}?" if near else "")
    raise ConfigError(
        f"There is no config {name!r} in {str(path.absolute().parent)!r}.{hint}{_choice(shipped)} "
        "(config)"
    )


def _choice(shipped: dict[str, Path]) -> str:
    return f" Configs that come with the package: {', '.join(shipped)}." if shipped else ""
