"""A folder onto the hub of Hugging Face, by huggingface_hub's own upload."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.errors import CheckpointError, ConfigError


def check_push(repo: str) -> None:
    """Refuse what can be seen to fail before any work is done.

    Raises:
        ConfigError: If the name is none, the hub is switched off, or nobody is logged in.

    """
    from huggingface_hub import constants, get_token

    if (reason := why_no_repo(repo)) is not None:
        raise ConfigError(
            f"push={repo!r} is no name of a repository, as `me/my-adapter` is: {reason} (push)"
        )
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "push needs the hub, and HF_HUB_OFFLINE is set. Take it out of the environment. (push)"
        )
    if get_token() is None:
        raise ConfigError(
            "push needs a token of the hub that may write: log in with `hf auth login`, or set "
            "HF_TOKEN. (push)"
        )


def why_no_repo(name: str) -> str | None:
    """Why the hub cannot have a repository of that name; None where it can."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error).split("\n")[0]
    return None


def push(folder: Path, repo: str, force: bool) -> str:
    """Upload a folder as one commit; the address of the repository. A new one is private.

    Raises:
        ConfigError: If the repository is there already, and `force` is not given.
        CheckpointError: If the hub refuses or cannot be reached; the folder stays.

    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="lora_lightning")
    try:
        made = api.create_repo(repo, private=True, exist_ok=force)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Adapter of lora_lightning"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 409 and not force:
            raise ConfigError(
                f"The repository {repo!r} is there already. To add a commit with these files to "
                f"it: --force, or `hf upload {repo} {folder}`. (push)"
            ) from error
        raise CheckpointError(_not_pushed(repo, folder, error)) from error
    except (OSError, ValueError) as error:  # no network; files that the hub does not take
        raise CheckpointError(_not_pushed(repo, folder, error)) from error
    return str(made)


def _not_pushed(repo: str, folder: Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"{str(folder)!r} is written, but not pushed to {repo!r}: {reason}. To try the upload "
        f"again: `hf upload {repo} {folder}`. (push)"
    )
