"""Options of transformers' `generate`, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection

from lora_lightning.errors import ConfigError, nearest_hint


def check_generation_options(names: Collection[str], refused: Collection[str], key: str) -> None:
    """Refuse what `generate` does not know, and what would change what it returns.

    Args:
        names: Those of the options.
        refused: Options that it knows and that cannot be had.
        key: The config key that holds them, for error messages.

    Raises:
        ConfigError: Naming the option.
    """
    if not names:  # importing transformers takes seconds
        return
    from transformers import GenerationConfig

    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in names:
        if name in refused:
            raise ConfigError(
                f"{name!r} cannot be had: a text is returned for each prompt, as long as "
                f"max_new_tokens lets it be. Leave it out. ({key})"
            )
        if name not in known:
            hint = nearest_hint(name, known)
            raise ConfigError(f"transformers' generate has no option {name!r}.{hint} ({key})")
