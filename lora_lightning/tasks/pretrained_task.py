"""Base of all tasks: a pretrained network by name, its optimizer and its checkpoints."""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.checkpoint.state_dict import OPTIONS, TASK
from lora_lightning.errors import ConfigError, first_few
from lora_lightning.layers.traversal import adapter_owners
from lora_lightning.tasks.evaluation import Evaluation
from lora_lightning.tasks.lr_schedule import (
    Schedule,
    Shape,
    check_length,
    check_not_negative,
    check_schedule,
    count_steps,
    is_trial,
)
from lora_lightning.tasks.model_options import Dtype, ModelOptions, Quantization, weights_of
from lora_lightning.tasks.network import (
    build_network,
    head_parameters,
    network_skeleton,
    settle_skeleton,
)
from lora_lightning.tasks.sharding import data_parallel_mesh
from lora_lightning.training._lightning import trainer_of
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.module_state import callbacks_of, module_state
from lora_lightning.training.new_modules import frozen_new_parameters
from lora_lightning.training.optimizers import may_be_fused
from lora_lightning.training.progress import TrainingProgress
from lora_lightning.utilities.hub import durable_name

Batch = dict[str, Tensor]


class PretrainedTask(Evaluation):
    """A pretrained network of Hugging Face transformers as a LightningModule.

    The network is loaded in `configure_model`, and is the attribute `network`.

    Args:
        model: Hub id, local folder, or `package:import_name/sub/folder` (an installed package's).
        learning_rate: Learning rate at its peak. The default suits LoRA; full fine-tuning wants
            about a tenth of it.
        weight_decay: AdamW's decoupled weight decay, of all but biases, norms and vectors
            of adapters.
        lr_schedule: How the learning rate goes on after its peak: `linear` or `cosine` to 0 at the
            last step of the run, or `constant`.
        warmup_fraction: Share of all steps, 0 <= fraction <= 1, in which the learning rate rises
            linearly from 0 to its peak. Steps are the optimizer's, also under accumulation.
        warmup_steps: Their number, in place of `warmup_fraction`.
        dtype: Of the network's weights: `float32`, `bfloat16`, `float16`, `float64`, or `auto`, the
            one they were saved in. Default: what the Trainer's precision says. What trains is
            float32 in any case where adapters do.
        attn_implementation: How attention is computed: `sdpa` (mostly the default), `eager`,
            `flash_attention_2`, ... as in transformers.
        quantize: Round the weights of all Linears but the head: `nf4` or `fp4` (4 bits, with double
            quantisation) or `int8`, with bitsandbytes, while they are loaded. Adapters train on
            them. 4-bit layers compute in the dtype of the Trainer's precision.
        gradient_checkpointing: Keep only each layer's input for the backward pass and run the layer
            again there: less memory, a third to a half more time, the same gradients.
        compile: Let torch.compile make one graph of the network below its head, for inputs of any
            length; or the options that `torch.compile` is given, such as `{mode: max-autotune}`.
        pretrained: False: random weights in the shape that the model's `config.json` says, to be
            trained in full.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Whether Python code that comes with the model may run.
    """

    # The class of transformers that knows the network's class from its config.
    auto_class: ClassVar[str] = "AutoModel"
    network: nn.Module | None

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        lr_schedule: Shape = "linear",
        warmup_fraction: float = 0.1,
        warmup_steps: int | None = None,
        dtype: Dtype | None = None,
        attn_implementation: str | None = None,
        quantize: Quantization | None = None,
        gradient_checkpointing: bool = False,
        compile: bool | dict[str, Any] = False,
        pretrained: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_not_negative(learning_rate=learning_rate, weight_decay=weight_decay)
        check_schedule(lr_schedule, warmup_fraction, warmup_steps)
        self.model_name = os.fspath(model)  # a Path, too
        self.options = ModelOptions(
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantize=quantize,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            pretrained=pretrained,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.warmup_fraction = warmup_fraction
        self.warmup_steps = warmup_steps
        self.network = None
        self.new_parameters: set[str] = set()

    def configure_model(self) -> None:
        """Load the network, once."""
        if self.network is not None:
            return
        trainer = trainer_of(self)
        if trainer is not None:
            self.options.check_run(trainer, bool(callbacks_of(self)))
        self.network, new = build_network(
            self.auto_class,
            self.model_name,
            self.options,
            trainer,
            data_parallel_mesh(self),
            **self.network_options(),
        )
        self.new_parameters = {f"network.{key}" for key in new}
        module_state(self).new_names = self.new_parameters

    def configure_without_weights(self, precision: str) -> None:
        """Build the network on the meta device, of its config file alone, for a plan.

        `precision`: the Trainer's.
        """
        if self.network is None:
            name, options = self.model_name, self.options
            network = network_skeleton(
                self.auto_class, name, options, precision, **self.network_options()
            )
            self.network = settle_skeleton(network, name, options, precision)
            self.new_parameters = {f"network.{n}" for n in head_parameters(self.network)}

    def network_options(self) -> dict[str, Any]:
        """Return a task's own options of `from_pretrained`."""
        return {}

    def options_to_keep(self) -> dict[str, Any]:
        """Return the options that make the task again, without its Trainer and data.

        A checkpoint has them for `load_from_checkpoint`. Not `trust_remote_code` (a file cannot say
        whom to trust) and `compile`. A task with an `__init__` of its own, which may take others,
        keeps what it returns here: by default nothing.
        """
        init = next(cls for cls in type(self).__mro__ if "__init__" in vars(cls))
        if not init.__module__.startswith(f"{__package__}."):
            return {}
        how = self.options
        return {
            "model": durable_name(self.model_name),
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "lr_schedule": self.lr_schedule,
            "warmup_fraction": self.warmup_fraction,
            "warmup_steps": self.warmup_steps,
            "dtype": self._base_dtype() or how.dtype,
            "attn_implementation": how.attn_implementation,
            "quantize": how.quantize,
            "gradient_checkpointing": how.gradient_checkpointing,
            "pretrained": how.pretrained,
            "revision": how.revision,
        }

    def _base_dtype(self) -> str | None:
        """Of the weights as they are, whoever has chosen it; None before there are any."""
        adapters = adapter_owners(self)
        weights = (p for p in self.parameters() if id(p) not in adapters)
        found = next((p.dtype for p in weights if p.is_floating_point()), None)
        return None if found is None else str(found).removeprefix("torch.")

    def configure_callbacks(self) -> list[Callback]:
        """Throughput, learning rate and memory while training, unless the Trainer has it."""
        there = any(isinstance(c, TrainingProgress) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if there else [TrainingProgress()]

    def on_fit_start(self) -> None:
        """Refuse to train with new weights that would stay random."""
        super().on_fit_start()
        frozen = frozen_new_parameters(self, self.new_parameters)
        if frozen:
            names = sorted({name.removeprefix("network.").rpartition(".")[0] for name in frozen})
            raise ConfigError(
                f"{first_few(sorted(frozen))}: newly initialised, because {self.model_name!r} has "
                "no such weights, and frozen, so they would stay random. Train them: set "
                f"lora.modules_to_save: [{', '.join(names)}]{_or_from_file(callbacks_of(self))}"
            )

    def configure_optimizers(self) -> Any:
        """AdamW over what is trainable, its learning rate on a curve over the whole run."""
        trainer = self.trainer
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            check_length(self.lr_schedule, self.warmup_steps, math.inf)
        groups = self.parameter_groups()
        optimizer = torch.optim.AdamW(
            decay_groups(self, groups) if self.weight_decay else groups,
            weight_decay=self.weight_decay,
            fused=self.device.type in ("cpu", "cuda", "mps") and may_be_fused(self.trainer),
        )
        schedule = Schedule(optimizer, self.lr_schedule, self.warmup_fraction, self.warmup_steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_start(self) -> None:
        """Tell the schedule how long the run is."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, Schedule):
                config.scheduler.begin(count_steps(self.trainer), is_trial(self.trainer))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the options, and the weight decay, which parameters are grouped by."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[OPTIONS] = self.options_to_keep()
        checkpoint[TASK] = next(
            cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith(__package__)
        )
        trainer = trainer_of(self)
        if trainer is not None:
            checkpoint["precision"] = str(trainer.precision)
        checkpoint["weight_decay"] = self.weight_decay

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to train on with another weight decay: the optimizer goes on with its own.

        Without a Trainer, cast as the one of the run did, which casts buffers as well.
        """
        super().on_load_checkpoint(checkpoint)
        cast = weights_of(checkpoint.get("precision"))
        if cast is not None and trainer_of(self) is None:
            self.to(cast)
        saved = checkpoint.get("weight_decay", self.weight_decay)  # older checkpoints: not known
        trains = trainer_of(self) is not None and self.trainer.state.fn == "fit"
        if trains and saved != self.weight_decay:
            raise ConfigError(
                f"weight_decay={self.weight_decay:g} would have no effect: the run goes on with "
                f"the checkpoint's optimizer, whose weight decay is {saved:g}. Set it to that; or, "
                "to train these adapters with another, start a new run from them (lora.init_from). "
                "(model.weight_decay)"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group trainable parameters by peak learning rate."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trainable, "lr": self.learning_rate}]


def _or_from_file(callbacks: list[AdapterCallback]) -> str:
    """What else can be done where an adapter with options of its own has been asked for."""
    files = [callback.init_from for callback in callbacks if callback.init_from is not None]
    return (
        f"; {files[0]!r} has none: take one that was trained with them (lora.init_from)"
        if files
        else ""
    )


def ancestors(name: str) -> set[str]:
    """The modules that hold the parameter `name`, by path."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def decay_groups(module: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each group in two: what decays; biases, norms and vectors of adapters, which do not.

    These scale or shift; pulled towards 0 they would not get simpler, only quieter. The matrices of
    adapters decay, as in transformers and PEFT.
    """
    exempt: set[int] = set()
    for child in module.modules():
        norm = "norm" in type(child).__name__.lower()
        for name, parameter in child.named_parameters(recurse=False):
            vector = isinstance(child, Adapter) and parameter.ndim < 2
            if norm or name == "bias" or vector:
                exempt.add(id(parameter))
    split = []
    for group in groups:
        for decays in (True, False):
            params = [p for p in group["params"] if (id(p) not in exempt) == decays]
            rest = {} if decays else {"weight_decay": 0.0}
            if params:
                split.append({**group, "params": params, **rest})
    return split
