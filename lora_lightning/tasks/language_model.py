"""Base of the tasks that generate text: loss, metrics, generation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, RecordError
from lora_lightning.tasks.lm_loss import LMLoss, TokenLoss
from lora_lightning.tasks.model_options import check_generation_options
from lora_lightning.tasks.pretrained_task import Batch, PretrainedTask
from lora_lightning.tasks.stop_tokens import (
    saved_end_tokens,
    stop_line,
    stop_tokens,
    until_end,
)
from lora_lightning.training._lightning import trainer_of
from lora_lightning.training.messages import rank_zero_info
from lora_lightning.utilities.constants import IGNORE_INDEX
from lora_lightning.utilities.dtensor import is_sharded
from lora_lightning.utilities.hub import durable_name, load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Generation options that return something else than texts, or have no effect.
_REFUSED = ("return_dict_in_generate", "max_length")


class LanguageModel(PretrainedTask):
    """A pretrained network that writes text, trained on cross-entropy of the next token.

    Args:
        max_new_tokens: Most tokens that are generated for a prompt when predicting; fewer where the
            network's table of positions (GPT-2, OPT, BART) ends before.
        generation: Further options of transformers' `generate`, such as
            `{do_sample: true, temperature: 0.7}`. Default: what the model's files say.
        **options: Those of every task.
    """

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-4,
        max_new_tokens: int = 128,
        generation: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, learning_rate=learning_rate, **options)
        if max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens must be at least 1, found {max_new_tokens}. (model.max_new_tokens)"
            )
        check_generation_options(generation or {}, _REFUSED, "model.generation")
        self.max_new_tokens = max_new_tokens
        self.generation = generation or {}
        # Tokens that this process has been trained on in this run, padding left out.
        self.tokens_seen = 0
        self.lm_loss = LMLoss()
        # Ids of the tokens that it was taught to end with, and how prompts were written: what
        # the data module says of them under these names.
        self.end_tokens: list[int] = []
        self.prompting: dict[str, Any] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_name = model

    def options_to_keep(self) -> dict[str, Any]:
        """Add those of generation, but for objects, which no checkpoint may hold."""
        found = super().options_to_keep()
        plain = {k: v for k, v in self.generation.items() if _is_plain(v)}
        own = {"max_new_tokens": self.max_new_tokens, "generation": plain or None}
        return {**found, **own} if found else {}

    def on_fit_start(self) -> None:
        """Learn from the data module where texts end, and say it where the tokenizer does not."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        learned = getattr(data, "end_tokens", None) or ()
        self.end_tokens = sorted({*self.end_tokens, *learned})
        self.prompting = getattr(data, "prompting", None) or self.prompting
        self._say_where_texts_end()

    def on_predict_start(self) -> None:
        """Say where texts end, where the tokenizer does not."""
        super().on_predict_start()
        self._say_where_texts_end()

    def _say_where_texts_end(self) -> None:
        line = stop_line(self.tokenizer, self.end_tokens) if self.end_tokens else None
        if line and "eos_token_id" not in self.generation:
            rank_zero_info(line)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokenizer's name, where texts end, and how prompts were written."""
        super().on_save_checkpoint(checkpoint)
        tokenizer = self._tokenizer_of_data() or self._tokenizer
        name = self._tokenizer_name if tokenizer is None else tokenizer.name_or_path
        checkpoint["tokenizer"] = durable_name(name or self._tokenizer_name)
        checkpoint["end_tokens"] = self.end_tokens
        if _is_plain(self.prompting):
            checkpoint["prompting"] = self.prompting

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what `on_save_checkpoint` kept; with a Trainer, the tokenizer is the data's."""
        super().on_load_checkpoint(checkpoint)
        self.end_tokens = sorted({*self.end_tokens, *saved_end_tokens(checkpoint)})
        prompting = checkpoint.get("prompting")
        self.prompting = prompting if isinstance(prompting, dict) else {}
        name = checkpoint.get("tokenizer")
        if isinstance(name, str) and name != self._tokenizer_name:
            self._tokenizer, self._tokenizer_name = None, name

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Select the network's inputs from a batch."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def targets(self, batch: Batch) -> Tensor:
        """The token that each position of the output is to predict, or `IGNORE_INDEX`."""
        raise NotImplementedError

    def labels(self, batch: Batch) -> Tensor:
        """The labels of a batch.

        Raises:
            RecordError: If it has none.
        """
        if "labels" not in batch:
            raise RecordError(
                f"{type(self).__name__} learns from batches with `input_ids` and `labels` (the ids "
                f"of learned tokens, {IGNORE_INDEX} elsewhere), and found one with {[*batch]}. "
                "TextDataModule makes them. (data)"
            )
        return batch["labels"]

    def batch_weight(self, batch: Batch) -> Tensor:
        """Count learned tokens."""
        return (self.targets(batch) != IGNORE_INDEX).sum()

    def forward(self, batch: Batch) -> Tensor:
        """Scores (batch, length, vocabulary) of the next token."""
        assert self.network is not None, "configure_model builds the network"
        scores: Tensor = self.network(**self.inputs(batch)).logits
        return scores

    def token_loss(self, batch: Batch) -> TokenLoss:
        """Summed cross-entropy of the learned tokens, and how many of them are guessed."""
        assert self.network is not None, "configure_model builds the network"
        return self.lm_loss(self.network, self.inputs(batch), self.targets(batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy, as the update's mean over its whole window wants it."""
        self.tokens_seen += self.count_tokens(batch)
        found = self.token_loss(batch)
        loss = self.window_loss(found.total, batch, found.balance)
        if trainer_of(self) is not None:
            self.log("train_loss", self.window_mean.float(), prog_bar=True, batch_size=1)
        return loss

    def count_tokens(self, batch: Batch) -> int:
        """Count the tokens that the network reads, padding left out."""
        mask = batch.get("attention_mask")
        return batch["input_ids"].numel() if mask is None else int(mask.sum())

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Sum up the loss and the guessed tokens."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum up the loss and the guessed tokens."""
        self._evaluate(batch)

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> dict[str, Tensor]:
        found = self.token_loss(batch)
        assert found.correct is not None, "evaluation computes no gradients"
        return self.add_up(found.total, self.batch_weight(batch), found.correct)

    def log_means(self, stage: str, total: Tensor, weight: Tensor, *others: Tensor) -> None:
        """Log loss, perplexity and accuracy: means over all learned tokens."""
        (correct,) = others
        loss, shown = total / weight, stage == "val"
        self.log(f"{stage}_loss", loss.float(), prog_bar=shown, sync_dist=True)
        self.log(f"{stage}_perplexity", loss.exp().float(), prog_bar=shown, sync_dist=True)
        self.log(f"{stage}_accuracy", (correct / weight).float(), sync_dist=True)

    # -- generation --------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The data module's tokenizer where it has one, else the model's own."""
        theirs = self._tokenizer_of_data()
        if theirs is not None:
            return theirs
        if self._tokenizer is None:
            hub = self.options.hub()
            self._tokenizer = load_pretrained("AutoTokenizer", self._tokenizer_name, **hub)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def _tokenizer_of_data(self) -> PreTrainedTokenizerBase | None:
        data = getattr(trainer_of(self), "datamodule", None)
        found: PreTrainedTokenizerBase | str | None = getattr(data, "tokenizer", None)
        return None if isinstance(found, str) else found

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        """The text that the model writes for each prompt of a batch."""
        return self.generate(batch["input_ids"], batch.get("attention_mask"))

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> list[str]:
        """The text that the model writes for each prompt, padded on either side.

        It ends where the model's files say, and where it was taught to end (`end_tokens`).
        Outside of a Trainer call `eval()` before: in train mode dropout acts.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 where there is padding.
            **options: Of transformers' `generate`, before those of the task: `max_new_tokens`,
                `streamer`.

        Raises:
            RecordError: If a prompt is longer than the network's table of positions.
        """
        network: Any = self.network
        assert network is not None, "configure_model builds the network"
        tokenizer = self.tokenizer
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Processes that share the weights out gather them until the last has written its texts.
        together = any(is_sharded(p) for p in network.parameters())
        own = {"max_new_tokens": self.max_new_tokens, "pad_token_id": pad, "use_cache": True}
        ends = stop_tokens(network, self.end_tokens)
        asked = {**self.generation, **options}
        options = {**own, "eos_token_id": ends or None, **asked}
        left = _positions_left(network, input_ids.shape[1])
        options["max_new_tokens"] = min(options["max_new_tokens"], left)
        ids = network.generate(
            **self.prompts(input_ids, mask),
            synced_gpus=together,
            tokenizer=tokenizer,  # reads `stop_strings`
            **options,
        )
        # An end that was asked for by name is part of the text, as in transformers.
        cut = () if "eos_token_id" in asked else ends
        new = [until_end(row, cut) for row in self.written(ids, input_ids).tolist()]
        texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def prompts(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the inputs of `generate`."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def written(self, generated: Tensor, input_ids: Tensor) -> Tensor:
        """Select what is not the prompt from generated ids (B, L)."""
        return generated


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _positions_left(network: Any, length: int) -> float:
    """Count the positions that a prompt of this length leaves for new tokens."""
    config = network.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    tables = {m.num_embeddings for m in network.modules() if isinstance(m, nn.Embedding)}
    # OPT and BART have two rows more than positions. Rotary positions have no table, and no end.
    if not isinstance(limit, int) or tables.isdisjoint((limit, limit + 2)):
        return math.inf
    if length > limit:
        raise RecordError(
            f"a prompt has {length:,} tokens, and the model has no more than {limit:,} positions "
            "(max_position_embeddings in its config.json). Shorten it. (data.predict)"
        )
    # The last token that is written is not read.
    return limit if network.config.is_encoder_decoder else limit - length + 1
