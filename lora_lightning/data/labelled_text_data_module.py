"""Base of data modules with labelled texts: tokenizer and padded batches."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_lightning.data.labelled_data_module import Collate, LabelledDataModule
from lora_lightning.data.split_data_module import SplitOptions
from lora_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]


class LabelledTextDataModule(LabelledDataModule):
    """Labelled texts, tokenised; a subclass documents its options."""

    def __init__(
        self,
        options: SplitOptions,
        label_column: str | None,
        label_names: list[str] | None,
        tokenizer: str | None,
        max_length: int,
    ) -> None:
        super().__init__(options, label_column, label_names)
        self.tokenizer_name = tokenizer
        self.max_length = max_length

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first used."""
        return self._load_tokenizer()

    def collator(self) -> Collate:
        """Return the collate function, which pads a batch of examples."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    def lengths(self, examples: list[Example]) -> list[int]:
        """Tokens of each text."""
        return [len(example["input_ids"]) for example in examples]

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase
        tokenizer, name, key = self.load_processor(
            "AutoTokenizer", self.tokenizer_name, "data.tokenizer"
        )
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"the tokenizer of {name!r} has no padding token, so its texts cannot share a "
                f"batch; name one that has. ({key})"
            )
        fewest = tokenizer.num_special_tokens_to_add() + 1
        if not fewest <= self.max_length <= tokenizer.model_max_length:
            raise ConfigError(
                f"max_length must be from {fewest} to {tokenizer.model_max_length}, which is what "
                f"{name!r} takes; found {self.max_length}. (data.max_length)"
            )
        return tokenizer
