"""From samples to examples of a causal LM: token ids, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_lightning.data.encoding.chat_labels import ChatTurns, Marked
from lora_lightning.data.encoding.chat_template import ChatTemplate
from lora_lightning.data.encoding.sample_encoder import EncodingReport, SampleEncoder
from lora_lightning.data.encoding.token_boundaries import Ids, PieceTokenizer
from lora_lightning.data.samples.sample import Chat, Document, Example, Sample
from lora_lightning.errors import ConfigError
from lora_lightning.utilities.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Piece(NamedTuple):
    text: str
    learned: bool


class Encoder(SampleEncoder):
    """Samples to examples of a causal LM.

    * A document is learned as a whole, and so is the end-of-sequence token that is put after it.
    * Of a prompt and its completion, the completion and the end-of-sequence token after it are
      learned. The prompt's ids are those that it has alone, as when the model is asked.
    * Of a chat, every assistant turn and the token that ends it are learned; see `ChatTurns`.

    The beginning-of-sequence token is there where the tokenizer or the chat template puts it, once.
    The first token is never learned: there is nothing before it to predict it from.

    Args:
        tokenizer: As for `SampleEncoder`.
        max_length: As for `SampleEncoder`.
        train_on_prompt: Learn prompts too, and all of a chat up to the last assistant turn.
        chat_template: Jinja or a file of it, instead of the tokenizer's own.
        chat_template_kwargs: What else the template reads, such as `enable_thinking`.
        **options: Those of `SampleEncoder`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        train_on_prompt: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, max_length, **options)
        self.train_on_prompt = train_on_prompt
        self._pieces = PieceTokenizer(tokenizer)
        self._template = ChatTemplate(tokenizer, chat_template, chat_template_kwargs)
        self._chats = ChatTurns(tokenizer, self._template)
        self._before, _ = ids_around(tokenizer)

    @property
    def end_tokens(self) -> list[int]:
        """Those that end turns of chats; of other samples, the end-of-sequence token."""
        eos = [end_of_sequence(self.tokenizer)] if self.kinds - {Chat.__name__} else []
        return sorted({*self._chats.end_tokens, *eos})

    def prompting(self) -> dict[str, Any]:
        """The kinds of samples, and the chat template if it is not the tokenizer's own."""
        template = self._template
        return {
            **super().prompting(),
            "chat_template": template.own,
            "chat_template_kwargs": template.options,
        }

    def encode_prompts(self, samples: Sequence[Sample]) -> list[Ids]:
        """Documents and prompts as they are, chats up to where the assistant answers."""
        texts = [_prompt(sample, self._chats) for sample in samples]
        return [
            ids if isinstance(sample, Chat) else self._begun(ids)
            for sample, (ids,) in zip(samples, self._pieces([[t] for t in texts]), strict=True)
        ]

    def _examples(
        self, samples: Sequence[Sample], report: EncodingReport
    ) -> Iterable[list[Example]]:
        texts = [self._texts(sample, report) for sample in samples]
        ids = iter(self._pieces([[p.text for p in text] for group in texts for text in group]))
        for sample, group in zip(samples, texts, strict=True):
            yield [self._example(sample, text, next(ids)) for text in group]

    def _texts(self, sample: Sample, report: EncodingReport) -> list[list[_Piece]]:
        if isinstance(sample, Document):
            return [[_Piece(sample.text, True)]]
        if not isinstance(sample, Chat):
            prompt = _Piece(sample.prompt, self.train_on_prompt)
            return [[prompt, _Piece(sample.completion, True)]]
        texts = self._chats.texts(sample)
        report.split_chats += len(texts) > 1
        report.unended_chats += bool(texts) and not self._chats.ends_a_turn(texts[-1][0])
        return [list(self._pieces_of(marked)) for marked in texts] or [[]]

    def _pieces_of(self, marked: Marked) -> Iterator[_Piece]:
        text, spans = marked
        position = 0
        for start, end in spans:
            yield _Piece(text[position:start], self.train_on_prompt)
            yield _Piece(text[start:end], True)
            position = end

    def _example(self, sample: Sample, pieces: list[_Piece], ids: list[Ids]) -> Example:
        input_ids: Ids = []
        labels: Ids = []
        for piece, part in zip(pieces, ids, strict=True):
            input_ids += part
            labels += part if piece.learned else [IGNORE_INDEX] * len(part)
        if not isinstance(sample, Chat):  # a chat template writes both itself
            input_ids = self._begun(input_ids)
            labels = [*[IGNORE_INDEX] * (len(input_ids) - len(labels)), *labels]
            labels[: len(self._before)] = [IGNORE_INDEX] * len(self._before)
            eos = end_of_sequence(self.tokenizer)
            if input_ids[-1:] != [eos]:
                input_ids.append(eos)
                labels.append(eos)
        labels[:1] = [IGNORE_INDEX] * len(labels[:1])
        return Example(input_ids, labels)

    def _begun(self, ids: Ids) -> Ids:
        """`ids` after the tokens that begin a text, unless the text holds them."""
        return ids if ids[: len(self._before)] == self._before else [*self._before, *ids]

    def _cut(self, example: Example) -> Example:
        return Example(example.input_ids[: self.max_length], example.labels[: self.max_length])


def _prompt(sample: Sample, chats: ChatTurns) -> str:
    if isinstance(sample, Chat):
        return chats.prompt(sample)
    return sample.text if isinstance(sample, Document) else sample.prompt


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, so the "
            "model could not learn where a text ends. Name one that has. (data.tokenizer)"
        )
    return int(tokenizer.eos_token_id)


def ids_around(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """The ids that the tokenizer puts before and after a text."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        end = start + len(bare)
        if whole[start:end] == bare:
            return whole[:start], whole[end:]
    return [], []
