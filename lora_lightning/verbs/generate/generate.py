"""Text from a trained run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_lightning.data.samples.formats import TextSource
from lora_lightning.data.samples.sample import Chat, Document, Sample
from lora_lightning.errors import ConfigError
from lora_lightning.runs.run import Run
from lora_lightning.tasks.model_options import check_generation_options
from lora_lightning.training.messages import rank_zero_info, show, write
from lora_lightning.utilities.atomic_write import write_atomically
from lora_lightning.utilities.new_output import check_new_file
from lora_lightning.verbs.generate.chat import TerminalChat
from lora_lightning.verbs.generate.opening import add_adapters, on_device, open_module
from lora_lightning.verbs.generate.speaker import BASE, Messages, Speaker

_REFUSED = ("return_dict_in_generate", "num_return_sequences", "max_new_tokens", "max_length")

Texts = str | dict[str, str]  # of one voice, or of several by their names


def generate(
    run: str | os.PathLike[str],
    prompt: str | list[str] | list[dict[str, Any]] | None = None,
    file: str | None = None,
    out: str | None = None,
    compare: bool = False,
    max_new_tokens: int | None = None,
    system: str | None = None,
    ckpt: str | None = None,
    adapter: list[str] | None = None,
    generation: dict[str, Any] | None = None,
    chat: bool | None = None,
    device: str | None = None,
    stream: bool = False,
    force: bool = False,
) -> Any:
    """Answer prompts with a trained language model, or chat with it in the terminal.

    Prompts are written as the training data were: turns of a chat by the chat template, or plain
    texts. Without `prompt` and `file` it is a chat; where there is no terminal, each line of the
    standard input is a prompt.

    Args:
        run: The run directory, a checkpoint, a config that names the directory, or a PEFT folder.
        prompt: A text; in Python also several, or a chat as messages (`role`, `content`).
        file: Prompts, read as `predict` reads them: one of each row.
        out: JSONL with the prompt and the text of each row, in the place of showing them.
        compare: Let the base answer, too.
        max_new_tokens: The most tokens of an answer. Default: the run's `model.max_new_tokens`.
        system: What a chat begins with, unless it has a system message itself.
        ckpt: Of a run directory: `best`, `last` or a path. Default: the best, else the last.
        adapter: Further adapters of the same base, as runs, checkpoints or PEFT folders; on the
            command line, once for each. All answer; in a chat, the one that `/adapter NAME` names.
        generation: Further options of transformers' `generate`, before the run's own.
        chat: Whether a prompt is a turn of a chat. Default: as in training.
        device: Such as `cuda:1` or `cpu`. Default: the GPU, where there is one.
        stream: Show each text as it comes. The command does.
        force: Replace `out` where it exists.

    Returns:
        A text, for several prompts a list, for `file` a list of rows {"prompt", "prediction"};
        with `compare` or `adapter` a dict of each one's text in its place; of a chat None.
    """
    _check_options(prompt, file, out, max_new_tokens, force)
    check_generation_options(generation or {}, _REFUSED, "generation")
    module, found = open_module(run, ckpt)
    voices = add_adapters(module, adapter or [])
    on_device(module, device)
    longest = module.max_new_tokens if max_new_tokens is None else max_new_tokens
    speaker = Speaker(module, voices, chat, system, longest, generation or {})
    for line in (f"{found.checkpoint if found else run} on {module.model_name}", *speaker.about()):
        rank_zero_info(line)
    if file is not None:
        return _answer_file(speaker, _source(speaker, file, found), out, compare, stream)
    return _answer(speaker, prompt, compare, stream)


# What the command does otherwise than a call from Python; words that it takes as they are.


def _check_options(
    prompt: Any, file: str | None, out: str | None, max_new_tokens: int | None, force: bool
) -> None:
    """Refuse what cannot be had."""
    if prompt is not None and file is not None:
        raise ConfigError("give a prompt or a file of prompts, not both. (prompt, file)")
    if out is not None:
        if file is None:
            raise ConfigError("out is for the rows of a file of prompts; name one. (file)")
        check_new_file(out, force)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(
            f"max_new_tokens must be at least 1, found {max_new_tokens}. (max_new_tokens)"
        )
    if prompt is not None and (not isinstance(prompt, (str, list)) or prompt == []):
        raise ConfigError(
            f"prompt must be a text, a list of texts, or a list of messages; found {prompt!r}. "
            "(prompt)"
        )


def _answer(speaker: Speaker, prompt: Any, compare: bool, stream: bool) -> Any:
    """Answer what is given or, if that is nothing, what the terminal or standard input says."""
    voices = _voices(speaker, compare)
    if prompt is not None:
        alone = isinstance(prompt, str) or isinstance(prompt[0], dict)  # a message: of one chat
        asked = map(speaker.sample, [prompt] if alone else prompt)
        answers = _answers(speaker, voices, asked, stream)
        return next(answers) if alone else list(answers)
    if os.isatty(0) and os.isatty(1):
        TerminalChat(speaker, compare).run()
        return None
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    samples = (speaker.sample(line) for line in lines if line.strip())
    texts = list(_answers(speaker, voices, samples, stream))
    if not texts:
        raise ConfigError(
            "there is nothing to answer: give a prompt or a file, write prompts into the standard "
            "input, or chat in a terminal. (prompt)"
        )
    return texts


def _voices(speaker: Speaker, compare: bool) -> list[str]:
    return [*([BASE] if compare else []), *speaker.voices]


def _source(speaker: Speaker, file: str, run: Run | None) -> TextSource:
    section = (run.config.get("data") if run else None) or {}
    options = (section.get("init_args") if isinstance(section, dict) else None) or {}
    return TextSource(
        file,
        "file",
        options.get("format"),
        options.get("columns"),
        chat=bool(speaker.chat),
        prompts_only=True,
    )


def _answers(
    speaker: Speaker, voices: list[str], samples: Iterable[Sample], stream: bool
) -> Iterator[Texts]:
    """The texts for each sample, one after the other."""
    heard: Callable[[str], None] | None = write if stream else None
    for sample in samples:
        ids = speaker.ids(sample)
        texts = {}
        for voice in voices:
            if stream and len(voices) > 1:
                write(f"{voice}: ")
            texts[voice] = speaker.say(ids, voice, heard)
            if stream:
                show("")
        yield texts if len(voices) > 1 else texts[voices[0]]


def _answer_file(
    speaker: Speaker, source: TextSource, out: str | None, compare: bool, stream: bool
) -> list[dict[str, Any]]:
    samples = [speaker.framed(sample) for sample in source.samples()]
    if not samples:
        raise ConfigError(f"{source.path!r} holds no prompts. (file)")
    for sample in samples:  # before the work
        speaker.ids(sample)
    shown = stream and out is None
    answers = _answers(speaker, _voices(speaker, compare), _announced(samples, shown), shown)
    rows = []
    for sample, texts in zip(samples, answers, strict=True):
        texts = texts if isinstance(texts, dict) else {"prediction": texts}
        rows.append({"prompt": _plain(sample), **texts})
    if out is not None:
        _write_rows(rows, Path(out))
        rank_zero_info(f"{len(rows):,} rows: {out}")
    return rows


def _write_rows(rows: list[dict[str, Any]], out: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically({out: lines.encode("utf-8", "replace")})
    except OSError as error:
        raise ConfigError(
            f"{str(out)!r} cannot be written: {error.strerror or error}. Nothing was left there. "
            "(out)"
        ) from error


def _announced(samples: list[Sample], shown: bool) -> Iterator[Sample]:
    for number, sample in enumerate(samples, 1):
        if shown and len(samples) > 1:
            show(f"--- {number} of {len(samples)}: {sample.where}")
        yield sample


def _plain(sample: Sample) -> str | Messages:
    if isinstance(sample, Chat):
        return [*sample.messages]
    return sample.text if isinstance(sample, Document) else sample.prompt
