"""From prompts and completions to examples of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lora_lightning.data.encoding.causal_lm import end_of_sequence, ids_around
from lora_lightning.data.encoding.sample_encoder import EncodingReport, SampleEncoder, check_length
from lora_lightning.data.encoding.token_boundaries import Ids
from lora_lightning.data.samples.sample import Example, PromptCompletion, Sample
from lora_lightning.errors import RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Seq2SeqEncoder(SampleEncoder):
    """The prompt is what the encoder reads, the completion the decoder's target, all learned.

    Both carry the special tokens that the tokenizer gives a text and its target. A prompt that is
    too long keeps its beginning and the special tokens after it; a target that is too long keeps
    its beginning only, so that the model does not learn to stop there.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_length: The most tokens of the prompt, special tokens counted.
        max_target_length: The most tokens of the target. Default: `max_length`.
        **options: Those of `SampleEncoder`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        max_target_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, max_length, **options)
        self.max_target_length = max_length if max_target_length is None else max_target_length
        check_length("max_target_length", self.max_target_length)
        _, self._after_prompt = ids_around(tokenizer)

    @property
    def end_tokens(self) -> list[int]:
        """The end-of-sequence token."""
        return [end_of_sequence(self.tokenizer)] if self.kinds else []

    def encode_prompts(self, samples: Sequence[Sample]) -> list[Ids]:
        """The token ids of what the encoder reads, not limited in length."""
        prompts = [_pair(sample)[0] for sample in samples]
        return self.tokenizer(prompts, verbose=False)["input_ids"] if prompts else []

    def _examples(
        self, samples: Sequence[Sample], report: EncodingReport
    ) -> Iterable[list[Example]]:
        if not samples:
            return
        targets = self.tokenizer(text_target=[_pair(s)[1] for s in samples], verbose=False)
        eos = end_of_sequence(self.tokenizer)
        prompts = self.encode_prompts(samples)
        for prompt, target in zip(prompts, targets["input_ids"], strict=True):
            yield [Example(prompt, target if target[-1:] == [eos] else [*target, eos])]

    def _limits(self) -> tuple[int, ...]:
        return self.max_length, self.max_target_length

    def _lengths(self, example: Example) -> tuple[int, ...]:
        return len(example.input_ids), len(example.labels)

    def _cut(self, example: Example) -> Example:
        input_ids = example.input_ids
        if len(input_ids) > self.max_length:
            kept = self.max_length - len(self._after_prompt)
            input_ids = [*input_ids[:kept], *self._after_prompt]
        return Example(input_ids, example.labels[: self.max_target_length])


def _pair(sample: Sample) -> tuple[str, str]:
    if not isinstance(sample, PromptCompletion):
        found = type(sample).__name__.lower()
        raise RecordError(
            f"{sample.where}: an encoder-decoder reads a prompt and learns its completion, but "
            f"this is a {found}. Give both, or train a causal LM. (data.format)"
        )
    return sample.prompt, sample.completion
