"""A chat in a pseudo-terminal: what is typed, what is answered, and what Ctrl-C stops."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import child_environment
from tests.helpers.taught_lm import ANSWER, QUESTION, base_with_other_eos, taught

PATIENCE = 90.0  # seconds for one answer, on a machine that is busy


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        code = "from lora_lightning.cli.main import main; main()"
        self.process, self.master = pty.fork()
        if not self.process:
            os.chdir(folder)
            environment = child_environment(TERM="dumb", COLUMNS="200")
            os.execve(sys.executable, [sys.executable, "-c", code, *arguments], environment)
        self.shown = ""

    def until(self, pattern: str) -> str:
        """Read until this is shown; what came up to its end, which is then behind."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"{pattern!r} never came: {self.shown!r}"
            if select.select([self.master], [], [], 1.0)[0]:
                try:
                    self.shown += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError as error:  # the process has ended
                    raise AssertionError(f"ended: {self.shown!r}") from error
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt_until(self, pattern: str) -> None:
        """Press Ctrl-C until it is heard: what comes just before readline waits may be lost."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.shown):
            assert time.monotonic() < end, f"{pattern!r} never came: {self.shown!r}"
            self.type("\x03")
            while select.select([self.master], [], [], 2.0)[0]:
                self.shown += os.read(self.master, 4096).decode("utf-8", "replace")
        self.until(pattern)

    def exit_code(self) -> int:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.master, 4096)
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                self.process = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it does not end")

    def close(self) -> None:
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self.master)


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    # Room for an answer that would last for minutes.
    base = base_with_other_eos(folder / "base", "chatml", max_position_embeddings=100_000)
    return taught(folder, base)


@pytest.fixture
def terminal(run: Path) -> Iterator[Terminal]:
    opened = Terminal(run.parent, "generate", "run", "--max_new_tokens", "90000")
    yield opened
    opened.close()


@pytest.mark.slow
def test_a_chat(terminal: Terminal) -> None:
    terminal.until(r"/help lists the commands.*\n> ")
    terminal.type(f"{QUESTION}\n")
    terminal.until(rf"\r\n{ANSWER}\r\n> ")
    terminal.type("/help\n")
    terminal.until(r"/quit .*\n> ")
    terminal.type("/base\n")
    terminal.until(r"base \(answers\)\r\n> ")
    terminal.type("Once upon a time\n")
    terminal.until(r"Once upon a time\r\n.{40}")  # it writes
    terminal.type("\x03")
    stopped = terminal.until(r" \(stopped\)\r\n> ")
    assert len(stopped) < 100_000
    terminal.type("/adapter default\n/reset\n")  # the chat goes on
    terminal.until(r"begins anew\r\n> ")
    terminal.type("half a line")
    terminal.interrupt_until(r"Ctrl-D or /quit ends the chat\r\n> ")
    terminal.type(f"{QUESTION}\n")
    terminal.until(rf"\r\n{ANSWER}\r\n> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


@pytest.mark.slow
def test_nothing_of_a_text_is_obeyed(run: Path) -> None:
    """The words are drawn at random, control characters among them."""
    drawn = "{do_sample: true, temperature: 100.0, top_k: 0, eos_token_id: 99999}"
    options = ("--max_new_tokens", "90000", "--generation", drawn)
    terminal = Terminal(run.parent, "generate", "run", *options)
    terminal.until(r"\n> ")
    terminal.type("Once upon a time\n")
    terminal.until(r"\r\n")  # the echo
    written = terminal.until(r"[\s\S]{400}")
    terminal.type("\x03")
    terminal.until(r"\(stopped\)")
    assert re.search(r"\\x[01][0-9a-f]", written), "nothing was to be escaped"
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", written)
    terminal.type("/quit\n")
    assert terminal.exit_code() == 0
    terminal.close()
