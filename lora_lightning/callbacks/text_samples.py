"""Generated text for fixed prompts while a model trains: the base beside the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from lora_lightning.callbacks.generation import TextGenerator, generating_network
from lora_lightning.callbacks.text_loggers import Row, log_texts
from lora_lightning.data.encoding.causal_lm import Encoder
from lora_lightning.data.encoding.sample_encoder import SampleEncoder
from lora_lightning.data.encoding.seq2seq_lm import Seq2SeqEncoder
from lora_lightning.data.samples.sample import (
    Chat,
    Document,
    PromptCompletion,
    Sample,
    prompt_and_answer,
)
from lora_lightning.engine.switching import adapter_names, disable_adapter
from lora_lightning.errors import ConfigError, printable
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.training import messages
from lora_lightning.training.progress import left_out
from lora_lightning.utilities.dtensor import is_sharded
from lora_lightning.utilities.hub import load_pretrained
from lora_lightning.utilities.is_a import is_a

Prompt = str | list[dict[str, Any]] | Sample

_SHOWN = 400  # characters of a prompt's end and an expected answer's beginning, on the console


class TextSamples(Callback):
    """Text that the model writes after fixed prompts, the base's beside the adapter's.

    It goes to the console and into every logger: TensorBoard, W&B, MLflow and Comet as text,
    any other (CSVLogger) as lines of `samples.jsonl` beside its metrics. The base's text is
    written once, with the adapters disabled, kept, and shown on the console once. A text ends
    where the model's files say, and where turns were taught to end. Training goes on as if nothing
    had been written: random numbers, train and eval mode stay as they are.

    It works with the language models of this package and with every LightningModule that holds
    exactly one Hugging Face model that generates. Under DDP the first process writes; under FSDP2
    all do.

    Args:
        prompts: Texts, or chats as lists of messages (`role`, `content`), which are written by the
            chat template up to where the assistant answers. Default: the first of the validation
            data (the data module's `sample_prompts`), whose answers are shown as `expected`.
        num_prompts: How many of the validation data.
        every_n_steps: Optimizer steps between two samples. Default: after each validation. At the
            end of training there is always one.
        max_new_tokens: The most tokens of one text.
        tokenizer: Model name or folder of the tokenizer, or a tokenizer. Default: that of the data
            module, else of the module's `model_name`.
        generation: What else Hugging Face's `generate` is given, such as
            `{do_sample: true, temperature: 0.7}`. Default: greedy.

    Raises:
        ConfigError: Before training: no prompts, no tokenizer, no or several models that generate,
            an option that `generate` does not know, a prompt too long for the model.
    """

    def __init__(
        self,
        prompts: list[str | list[dict[str, Any]]] | None = None,
        num_prompts: int = 2,
        every_n_steps: int | None = None,
        max_new_tokens: int = 60,
        tokenizer: Any = None,
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.every_n_steps = every_n_steps
        self.max_new_tokens = max_new_tokens
        for name in ("num_prompts", "every_n_steps", "max_new_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, found {number}. ({name})")
        if prompts is not None and not prompts:
            raise ConfigError("prompts is an empty list; leave it out or name some. (prompts)")
        self.tokenizer = tokenizer
        self.generation = generation or {}
        self._generator: TextGenerator | None = None
        self._asked: list[tuple[Row, list[int]]] = []  # each prompt as shown, and its ids
        self._base: list[str] | None = None
        self._last_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find model, tokenizer and prompts before any work."""
        strategy = trainer.strategy
        if is_a(strategy, "FSDPStrategy") or getattr(strategy, "zero_stage_3", False):
            raise ConfigError(
                f"TextSamples cannot generate under {type(strategy).__name__}, which "
                "gathers the weights only in the module's own forward. Use ModelParallelStrategy "
                "(FSDP2) or leave it out. (trainer.callbacks)"
            )
        network = generating_network(pl_module)
        tokenizer = self._find_tokenizer(trainer, pl_module)
        data = getattr(trainer, "datamodule", None)
        learned = {i for x in (data, pl_module) for i in getattr(x, "end_tokens", None) or ()}
        generator = TextGenerator(
            network, tokenizer, self.max_new_tokens, self.generation, sorted(learned) or None
        )
        self._generator, self._base, self._last_step = generator, None, -1
        prompts = [_as_sample(prompt) for prompt in self._find_prompts(trainer)]
        encoded = self._encode(trainer, [sample for sample, _ in prompts])
        shown: list[Row] = [
            {"prompt": _in_words(sample), **({"expected": answer} if answer else {})}
            for sample, answer in prompts
        ]
        asked = list(zip(shown, encoded, strict=True))
        self._asked = [(row, ids) for row, ids in asked if generator.fits(ids)]
        if not self._asked or (self.prompts and len(self._asked) < len(asked)):
            longest = max(map(len, encoded))
            raise ConfigError(
                f"a prompt has {longest:,} tokens, and with max_new_tokens={self.max_new_tokens} "
                "more the model has no positions for it. Shorten one of the two. "
                "(prompts, max_new_tokens)"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, unless it goes by steps."""
        if self.every_n_steps is None and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write after every `every_n_steps` steps."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a last time."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step, generator = trainer.global_step, self._generator
        if trainer.state.fn != "fit" or generator is None or step in (0, self._last_step):
            return
        self._last_step = step
        # Weights that are spread over processes are gathered by all of them.
        if not (trainer.is_global_zero or any(is_sharded(p) for p in pl_module.parameters())):
            return
        ids = [ids for _, ids in self._asked]
        with left_out(trainer):
            known = self._base is not None
            if not known and adapter_names(pl_module):
                with torch.inference_mode(False), disable_adapter(pl_module):
                    self._base = generator.texts(pl_module, ids)
            tuned = generator.texts(pl_module, ids)
        if trainer.is_global_zero:
            rows = []
            for number, (row, _) in enumerate(self._asked):
                base = {} if self._base is None else {"base": self._base[number]}
                rows.append({**row, **base, "tuned": tuned[number]})
            # The base's text does not change.
            above = [{**row, "base": "(as above)"} for row in rows] if known else rows
            messages.show(as_table(above, f"samples at step {step}"))
            for logger in trainer.loggers:
                log_texts(logger, "samples", rows, step)

    def _find_tokenizer(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            return self.tokenizer
        if self.tokenizer is None:
            for owner in (getattr(trainer, "datamodule", None), pl_module):
                theirs = getattr(owner, "tokenizer", None)
                if hasattr(theirs, "decode"):
                    return theirs
        name = self.tokenizer or getattr(pl_module, "model_name", None)
        if name is None:
            raise ConfigError(
                f"TextSamples needs a tokenizer: {type(pl_module).__name__} has no `model_name` to "
                "take it from, so name one. (tokenizer)"
            )
        options = {}
        if self.tokenizer is None and isinstance(pl_module, PretrainedTask):
            options = pl_module.options.hub()
        return load_pretrained("AutoTokenizer", name, "tokenizer", **options)

    def _find_prompts(self, trainer: Trainer) -> list[Prompt]:
        if self.prompts is not None:
            return list(self.prompts)
        ask = getattr(getattr(trainer, "datamodule", None), "sample_prompts", None)
        # The same for all processes, however the data are spread.
        prompts = trainer.strategy.broadcast(list(ask(self.num_prompts)) if ask else [])
        if not prompts:
            raise ConfigError(
                "TextSamples has no prompts: the validation data give none, so name some. (prompts)"
            )
        return prompts

    def _encode(self, trainer: Trainer, samples: Sequence[Sample]) -> list[list[int]]:
        """Encode prompts as the data module encodes its own."""
        assert self._generator is not None
        data = getattr(trainer, "datamodule", None)
        encoder: SampleEncoder | None = getattr(getattr(data, "encoding", None), "encoder", None)
        if self._generator.is_encoder_decoder:
            samples = [PromptCompletion(_text(sample), "", sample.where) for sample in samples]
        if self.tokenizer is not None or encoder is None:
            kind = Seq2SeqEncoder if self._generator.is_encoder_decoder else Encoder
            encoder = kind(self._generator.tokenizer, 2)
        return encoder.encode_prompts(samples)


def as_table(rows: Sequence[Row], title: str) -> Table:
    """Rows of texts as wide as the terminal, at most 100 characters, a block for each row."""
    width = min(messages.console_of_terminal().width, 100)
    table = Table(title=title, title_justify="left", show_header=False, width=width)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for row in rows:
        for column, text in row.items():
            if column == "prompt" and len(text) > _SHOWN:
                text = f"[...]{text[-_SHOWN:]}"
            elif column == "expected" and len(text) > _SHOWN:
                text = f"{text[:_SHOWN]}[...]"
            # Spelled out before the lines are laid out, so that the frame stays straight.
            table.add_row(column, printable(text) or "(nothing)")
        table.add_section()
    return table


def _as_sample(prompt: Prompt) -> tuple[Sample, str]:
    """The sample whose prompt is asked, and the answer that is expected, if one is known."""
    if isinstance(prompt, str):
        return Document(prompt, "prompts"), ""
    if isinstance(prompt, list):
        return Chat(tuple(prompt), "prompts"), ""
    return prompt_and_answer(prompt)


def _text(sample: Sample) -> str:
    if isinstance(sample, Chat):
        raise ConfigError("an encoder-decoder reads texts, and a prompt is a chat. (prompts)")
    return sample.text if isinstance(sample, Document) else sample.prompt


def _in_words(sample: Sample) -> str:
    if isinstance(sample, Chat):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in sample.messages)
    return _text(sample)
