"""A chat in the terminal."""

from __future__ import annotations

import contextlib
from typing import Any

from lora_lightning.data.samples.sample import Chat
from lora_lightning.data.sources.row import check_characters
from lora_lightning.errors import LoraError, nearest_hint
from lora_lightning.training.messages import show, write
from lora_lightning.verbs.generate.speaker import BASE, WHERE, Messages, Speaker
from lora_lightning.verbs.generate.streaming import Stop

_ASKS = "> "
_COMMANDS = {
    "/adapter": "NAME: who answers; without a name: who there is",
    "/base": "the model without adapters answers",
    "/compare": "the base answers beside the adapter; once more: not",
    "/system": "TEXT: begin anew with this system message; without a text: with none",
    "/reset": "begin anew",
    "/help": "this list",
    "/quit": "end (also Ctrl-D)",
}


class TerminalChat:
    """Asks, answers, and keeps the conversation.

    Args:
        speaker: Answers.
        compare: Whether the base answers, too; the conversation goes on with the other's answer.
    """

    def __init__(self, speaker: Speaker, compare: bool) -> None:
        self.speaker, self.compare = speaker, compare
        self.voice = next(iter(speaker.voices))
        self.messages: Messages = []

    def run(self) -> None:
        """Chat until the user ends it."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then has lines that can be edited, and a history
        remembers = "" if self.speaker.chat else "; each line is answered by itself"
        show("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends" + remembers)
        while True:
            try:
                line = input(_ASKS)
            except EOFError:
                show("")
                return
            except KeyboardInterrupt:
                show("", "Ctrl-D or /quit ends the chat")
                continue
            except UnicodeDecodeError:
                show("that was no UTF-8, so it was not read")
                continue
            try:
                if line.strip() == "/quit":
                    return
                if line.startswith("/"):
                    self._obey(*line.split(maxsplit=1))
                elif line.strip():
                    self._answer(line)
            except LoraError as error:
                show(str(error))

    def _obey(self, command: str, rest: str = "") -> None:
        rest = rest.strip()
        if command == "/adapter":
            self._switch(rest)
        elif command == "/base":
            self._switch(BASE)
        elif command == "/compare":
            self.compare = not self.compare
            show(f"the base answers beside it: {'yes' if self.compare else 'no'}")
        elif command == "/system" and self.speaker.chat:
            self.speaker.system, self.messages = rest or None, []
            show("the chat begins anew")
        elif command == "/reset":
            self.messages = []
            show("the chat begins anew")
        elif command == "/help":
            show(*(f"{name:<9} {what}" for name, what in _COMMANDS.items()))
        else:
            hint = nearest_hint(command, _COMMANDS) or " /help lists them."
            show(f"there is no command {command!r}.{hint} A line of text may begin with a blank")

    def _switch(self, name: str) -> None:
        known = [*self.speaker.voices, BASE]
        if name in known:
            self.voice = name
        elif name:
            show(f"there is no adapter {name!r}.{nearest_hint(name, known)}")
        others = [f"{each} (answers)" if each == self.voice else each for each in known]
        show(", ".join(others))

    def _answer(self, line: str) -> None:
        check_characters(line, WHERE)
        said = {"role": "user", "content": line}
        kept = [*self.messages]
        self.messages.append(said)
        answer = ""
        try:
            ids = self._ids(line)
            for voice in self._voices():
                if self.compare:
                    write(f"{voice}: ")
                stop = Stop()
                with stop.at_interrupt():
                    answer = self.speaker.say(ids, voice, write, stop)
                show("" if not stop.asked else " (stopped)")
                if stop.asked:
                    break
        finally:
            if answer and self.speaker.chat:
                self.messages.append({"role": "assistant", "content": answer})
            else:  # no turn was answered
                self.messages = kept

    def _voices(self) -> list[str]:
        return [BASE, self.voice] if self.compare and self.voice != BASE else [self.voice]

    def _ids(self, line: str) -> list[int]:
        """The conversation as token ids; without its oldest turns where it is too long."""
        if not self.speaker.chat:
            return self.speaker.ids(self.speaker.sample(line))
        forgotten = 0
        while True:
            chat: Any = Chat(tuple(self.messages), WHERE)
            ids = self.speaker.ids(self.speaker.framed(chat))
            if len(self.messages) == 1 or self.speaker.room(ids) == self.speaker.max_new_tokens:
                break
            del self.messages[:2]
            forgotten += 2
        if forgotten:
            show(f"({forgotten} oldest turns are forgotten: {self.speaker.positions:,} positions)")
        return ids
