"""Text for language models as batches of token ids, from any file or dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import DataLoader

from lora_lightning.data.batches.collate import PackRows, PadPrompts, PadRows
from lora_lightning.data.batches.epoch_sampler import EpochSampler
from lora_lightning.data.batches.example_store import BatchRows, ExampleStore
from lora_lightning.data.batches.packing import (
    best_fit_decreasing,
    check_packing,
    needs_one_row,
    transformers_network,
)
from lora_lightning.data.batches.stream import TextStream
from lora_lightning.data.encoding.for_model import BlockEncoder, Encoding, encoding_for, held_out
from lora_lightning.data.encoding.sample_encoder import EncodingReport, SampleEncoder
from lora_lightning.data.samples.formats import TextSource, check_format, recognised_format
from lora_lightning.data.samples.sample import Chat, Document, Sample
from lora_lightning.data.split_data_module import SplitDataModule, SplitOptions
from lora_lightning.data.validation_split import sample_content, split_records
from lora_lightning.errors import ConfigError, ModelError, RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextDataModule(SplitDataModule):
    """Text for language models: documents, prompts with completions, chats.

    Reads JSONL, JSON, CSV, Parquet and text files, folders and patterns of them, Hugging Face
    datasets by name (`NAME:SPLIT`) or saved folder. The format is recognised by its columns: `text`
    | `prompt`, `completion` | `instruction`, `input`, `output` (Alpaca) | `messages` |
    `conversations` (ShareGPT). Completions and every assistant turn of a chat are learned, prompts
    are not.

    Args:
        train: Training data.
        val: Validation data, or the share of the training data held out for it, from 0 (none) to
            below 1. A hash of each example's text decides, so the split is the same in every run,
            and equal examples never fall on both sides.
        test: Test data.
        predict: Prompts to answer; columns of answers need not be there.
        format: `text`, `prompt-completion`, `alpaca`, `messages` or `sharegpt`. Default: the one
            that the first row's columns fit.
        columns: What the format's columns are called in the data, where they are called otherwise:
            `{prompt: question, completion: answer}`.
        tokenizer: Name of the tokenizer's model. Default: the LightningModule's `model_name`.
        chat_template: Jinja or a file of it, in place of the tokenizer's own.
        chat_template_kwargs: What else the template reads, such as `{enable_thinking: false}`.
        train_on_prompt: Learn prompts too.
        max_length: The most tokens of an example. Default: what the model has positions for, at
            most 1,024.
        max_target_length: The most tokens of an encoder-decoder's target. Default: `max_length`.
        too_long: What becomes of longer examples: `truncate` keeps their beginning, `split` goes on
            with a document (format `text`) in further examples, `drop` leaves them out, `error`
            stops. How many there are is reported.
        untrainable: What becomes of examples of which nothing is learned, such as those whose
            prompt alone fills `max_length`: `error` stops, `drop` leaves them out.
        packing: Put several examples into each row of `max_length` tokens, so that nearly nothing
            is padding. They do not see each other; models that cannot do that are refused.
        streaming: Read the training data while training, `shuffle_buffer` rows at a time. Nothing
            but these is in memory; other splits (also what is held out) are. Needs `max_steps`.
        shuffle_buffer: With `streaming`, the order is random within so many rows, per worker.
        batch_size: Rows per batch and process. Without packing, a row is an example, and examples
            of about equal length share a batch.
        num_workers: Worker processes per data loader; 0 loads in the main process.
    """

    def __init__(
        self,
        train: str | None = None,
        val: float | str = 0.1,
        test: str | None = None,
        predict: str | None = None,
        format: str | None = None,
        columns: dict[str, str] | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        train_on_prompt: bool = False,
        max_length: int | None = None,
        max_target_length: int | None = None,
        too_long: Literal["truncate", "split", "drop", "error"] = "truncate",
        untrainable: Literal["error", "drop"] = "error",
        packing: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(SplitOptions(train, val, test, predict, batch_size, num_workers))
        check_format(format, columns or {})
        if shuffle_buffer < 1:
            raise ConfigError(
                f"shuffle_buffer must be at least 1 row, found {shuffle_buffer}. "
                "(data.shuffle_buffer)"
            )
        self.format = format
        self.columns = columns
        self.tokenizer_name = tokenizer
        self._encoder_options = {
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
            "train_on_prompt": train_on_prompt,
            "max_length": max_length,
            "max_target_length": max_target_length,
            "too_long": too_long,
            "untrainable": untrainable,
        }
        self.max_length = max_length  # as asked; `encoder` has what it comes to
        self.max_target_length = max_target_length
        self.packing = packing
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self._packing_checked = False
        self._format = format  # of the training data, once they are read

    # -- what there is -----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first used."""
        return self.encoding.tokenizer

    @property
    def encoder(self) -> SampleEncoder:
        """Encoder from samples to examples and prompts."""
        return self.encoding.encoder

    def source(self, split: str) -> TextSource:
        """Source of a split's rows; that of `train` for what is held out of it."""
        path = self.paths[split]
        encoding = self.encoding
        template = self._encoder_options["chat_template"] or encoding.tokenizer.chat_template
        return TextSource(
            path or "",
            f"data.{split}",
            self.format,
            self.columns,
            chat=template is not None and not encoding.encoder_decoder,
            prompts_only=split == "predict",
            streaming=self.streaming and split == "train",
        )

    def read(self, split: str, path: str) -> list[Sample]:
        """The samples of one split."""
        source = self.source(split)
        rows = source.rows()
        first = list(islice(rows, 1))
        if not first:
            raise RecordError(f"{path}: no rows; it is empty. (data.{split})")
        if split == "train":
            self._format = source.format or recognised_format(first[0], self.columns or {})
        return list(source.samples(chain(first, rows)))

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens with which the training data teach the model to stop."""
        return self.encoding.encoder.end_tokens

    @property
    def prompting(self) -> dict[str, Any]:
        """How the training data's prompts are written, in plain values, for later prompts."""
        return {**self.encoding.encoder.prompting(), "format": self._format}

    def input_of(self, record: Sample) -> dict[str, Any]:
        """The prompt, or the messages of a chat."""
        if isinstance(record, Chat):
            tools = {"tools": list(record.tools)} if record.tools else {}
            return {"messages": list(record.messages), **tools}
        return {"prompt": record.text if isinstance(record, Document) else record.prompt}

    def hold_out(self, records: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Training and validation samples."""
        return split_records(records, self.val_fraction, sample_content)

    def records(self, split: str) -> Sequence[Sample]:
        """The samples of `split`; of a stream, only what is held out is kept."""
        if self.streaming and split == "val" and self.paths["val"] is None and self.val_fraction:
            if "val" not in self._records:
                samples = self._streamed_source.samples()
                self._records["val"] = [s for s in samples if held_out(s, self.val_fraction)]
            if not self._records["val"]:
                raise ConfigError(
                    f"val={self.val_fraction} holds out none of the training data. Change it, or "
                    "name a file. (data.val)"
                )
            return self._records["val"]
        return super().records(split)

    def samples(self, split: str) -> Iterator[Sample]:
        """The samples of a split in the order in which they are encoded."""
        if self.streaming and split == "train":
            fraction = 0.0 if self.paths["val"] else self.val_fraction
            return (s for s in self._streamed_source.samples() if not held_out(s, fraction))
        samples = self.records(split)
        if split == "train" and split in self._prepared:  # they were let go, and are again
            self._records.pop("train")
        return iter(samples)

    def sample_prompts(self, count: int) -> list[Sample]:
        """The first samples of the validation data; none where there are none."""
        given = self.paths["val"] is not None or (self.paths["train"] and self.val_fraction)
        return list(self.records("val")[:count]) if given else []

    def prepared(self, split: str) -> Any:
        """Rows for batches; of a stream, the stream."""
        if self.streaming and split in ("train", "val") and split not in self._prepared:
            if split == "train" and self.paths["train"] is not None:
                self._prepared["train"] = self._stream()
            elif self.paths["val"] is None and not self.val_fraction:
                self._prepared["val"] = []
        prepared = super().prepared(split)
        if split == "train":  # from here on their token ids are what is needed
            self._records.pop("train", None)
        return prepared

    def prepare(self, split: str, records: Sequence[Sample]) -> Any:
        """Token ids and labels, packed where that is asked for; of prompts, token ids only."""
        encoder = self.encoding.encoder
        if split == "predict":
            prompts = encoder.encode_prompts(records)
            for sample, ids in zip(records, prompts, strict=True):
                if not ids:
                    raise RecordError(
                        f"{sample.where}: the prompt is empty, and the tokenizer begins no text by "
                        "itself, so there is nothing to go on from. Fill it in or remove the row."
                    )
            return prompts
        report = EncodingReport()
        store = ExampleStore(encoder.encode_all(records, report))
        line = report.line(split, encoder.limit)
        if not len(store):
            raise RecordError(f"{line}: there is nothing left. (data.{split})")
        rows = None
        if self.packing:
            rows = best_fit_decreasing(store.lengths, encoder.max_length)
            full = report.tokens / (len(rows) * encoder.max_length)
            line += (
                f"; packed into {len(rows):,} rows of {encoder.max_length:,} tokens, "
                f"{100 * full:.0f} % full (data.packing)"
            )
        self.tell(split, line)
        return BatchRows(store, rows)

    # -- loaders -----------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches in a random order."""
        rows = self.prepared("train")
        if self.streaming:
            rows.seed, sampler = self.order_seed, None
        else:
            sampler = self._sampler(rows, shuffle=True)
        try:
            from lora_lightning.data.batches.text_loader import TextLoader
        except ImportError as error:
            if self.streaming:
                raise ConfigError(
                    "streaming needs the package 'torchdata'. Install it with: "
                    'pip install "lora_lightning[data]" (data.streaming)'
                ) from error
            # LoraCallback finds its position again.
            return DataLoader(rows, **self._batching(sampler))
        loader = TextLoader(rows, **self._batching(sampler))
        loader.trainer, loader.streams = self.trainer, self.streaming
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Prompts in the order of the file."""
        return DataLoader(
            self.prepared("predict"),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            # on the left, where the answer is to go on behind the prompt
            collate_fn=PadPrompts(self._pad_id, left=not self.encoding.encoder_decoder),
        )

    def _in_order(self, split: str) -> DataLoader[Any]:
        rows = self.prepared(split)
        return DataLoader(rows, **self._batching(self._sampler(rows, shuffle=False)))

    def _sampler(self, rows: BatchRows, *, shuffle: bool) -> EpochSampler:
        return self.order(rows.lengths, shuffle=shuffle, group=not self.packing)

    def _batching(self, sampler: EpochSampler | None) -> dict[str, Any]:
        """Arguments of a loader, by name: only then can Lightning make the loader again."""
        return {
            "batch_size": self.batch_size,
            "sampler": sampler,
            "num_workers": self.num_workers,
            "collate_fn": self._collator(),
        }

    def _collator(self) -> PadRows | PackRows:
        if not self.packing:
            return PadRows(self._pad_id)
        flat = False
        if self.trainer:
            if not self._packing_checked:
                check_packing(self.trainer)
                self._packing_checked = True
            network = transformers_network(self.trainer.lightning_module)
            flat = network is not None and needs_one_row(network)
        return PackRows(self.encoding.encoder.max_length, flat, self._pad_id)

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0

    # -- streaming ---------------------------------------------------------------------------------

    @cached_property
    def _streamed_source(self) -> TextSource:
        return self.source("train").recognised()

    def _stream(self) -> TextStream:
        if self.num_workers:
            # Tokenizers that have worked in parallel warn of being forked, and stop doing so.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        source = self._streamed_source
        self._format = source.format
        fraction = 0.0 if self.paths["val"] else self.val_fraction
        encode = BlockEncoder(source, self.encoding, fraction)
        first, report = list(islice(source.rows(), self.shuffle_buffer)), EncodingReport()
        list(encode(first, report))
        line = report.line("train", self.encoding.encoder.limit)
        self.tell("train", f"{line}: of the first {len(first):,} rows; all are read while training")
        shares = self.shares()
        return TextStream(
            source.rows,
            encode,
            block=self.shuffle_buffer,
            batch_size=self.batch_size,
            pack_length=self.encoding.encoder.max_length if self.packing else None,
            rank=shares.get("rank", 0),
            processes=shares.get("num_replicas", 1),
        )

    # -- what the model says -----------------------------------------------------------------------

    @cached_property
    def encoding(self) -> Encoding:
        """Tokenizer and encoder for the model; made when first used."""
        tokenizer, name, _ = self.load_processor(
            "AutoTokenizer", self.tokenizer_name, "data.tokenizer"
        )
        encoding = encoding_for(tokenizer, self._model_config(), self._encoder_options)
        if encoding.encoder_decoder and self.packing:
            raise ConfigError(
                f"packing: {name!r} is an encoder-decoder, whose examples cannot share a row. "
                "Leave it out: batches hold examples of about equal length. (data.packing)"
            )
        return encoding

    def _model_config(self) -> Any:
        """The config of the model that is trained, or of the one that the tokenizer is of."""
        module = self.trainer.lightning_module if self.trainer else None
        network = transformers_network(module) if module is not None else None
        if network is not None:
            return network.config
        name = None if hasattr(module, "model_name") else self.tokenizer_name
        try:
            return self.load_processor("AutoConfig", name, "data.tokenizer")[0]
        except ModelError:  # a tokenizer alone
            return None
