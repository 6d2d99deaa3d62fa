"""The words that errors share, and that none of them can make a terminal do anything."""

from __future__ import annotations

import pickle
import unicodedata

import pytest

import lora_lightning
from lora_lightning.errors import LoraError, RecordError, printable, warn

HOSTILE = {
    "clipboard, OSC 52": "\x1b]52;c;aGk=\x07",
    "title, OSC of C1": "\x9d0;owned\x9c",
    "erase the line, CSI": "\x1b[2K\x1b[1A",
    "CSI of C1": "\x9b31m",
    "carriage return": "bad\rgood",
    "backspace": "bad\x08\x08\x08good",
    "the rest of the line turned around": "\u202efig.txt\u202c",
    "isolates": "\u2066a\u2069",
    "no width": "def\u200bault",
    "letters of tags": "".join(chr(0xE0000 + ord(letter)) for letter in "do it"),
    "separators of lines": "a\u2028b\u2029c\x85d",
    "half a pair": "\ud83d",
    "a byte of a file name": b"caf\xe9".decode("utf-8", "surrogateescape"),
    "null": "a\0b",
}
READABLE = [
    "two\nlines,\ta tab",
    "naïve Ünïcode, 你好, こんにちは, مرحبا بالعالم, שלום, हिन्दी",
    "नमस्ते क्‍ष, می‌خواهم",  # joiners within words
    "👩‍👩‍👧 👍🏽 ✔️ é",
    "C:\\x1b is no escape",
]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_a_terminal_would_obey_is_spelled_out(text: str) -> None:
    shown = printable(f"a file '{text}' is")
    kinds = {unicodedata.category(letter) for letter in shown}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode()
    # What is spelled out is the text itself, in Python's spelling.
    assert (
        shown.encode("ascii", "backslashreplace").decode("unicode_escape") == f"a file '{text}' is"
    )
    assert printable(shown) == shown


@pytest.mark.parametrize("text", READABLE)
def test_what_people_read_stays(text: str) -> None:
    assert printable(text) == text


def test_warnings_are_printable() -> None:
    with pytest.warns(UserWarning, match="module") as caught:
        warn("module '\x1b[2J'", stacklevel=1)
    assert str(caught[0].message) == r"module '\x1b[2J'"
    assert caught[0].filename == __file__


def test_every_error_is_printable_however_it_is_raised() -> None:
    kinds = [getattr(lora_lightning, name) for name in lora_lightning.__all__]
    errors = [k for k in kinds if isinstance(k, type) and issubclass(k, LoraError)]
    assert len(errors) > 8
    for kind in errors:
        error = kind("key '\x1b]52;c;aGk=\x07'")
        for text in (str(error), str(pickle.loads(pickle.dumps(error))), str(error.args[0])):
            assert text == r"key '\x1b]52;c;aGk=\x07'"
    assert str(RecordError()) == ""
    assert RecordError(3).args == (3,)
