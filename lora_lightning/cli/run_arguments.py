"""A run in the place of options: `validate runs/sft` for `--config ... --ckpt_path best`."""

from __future__ import annotations

# What goes on from, or evaluates, which checkpoint where none is named.
CHECKPOINT = {"fit": "last", "validate": "best", "test": "best", "predict": "best"}


def with_run(arguments: list[str]) -> list[str]:
    """Replace a run, the word behind the verb, by its config and checkpoint.

    Raises:
        CheckpointError: If there is no such run.
        ConfigError: If it has no config.

    """
    if len(arguments) < 2 or arguments[0].startswith("-") or arguments[1].startswith("-"):
        return arguments
    verb, place, *rest = arguments
    from lora_lightning.errors import ConfigError
    from lora_lightning.runs.run import config_file, find_run

    named = next((rest[i + 1] for i, a in enumerate(rest[:-1]) if a == "--ckpt_path"), None)
    asked = named or CHECKPOINT.get(verb)
    run = find_run(place, asked if asked == "last" or named else None)
    config = config_file(run.directory) if run.directory else None
    if config is None:
        raise ConfigError(
            f"{place!r} has no config.yaml of `lora-lightning fit`: give the options of the run, "
            f"lora-lightning {verb} --config FILE --ckpt_path CHECKPOINT. (run)"
        )
    checkpoint = ["--ckpt_path", str(run.checkpoint)] if asked and not named else []
    return [verb, "--config", str(config), *checkpoint, *rest]
