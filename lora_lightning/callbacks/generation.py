"""Text from the network of a LightningModule while it trains, and nothing of the training moved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning.data.encoding.chat_labels import template_end_tokens
from lora_lightning.errors import ConfigError, first_few
from lora_lightning.layers.traversal import walk
from lora_lightning.tasks.model_options import check_generation_options
from lora_lightning.tasks.stop_tokens import as_ids, stop_tokens, until_end
from lora_lightning.utilities.dtensor import is_sharded
from lora_lightning.utilities.rng import random_state, seed_all, set_random_state
from lora_lightning.utilities.wrappers import plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Generation options that return more than one text, or something else, or are options of their own.
_REFUSED = ("return_dict_in_generate", "num_return_sequences", "max_new_tokens", "max_length")


class TextGenerator:
    """Continues token ids with a Hugging Face model that can `generate`, one prompt at a time.

    `options` are what else `generate` is given. Without `do_sample` it is greedy. A text ends where
    the network's files say and at `end_tokens`, which training taught; None: where the tokenizer's
    chat template ends a turn.

    Raises:
        ConfigError: If `generate` knows no such option.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        options: Mapping[str, Any],
        end_tokens: Collection[int] | None = None,
    ) -> None:
        check_generation_options(options, _REFUSED, "generation")
        self.network = network
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        greedy: dict[str, Any] = {"do_sample": False}
        if not options.get("do_sample", False):  # what the model brings for sampling
            greedy.update(dict.fromkeys(("temperature", "top_p", "top_k"), None))
        padding = tokenizer.pad_token_id
        ends: dict[str, Any] = {
            "pad_token_id": tokenizer.eos_token_id if padding is None else padding
        }
        learned = template_end_tokens(tokenizer) if end_tokens is None else end_tokens
        stops = stop_tokens(network, learned) or as_ids(tokenizer.eos_token_id)
        ends |= {"eos_token_id": stops} if stops else {}
        self.options = {**greedy, **ends, **options}

    def fits(self, ids: Sequence[int]) -> bool:
        """True if the network has positions for a prompt and the text after it."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        new = self.max_new_tokens
        needed = max(len(ids), new) if self.is_encoder_decoder else len(ids) + new
        return not isinstance(limit, int) or needed <= limit

    @property
    def is_encoder_decoder(self) -> bool:
        """True if the prompt is read apart from what is written."""
        return bool(self.network.config.is_encoder_decoder)

    def texts(self, module: LightningModule, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Generate a text after each prompt; sampling draws the same at every call."""
        sharded = any(is_sharded(p) for p in module.parameters())
        with training_kept(module), self._whole(module):
            texts = []
            for ids in prompts:
                inputs = torch.tensor([list(ids)], device=module.device)
                output = self.network.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=self.max_new_tokens,
                    use_cache=True,
                    synced_gpus=sharded,
                    tokenizer=self.tokenizer,  # reads `stop_strings`
                    **self.options,
                )[0]
                # A decoder starts with a token that is no text, and may be the one that ends it.
                new = output.tolist()[1 if self.is_encoder_decoder else len(ids) :]
                new = until_end(new, as_ids(self.options.get("eos_token_id")))
                texts.append(str(self.tokenizer.decode(new, skip_special_tokens=True)))
        return texts

    @contextmanager
    def _whole(self, module: LightningModule) -> Iterator[None]:
        """Gather FSDP2's units around the network, which are not called here."""
        units: list[Any] = [m for m in module.modules() if hasattr(m, "unshard")]
        around = [u for u in units if any(m is self.network for m in list(u.modules())[1:])]
        for unit in around:
            unit.unshard()
        try:
            yield
        finally:
            for unit in around:
                unit.reshard()


@contextmanager
def training_kept(module: LightningModule) -> Iterator[None]:
    """Enter eval mode, no gradients, the Trainer's precision and own random numbers."""
    modes = [(m, m.training) for m in module.modules()]
    state = random_state(cuda="own")
    precision: Any = module.trainer.strategy.precision_plugin
    with ExitStack() as stack:
        stack.callback(set_random_state, state)
        stack.callback(_set_modes, modes)
        # Validation runs in inference mode, whose tensors a module must not keep for training.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        # Every step has another length: no graph for each.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(precision.forward_context())
        module.eval()
        seed_all(0)
        yield


def generating_network(module: LightningModule) -> nn.Module:
    """The one submodule that can generate text.

    Raises:
        ConfigError: If there is none, or several.
    """
    from transformers import GenerationMixin

    found: dict[str, nn.Module] = {}
    for path, part in walk(module):
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(part, GenerationMixin) and not inner:
            found[path] = part
    if len(found) != 1:
        names = first_few(map(plain_name, found)) or "none"
        raise ConfigError(
            f"TextSamples needs a module with exactly one Hugging Face model that generates text; "
            f"{type(module).__name__} has {names}. (trainer.callbacks)"
        )
    return next(iter(found.values()))


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training
