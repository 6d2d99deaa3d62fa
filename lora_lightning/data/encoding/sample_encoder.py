"""From samples to examples: what all encoders share, which is lengths and counting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from lora_lightning.data.encoding.token_boundaries import Ids
from lora_lightning.data.samples.sample import Document, Example, Sample
from lora_lightning.errors import ConfigError, RecordError, nearest_hint
from lora_lightning.utilities.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Samples that are tokenised in one call: a fast tokenizer works on a list in parallel.
BLOCK = 1000
TOO_LONG = ("truncate", "split", "drop", "error")
UNTRAINABLE = ("error", "drop")


@dataclass
class EncodingReport:
    """Counts of examples and tokens.

    Attributes:
        examples: Examples made.
        tokens: Their tokens; of an encoder-decoder, those of the target too.
        learned: Those of them that are learned.
        truncated: Examples that were cut.
        split_documents: Documents that became several examples, because they are too long.
        too_long: Examples dropped because they are too long.
        untrainable: Examples dropped because nothing of them is learned.
        split_chats: Chats that became several examples.
        unended_chats: Chats whose end no special token marks.
    """

    examples: int = 0
    tokens: int = 0
    learned: int = 0
    truncated: int = 0
    split_documents: int = 0
    too_long: int = 0
    untrainable: int = 0
    split_chats: int = 0
    unended_chats: int = 0

    def line(self, split: str, limit: str) -> str:
        """One line for the console; `limit` is the encoder's."""
        share = 100 * self.learned / max(self.tokens, 1)
        parts = [
            f"{split}: {self.examples:,} examples, {self.tokens:,} tokens, {share:.0f} % of them "
            "learned"
        ]
        notes = {
            f"cut to {limit} (data.max_length)": self.truncated,
            f"documents, longer than {limit}, go on in further examples "
            "(data.too_long)": self.split_documents,
            f"dropped, longer than {limit} (data.too_long)": self.too_long,
            "dropped, nothing of them would be learned (data.untrainable)": self.untrainable,
            "chats became several examples, because the chat template rewrites earlier "
            "turns": self.split_chats,
            "chats end in no special token, so the model does not learn to stop "
            "(data.chat_template)": self.unended_chats,
        }
        parts += [f"{count:,} {what}" for what, count in notes.items() if count]
        return "; ".join(parts)


class SampleEncoder:
    """Samples to examples; a subclass says how, and how an example that is too long is cut.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_length: The most tokens of an example, at least 2.
        too_long: What becomes of longer ones: "truncate" keeps their beginning, "split" goes on
            with a document in further examples, "drop" leaves them out, "error" stops.
        untrainable: What becomes of examples without a learned token, such as those whose prompt
            alone fills `max_length`: "error" stops, "drop" leaves them out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        too_long: str = "truncate",
        untrainable: str = "error",
    ) -> None:
        check_length("max_length", max_length)
        _check_choice("too_long", too_long, TOO_LONG)
        _check_choice("untrainable", untrainable, UNTRAINABLE)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.too_long = too_long
        self.untrainable = untrainable
        self.kinds: set[str] = set()  # of the samples encoded so far: the names of their classes

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens with which what was encoded so far teaches the model to stop."""
        raise NotImplementedError

    def prompting(self) -> dict[str, Any]:
        """How a prompt is written so that it looks like those encoded so far, in plain values."""
        return {"kinds": sorted(self.kinds)}

    @property
    def limit(self) -> str:
        """The greatest length, in words."""
        return _in_words(self._limits())

    def encode(self, sample: Sample, report: EncodingReport | None = None) -> list[Example]:
        """The examples of one sample: mostly one, none where it is dropped."""
        return self.encode_block([sample], report)[0]

    def encode_all(
        self, samples: Iterable[Sample], report: EncodingReport | None = None
    ) -> Iterator[Example]:
        """The examples of all samples in order, tokenised block by block."""
        samples = iter(samples)
        while block := list(islice(samples, BLOCK)):
            for examples in self.encode_block(block, report):
                yield from examples

    def encode_block(
        self, samples: Sequence[Sample], report: EncodingReport | None = None
    ) -> list[list[Example]]:
        """The examples of each sample, tokenised together; `report` counts what becomes of them.

        Raises:
            RecordError: If a sample cannot be used; names its place in the file.
        """
        report = EncodingReport() if report is None else report
        self.kinds |= {type(sample).__name__ for sample in samples}
        return [
            [
                part
                for example in examples
                for part in self._fitting(example, sample, report)
                if self._learned(part, example, sample.where, report)
            ]
            for sample, examples in zip(samples, self._examples(samples, report), strict=True)
        ]

    def encode_prompts(self, samples: Sequence[Sample]) -> list[Ids]:
        """Encode what the model reads to generate, not limited in length."""
        raise NotImplementedError

    def _examples(
        self, samples: Sequence[Sample], report: EncodingReport
    ) -> Iterable[list[Example]]:
        """The examples of each sample, of any length."""
        raise NotImplementedError

    def _limits(self) -> tuple[int, ...]:
        """The most tokens of an example; of its target, if that is apart."""
        return (self.max_length,)

    def _lengths(self, example: Example) -> tuple[int, ...]:
        """Lengths that `_limits` limits."""
        return (len(example.input_ids),)

    def _cut(self, example: Example) -> Example:
        """The example within the limits."""
        raise NotImplementedError

    def _split(self, example: Example, sample: Sample) -> list[Example]:
        """A document in parts; each token of it but the first is learned in one of them.

        A part begins with the last token of the one before, which its second is predicted from.
        """
        if not isinstance(sample, Document):
            raise RecordError(
                f"{sample.where}: the example has {_in_words(self._lengths(example))}, "
                f"{self.limit} are allowed, and only documents (format: text) can be split. Allow "
                "more (data.max_length), or choose truncate, drop or error. (data.too_long)"
            )
        ids, labels = example.input_ids, example.labels
        return [
            Example(
                ids[start : start + self.max_length],
                [IGNORE_INDEX, *labels[start + 1 : start + self.max_length]],
            )
            for start in range(0, len(ids) - 1, self.max_length - 1)
        ]

    def _fitting(self, example: Example, sample: Sample, report: EncodingReport) -> list[Example]:
        """The example within the limits."""
        lengths = self._lengths(example)
        if all(length <= limit for length, limit in zip(lengths, self._limits(), strict=True)):
            return [example]
        if self.too_long == "error":
            raise RecordError(
                f"{sample.where}: the example has {_in_words(lengths)}, and {self.limit} are "
                "allowed. Allow more (data.max_length), or say that longer ones are cut, split or "
                "dropped: too_long: truncate, split or drop. (data.too_long)"
            )
        if self.too_long == "drop":
            report.too_long += 1
            return []
        if self.too_long == "split":
            report.split_documents += 1
            return self._split(example, sample)
        return [self._cut(example)]

    def _learned(self, part: Example, whole: Example, where: str, report: EncodingReport) -> bool:
        """True if a token of `part` is learned; counts the example."""
        learned = sum(label != IGNORE_INDEX for label in part.labels)
        if not learned:
            if self.untrainable == "error":
                raise RecordError(self._nothing_learned(whole, where))
            report.untrainable += 1
            return False
        report.truncated += part is not whole and self.too_long == "truncate"
        report.examples += 1
        report.tokens += sum(self._lengths(part))
        report.learned += learned
        return True

    def _nothing_learned(self, example: Example, where: str) -> str:
        learned = (n for n, label in enumerate(example.labels) if label != IGNORE_INDEX)
        read_only = next(learned, None)
        if read_only is None:
            reason = "it has no text, or no turn of the assistant, to learn. Remove it"
        else:
            reason = (
                f"its first {read_only:,} tokens are only read, and it is cut to {self.limit}. "
                "Allow more (data.max_length)"
            )
        return (
            f"{where}: nothing of this example would be learned: {reason}, or leave such examples "
            "out: untrainable: drop. (data.untrainable)"
        )


def _in_words(lengths: Sequence[int]) -> str:
    tokens, *target = lengths
    return f"{tokens:,} tokens" + "".join(f" and {length:,} of the target" for length in target)


def check_length(name: str, length: int) -> None:
    """Refuse a length that leaves nothing to learn."""
    if length < 2:
        raise ConfigError(f"{name} must be at least 2 tokens, found {length}. (data.{name})")


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        hint = nearest_hint(value, known)
        raise ConfigError(
            f"{name} must be one of {', '.join(known)}; found {value!r}.{hint} (data.{name})"
        )
