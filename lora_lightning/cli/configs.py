"""`lora-lightning configs`: what configs there are, and copies of them to edit."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.cli.help import entry, sentence
from lora_lightning.cli.terminal import refuse, tell
from lora_lightning.cli.wording import PROGRAM
from lora_lightning.errors import ConfigError, nearest_hint
from lora_lightning.utilities.atomic_write import write_atomically
from lora_lightning.utilities.new_output import check_new_file
from lora_lightning.utilities.shipped_configs import shipped_configs


def configs(arguments: list[str]) -> None:
    """List the configs that come with the package, or copy one.

    Args:
        arguments: NAME of a config, DEST to copy it to (a file or a folder), and `--force`.

    Raises:
        ConfigError: If there is no such config, or a file is there already.

    """
    force = "--force" in arguments
    words = [word for word in arguments if word != "--force"]
    odd = [word for word in words if word.startswith("-")] or words[2:]
    if odd:
        refuse(f"unrecognized arguments: {' '.join(odd)}.", "configs")
    tell(copied(words, force) if words else listed())


def listed() -> str:
    """All configs with what they are for, a line each."""
    shipped = shipped_configs()
    room = max(map(len, shipped), default=0) + 4
    lines = [line for name, path in shipped.items() for line in entry(name, purpose(path), room)]
    listing = "\n".join(lines)
    return (
        f"{listing}\n\nuse one:   {PROGRAM} fit --config NAME [--config overlays/NAME]\n"
        f"copy one:  {PROGRAM} configs NAME [DEST]\n"
    )


def copied(words: list[str], force: bool) -> str:
    """Copy a config to a place, by default the working directory, and say where it is."""
    name, dest = [*words, "."][:2]
    shipped = shipped_configs()
    if name not in shipped:
        raise ConfigError(
            f"There is no config {name!r}.{nearest_hint(name, shipped)} Configs that come with the "
            f"package: {', '.join(shipped)}. (name)"
        )
    source, place = shipped[name], Path(dest)
    if place.is_dir() or dest.endswith("/"):
        place = place / source.name
    check_new_file(place, force)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically({place: source.read_bytes()})
    except OSError as error:
        raise ConfigError(
            f"{str(place)!r} cannot be written: {error.strerror or error}. (dest)"
        ) from error
    return f"{place}: edit it, then {PROGRAM} fit --config {place}\n"


def purpose(config: Path) -> str:
    """The first sentence of the comment that a config begins with."""
    head = []
    for line in config.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        head.append(text)
    return sentence(" ".join(head))
