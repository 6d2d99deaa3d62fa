"""Labelled texts as padded batches of token ids, for any Hugging Face tokenizer."""

from __future__ import annotations

from typing import Any

from lora_lightning.data.labelled_data_module import LabelledDataModule
from lora_lightning.errors import ConfigError

Example = dict[str, Any]


class LabelledTextDataModule(LabelledDataModule):
    """Labelled texts, tokenised.

    Args:
        train: Training data; their labels are the classes.
        val: Validation data, or the share of the training data held out.
        test: Test data.
        predict: Data to predict; labels are not read.
        label_column: Column or key of the label.
        label_names: The classes in order.
        tokenizer: Name of the tokenizer's model. Default: the LightningModule's `model_name`.
        max_length: Longer texts are cut to this many tokens; how many were cut is reported.
        batch_size: Texts per batch, each batch padded to its longest text.
        num_workers: Worker processes per data loader; 0 loads in the main process.
    """

    def __init__(
        self,
        train: str | None = None,
        val: float | str = 0.1,
        test: str | None = None,
        predict: str | None = None,
        label_column: str | None = None,
        label_names: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train, val, test, predict, label_column, label_names, batch_size, num_workers
        )
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first used."""
        self._tokenizer = self._tokenizer or self._load_tokenizer()
        return self._tokenizer

    def collator(self) -> Any:
        """What makes a padded batch of examples."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    def lengths(self, examples: list[Example]) -> list[int]:
        """Tokens of each text."""
        return [len(example["input_ids"]) for example in examples]

    def _load_tokenizer(self) -> Any:
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
