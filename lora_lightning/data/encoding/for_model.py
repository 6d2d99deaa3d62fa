"""Choice of the encoder for a model, as settings that a worker process can be given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_lightning.data.encoding.causal_lm import Encoder
from lora_lightning.data.encoding.sample_encoder import EncodingReport, SampleEncoder
from lora_lightning.data.encoding.seq2seq_lm import Seq2SeqEncoder
from lora_lightning.data.samples.formats import TextSource
from lora_lightning.data.samples.sample import Example, Sample
from lora_lightning.data.sources.row import Row
from lora_lightning.data.validation_split import is_held_out, sample_content
from lora_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where nothing else limits it: what fits most files and most memories.
MAX_LENGTH = 1024


@dataclass
class Encoding:
    """A tokenizer and how samples are encoded; the encoder itself is made where it is used."""

    tokenizer: PreTrainedTokenizerBase
    encoder_decoder: bool  # the model is one
    options: dict[str, Any]  # arguments of `Encoder` or `Seq2SeqEncoder`

    @cached_property
    def encoder(self) -> SampleEncoder:
        """Made at first use."""
        kind: type[SampleEncoder] = Seq2SeqEncoder if self.encoder_decoder else Encoder
        return kind(self.tokenizer, **self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "encoder"}


@dataclass
class BlockEncoder:
    """The training examples of some rows of a stream, without the share that is held out."""

    source: TextSource
    encoding: Encoding
    val_fraction: float = 0.0

    def __call__(
        self, rows: Iterable[Row], report: EncodingReport | None = None
    ) -> Iterator[Example]:
        """The examples in order, and counts of them in `report`."""
        samples = (s for s in self.source.samples(rows) if not held_out(s, self.val_fraction))
        return self.encoding.encoder.encode_all(samples, report)


def held_out(sample: Sample, fraction: float) -> bool:
    """True if a sample is among the `fraction` held out for validation."""
    return fraction > 0 and is_held_out(sample_content(sample), fraction)


def encoding_for(
    tokenizer: PreTrainedTokenizerBase, config: Any, options: dict[str, Any]
) -> Encoding:
    """Choose the encoder for a model, by its `config`; None where there is a tokenizer only.

    Raises:
        ConfigError: If one of the options of `TextDataModule` does not suit the model.
    """
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    kind = "an encoder-decoder" if encoder_decoder else "a causal LM"
    foreign: tuple[str, ...] = ("max_target_length",)
    if encoder_decoder:
        foreign = ("chat_template", "chat_template_kwargs", "train_on_prompt")
    for name in foreign:
        if options[name]:
            raise ConfigError(f"{name} has no meaning for {kind}. Leave it out. (data.{name})")
    own = {name: value for name, value in options.items() if name not in foreign}
    own["max_length"] = _length(config, options["max_length"])
    if own.get("max_target_length") is not None:
        own["max_target_length"] = _length(config, own["max_target_length"], "max_target_length")
    return Encoding(tokenizer, encoder_decoder, own)


def _length(config: Any, length: int | None, name: str = "max_length") -> int:
    text_config = config.get_text_config() if config is not None else None
    positions = getattr(text_config, "max_position_embeddings", None)
    if length is None:
        return min(positions or MAX_LENGTH, MAX_LENGTH)
    if positions and length > positions:
        raise ConfigError(
            f"{name}={length} is more than the {positions} positions that the model has "
            f"(max_position_embeddings in its config.json). (data.{name})"
        )
    return length
