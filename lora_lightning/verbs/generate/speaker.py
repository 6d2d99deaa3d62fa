"""A language model with its adapters that answers prompts, written as in its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lora_lightning.data.encoding.causal_lm import Encoder
from lora_lightning.data.encoding.chat_labels import template_end_tokens
from lora_lightning.data.encoding.sample_encoder import SampleEncoder
from lora_lightning.data.encoding.seq2seq_lm import Seq2SeqEncoder
from lora_lightning.data.samples.formats import read_samples
from lora_lightning.data.samples.sample import Chat, PromptCompletion, Sample
from lora_lightning.data.sources.row import Row, check_characters
from lora_lightning.engine.switching import disable_adapter, set_adapter
from lora_lightning.errors import ConfigError, RecordError
from lora_lightning.tasks.language_model import LanguageModel
from lora_lightning.tasks.stop_tokens import stop_line, stop_tokens
from lora_lightning.verbs.generate.streaming import Stop, TextStream

BASE = "base"  # the voice without adapters
WHERE = "the prompt"

Messages = list[dict[str, Any]]


@dataclass
class Speaker:
    """Answers prompts.

    Attributes:
        module: The task, in eval mode.
        voices: The adapters that act together, by the name under which they are asked for.
        chat: Whether a prompt is a turn of a chat; None: as in training.
        system: What a chat begins with, if it says nothing else itself.
        max_new_tokens: The most tokens of an answer.
        options: Of transformers' `generate`, before those of the task.
    """

    module: LanguageModel
    voices: dict[str, list[str]]
    chat: bool | None
    system: str | None
    max_new_tokens: int
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self._known = bool(self.module.prompting.get("kinds"))
        template = self.module.prompting.get("chat_template") or self.tokenizer.chat_template
        if self.chat is None:
            trained = Chat.__name__ in self.module.prompting.get("kinds", [])
            self.chat = trained or (not self._known and not self.reads_apart and bool(template))
        if self.chat and (self.reads_apart or not template):
            lacks = "is an encoder-decoder" if self.reads_apart else "has no chat template"
            raise ConfigError(f"{self.module.model_name!r} {lacks}: it reads texts. (chat)")
        if self.system is not None and not self.chat:
            raise ConfigError(
                "a system message begins a chat, and this run's prompts are plain texts. Put it "
                "into the prompt. (system)"
            )
        if self.chat and not self.module.end_tokens:  # of before checkpoints held them
            self.module.end_tokens = template_end_tokens(self.tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the training data."""
        return self.module.tokenizer

    @property
    def network(self) -> Any:
        """The network of transformers."""
        return self.module.network

    @property
    def reads_apart(self) -> bool:
        """True for an encoder-decoder."""
        return bool(self.network.config.is_encoder_decoder)

    def about(self) -> list[str]:
        """Say how prompts are written, and where texts end if the tokenizer says otherwise."""
        prompting = self.module.prompting
        how = "plain texts"
        if self.chat:
            own = "" if prompting.get("chat_template") is None else " that the run was given"
            how = f"turns of a chat, written by the chat template{own}"
        elif prompting.get("format") == "alpaca":
            how = "instructions, in Alpaca's layout"
        why = "as in training" if self._as_trained() else "asked for (chat)"
        if not self._known:
            why = "the checkpoint does not say how training wrote them (chat)"
        stops = stop_line(self.tokenizer, self.module.end_tokens)
        named = "eos_token_id" in {**self.module.generation, **self.options}
        return [f"prompts are {how}: {why}", *([stops] if stops and not named else [])]

    def _as_trained(self) -> bool:
        return (Chat.__name__ in self.module.prompting.get("kinds", [])) == self.chat

    # -- prompts -----------------------------------------------------------------------------------

    def sample(self, prompt: str | Messages) -> Sample:
        """The sample that asks for an answer to `prompt`."""
        if not isinstance(prompt, str):
            if not self.chat:
                raise ConfigError(
                    "messages are a chat, and this run's prompts are plain texts. Give a text; or "
                    "have chats anyway (chat: true). (prompt)"
                )
            row = Row({"messages": prompt}, WHERE)
            (sample,) = read_samples([row], format="messages", prompts_only=True)
            return self.framed(sample)
        check_characters(prompt, WHERE)
        if self.module.prompting.get("format") == "alpaca" and not self.chat:
            row = Row({"instruction": prompt}, WHERE)
            (sample,) = read_samples([row], format="alpaca", prompts_only=True)
            return sample
        return self.framed(PromptCompletion(prompt, "", WHERE))

    def framed(self, sample: Sample) -> Sample:
        """A text as a turn of a chat, and a chat with the system message, where that is so."""
        if not self.chat:
            return sample
        if isinstance(sample, PromptCompletion):
            sample = Chat(({"role": "user", "content": sample.prompt},), sample.where)
        assert isinstance(sample, Chat)
        told = sample.messages[0]["role"] == "system"
        if self.system is None or told:
            return sample
        first = {"role": "system", "content": self.system}
        return Chat((first, *sample.messages), sample.where, sample.tools)

    def ids(self, sample: Sample) -> list[int]:
        """What the network reads.

        Raises:
            RecordError: If it is nothing, or the chat template refuses it.
        """
        (ids,) = self._encoder.encode_prompts([sample])
        if not ids:
            raise RecordError(f"{sample.where} is empty, so there is nothing to go on from.")
        return ids

    @cached_property
    def _encoder(self) -> SampleEncoder:
        if self.reads_apart:
            return Seq2SeqEncoder(self.tokenizer, 2)
        given = self.module.prompting
        return Encoder(
            self.tokenizer,
            2,
            chat_template=given.get("chat_template"),
            chat_template_kwargs=given.get("chat_template_kwargs"),
        )

    # -- answers -----------------------------------------------------------------------------------

    @property
    def positions(self) -> int | None:
        """How many tokens the network has positions for; None where nothing says it."""
        config = self.network.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    def room(self, ids: Sequence[int]) -> int:
        """How many tokens an answer to these may have; 0 where there is no room for one."""
        if self.positions is None:
            return self.max_new_tokens
        left = self.positions - (0 if self.reads_apart else len(ids))
        fits = len(ids) <= self.positions
        return min(self.max_new_tokens, max(left, 0)) if fits else 0

    def say(
        self,
        ids: list[int],
        voice: str,
        show: Callable[[str], None] | None = None,
        stop: Stop | None = None,
    ) -> str:
        """The answer of a voice, shown piece by piece as it comes.

        Raises:
            RecordError: If the model has no positions for prompt and answer.
        """
        room = self.room(ids)
        if not room:
            raise RecordError(
                f"{WHERE} has {len(ids):,} tokens, and the model has positions for "
                f"{self.positions:,} (max_position_embeddings in its config.json), the answer's "
                "among them. Shorten it. (prompt)"
            )
        options: dict[str, Any] = {
            **self.options,
            "max_new_tokens": room,
            "num_return_sequences": 1,
        }
        if stop is not None:
            options["stopping_criteria"] = [stop]
        one_by_one = self._number("num_beams") in (None, 1)
        if show and one_by_one:
            named = "eos_token_id" in {**self.module.generation, **self.options}
            ends = [] if named else stop_tokens(self.network, self.module.end_tokens)
            options["streamer"] = TextStream(self.tokenizer, ends, show)
        with self._as(voice):
            inputs = torch.tensor([ids], device=self.module.device)
            (text,) = self.module.generate(inputs, **options)
        if show and not one_by_one:  # beams are known at the end only
            show(text)
        return text

    def _number(self, name: str) -> Any:
        own = getattr(self.network.generation_config, name, None)
        return {name: own, **self.module.generation, **self.options}[name]

    @contextmanager
    def _as(self, voice: str) -> Iterator[None]:
        if voice != BASE:
            set_adapter(self.module, self.voices[voice])
            yield
            return
        with disable_adapter(self.module):
            yield
