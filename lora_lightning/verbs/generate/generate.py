"""Text from a trained run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
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
    texts. A text ends where the model's files say, and where turns were taught to end. Without
    `prompt` and `file` it is a chat; where there is no terminal, each line of the standard input is
    a prompt.

    Args:
        run: The run directory, a checkpoint, a config that names the directory, or an adapter's
            PEFT folder.
        prompt: A text; in Python also several, or a chat as messages (`role`, `content`).
        file: Prompts, read as `predict` reads them: one of each row.
        out: JSONL with the prompt and the text of each row, in the place of showing them.
        compare: Let the base answer, too.
        max_new_tokens: The most tokens of an answer. Default: the run's `model.max_new_tokens`.
        system: What a chat begins with, unless it has a system message itself.
        ckpt: Of a run directory: `best`, `last` or a path. Default: the best, where something was
            monitored, else the last.
        adapter: Further adapters of the same base, as runs, checkpoints or PEFT folders. All
            answer; in a chat, the one that `/adapter NAME` names.
        generation: Further options of transformers' `generate`, such as
            `{do_sample: true, temperature: 0.7}`. Default: the run's `model.generation`.
        chat: Whether a prompt is a turn of a chat. Default: as in training.
        device: Such as `cuda:1` or `cpu`. Default: the GPU, where there is one.
        stream: Show each text as it comes. The command does.
        force: Replace `out` where it exists.

    Returns:
        The text for one prompt, a list for several, for `file` a list of rows {"prompt": ...,
        "prediction": ...}. With `compare` or `adapter`, a dict of the base's and each adapter's in
        the place of a text. Of a chat, None.

    Raises:
        ConfigError: Options that cannot be had together, a run of another kind of model.
        CheckpointError: No such run, or a damaged one.
        RecordError: A prompt that is too long for the model or that the chat template refuses.
    """
    several = _check_options(prompt, file, out, max_new_tokens, force)
    check_generation_options(generation or {}, _REFUSED, "generation")
    module, found = open_module(run, ckpt)
    voices = add_adapters(module, adapter or [])
    on_device(module, device)
    longest = module.max_new_tokens if max_new_tokens is None else max_new_tokens
    speaker = Speaker(module, voices, chat, system, longest, generation or {})
    for line in (f"{found.checkpoint if found else run} on {module.model_name}", *speaker.about()):
        rank_zero_info(line)
    asked = [*([BASE] if compare else []), *speaker.voices]
    if file is not None:
        return _answer_file(speaker, asked, _source(speaker, file, found), out, stream)
    if prompt is not None:
        prompts: Any = prompt if several else [prompt]
        answers = _answers(speaker, asked, map(speaker.sample, prompts), stream)
        return list(answers) if several else next(answers)
    if os.isatty(0) and os.isatty(1):
        TerminalChat(speaker, compare).run()
        return None
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    samples = (speaker.sample(line) for line in lines if line.strip())
    texts = list(_answers(speaker, asked, samples, stream))
    if not texts:
        raise ConfigError(
            "there is nothing to answer: give a prompt or a file, write prompts into the standard "
            "input, or chat in a terminal. (prompt)"
        )
    return texts


# What the command does otherwise than a call from Python; words that it takes as they are.
generate.command_defaults = {"stream": True}  # type: ignore[attr-defined]
generate.command_texts = ("prompt", "system")  # type: ignore[attr-defined]


def _check_options(
    prompt: Any, file: str | None, out: str | None, max_new_tokens: int | None, force: bool
) -> bool:
    """Refuse what cannot be had; True if there are several prompts."""
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
    if prompt is None or isinstance(prompt, str):
        return False
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(
            f"prompt must be a text, a list of texts, or a list of messages; found {prompt!r}. "
            "(prompt)"
        )
    return not isinstance(prompt[0], dict)  # a dict is a message: one chat


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
    speaker: Speaker, voices: list[str], source: TextSource, out: str | None, stream: bool
) -> list[dict[str, Any]]:
    samples = [speaker.framed(sample) for sample in source.samples()]
    if not samples:
        raise ConfigError(f"{source.path!r} holds no prompts. (file)")
    for sample in samples:  # before the work
        speaker.ids(sample)
    answers = _answers(
        speaker, voices, _announced(samples, stream and out is None), stream and out is None
    )
    rows = []
    for sample, texts in zip(samples, answers, strict=True):
        texts = texts if isinstance(texts, dict) else {"prediction": texts}
        rows.append({"prompt": _plain(sample), **texts})
    if out is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically({check_new_file(out, force=True): lines.encode("utf-8", "replace")})
        rank_zero_info(f"{len(rows):,} rows: {out}")
    return rows


def _announced(samples: list[Sample], shown: bool) -> Iterator[Sample]:
    for number, sample in enumerate(samples, 1):
        if shown and len(samples) > 1:
            show(f"--- {number} of {len(samples)}: {sample.where}")
        yield sample


def _plain(sample: Sample) -> str | Messages:
    if isinstance(sample, Chat):
        return [*sample.messages]
    return sample.text if isinstance(sample, Document) else sample.prompt
