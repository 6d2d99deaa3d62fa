"""`export --push`, in processes of their own: a stand-in for the hub takes what is uploaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lightning import export
from lora_lightning.errors import ConfigError
from tests.helpers.stand_in_hub import TOKEN, StandInHub, stand_in_hub

pytestmark = pytest.mark.slow


def pushed(run: Path, hub: str, *options: str, token: str = TOKEN) -> tuple[int, str]:
    own = {
        "HF_ENDPOINT": hub,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    others = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "lora-lightning"),
            "export",
            f"runs/{run.name}",
            *options,
        ],
        cwd=run.parents[1],
        env={**others, **own},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_folder_arrives(lm_run: Path, tmp_path: Path) -> None:
    hub: StandInHub
    with stand_in_hub() as hub:
        out = tmp_path / "out"
        code, said = pushed(lm_run, hub.url, str(out), "--push", "me/mine")
        assert code == 0, said
        assert f"pushed to {hub.url}/me/mine" in said
        assert hub.private == {"me/mine"}
        local = {path.name: path.read_bytes() for path in out.iterdir()}
        assert hub.repos["me/mine"] == local
        assert "# me/mine" in local["README.md"].decode()
        again = tmp_path / "again"
        code, said = pushed(lm_run, hub.url, str(again), "--push", "me/mine")
        assert (code, "is there already" in said, "Traceback" in said) == (1, True, False), said
        assert again.is_dir()
        code, said = pushed(lm_run, hub.url, str(again), "--push", "me/mine", "--force")
        assert code == 0, said


def test_the_hub_refuses_or_is_away(lm_run: Path, tmp_path: Path) -> None:
    with stand_in_hub() as hub:
        out = tmp_path / "out"
        code, said = pushed(lm_run, hub.url, str(out), "--push", "me/mine", token="hf_wrong")
        assert (code, "not pushed to 'me/mine'" in said, "Traceback" in said) == (1, True, False)
        assert "401" in said
        assert (out / "adapter_model.safetensors").is_file()
        assert not hub.repos


def test_what_is_seen_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'no/such/name' is no name of a repository.*\(push\)"):
        export("not looked at", tmp_path / "out", push="no/such/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        export("not looked at", tmp_path / "out", push="me/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        export("not looked at", tmp_path / "out", push="me/mine")
