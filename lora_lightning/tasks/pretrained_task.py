"""What all tasks share: a pretrained network by name, and how it is trained."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, first_few
from lora_lightning.hosts.base import adapter_owners
from lora_lightning.tasks.pretrained import load_pretrained

Batch = dict[str, Tensor]


class PretrainedTask(LightningModule):
    """A pretrained network of Hugging Face transformers as a LightningModule.

    The network is loaded in `configure_model`, and is the attribute `network`.

    Args:
        model: Hub id, local folder, or `package:import_name/sub/folder` (an installed package's).
        learning_rate: Learning rate at its peak. The default suits LoRA; full fine-tuning wants
            about a tenth of it.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: Share of all steps, 0 <= fraction <= 1, in which the learning rate rises
            to its peak; after them it falls linearly to 0.
    """

    # The class of transformers that knows the network's class from its config.
    auto_class: ClassVar[str] = "AutoModel"
    network: nn.Module | None

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_fraction <= 1:
            raise ConfigError(
                f"warmup_fraction must be from 0 to 1, found {warmup_fraction}. "
                "(model.warmup_fraction)"
            )
        self.model_name = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.network = None
        self.new_parameters: set[str] = set()

    def configure_model(self) -> None:
        """Load the network, once."""
        if self.network is not None:
            return
        self.network, info = load_pretrained(
            self.auto_class,
            self.model_name,
            # The Trainer's precision decides, not the precision the file was saved in.
            dtype=torch.get_default_dtype(),
            output_loading_info=True,
            **self.network_options(),
        )
        new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        self.new_parameters = {f"network.{key}" for key in new}
        # from_pretrained returns eval mode, which the Trainer would keep: dropout would be off.
        self.network.train()

    def network_options(self) -> dict[str, Any]:
        """What else `from_pretrained` is given; a task's own."""
        return {}

    def on_fit_start(self) -> None:
        """Refuse to train with new weights that would stay random."""
        frozen = _frozen_for_good(self, self.new_parameters)
        if frozen:
            names = sorted({name.removeprefix("network.").rpartition(".")[0] for name in frozen})
            raise ConfigError(
                f"{first_few(sorted(frozen))}: newly initialised, because {self.model_name!r} has "
                "no such weights, and frozen, so they would stay random. "
                f"Train them: set lora.modules_to_save: [{', '.join(names)}]"
            )

    def configure_optimizers(self) -> Any:
        """AdamW over what is trainable, with linear warm-up and decay per step."""
        from transformers import get_linear_schedule_with_warmup

        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError(
                "the learning rate falls to 0 at the last step, but the run has none: "
                "set trainer.max_epochs or trainer.max_steps."
            )
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            weight_decay=self.weight_decay,
            fused=self._can_fuse(),
        )
        schedule = get_linear_schedule_with_warmup(
            optimizer, round(self.warmup_fraction * steps), int(steps)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trainable, with its peak learning rate."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trainable, "lr": self.learning_rate}]

    def _can_fuse(self) -> bool:
        # Lightning cannot clip gradients under a gradient scaler with a fused optimizer.
        scaled = self.trainer.precision == "16-mixed"
        return self.device.type in ("cpu", "cuda", "mps") and not scaled


def _frozen_for_good(module: nn.Module, names: set[str]) -> set[str]:
    """Those of the parameters `names` that neither train nor lie below a trained adapter."""
    parameters = dict(module.named_parameters())
    owners = adapter_owners(module)
    adapted = {owners[id(p)] for p in parameters.values() if p.requires_grad and id(p) in owners}
    return {
        name
        for name in names & parameters.keys()
        if not parameters[name].requires_grad and adapted.isdisjoint(ancestors(name))
    }


def ancestors(name: str) -> set[str]:
    """The modules that hold the parameter `name`, by path."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}
