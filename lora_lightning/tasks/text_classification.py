"""Text classification with any Hugging Face encoder."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lora_lightning.errors import ConfigError, first_few
from lora_lightning.hosts.base import adapter_owners
from lora_lightning.tasks.pretrained import load_pretrained

Batch = dict[str, Tensor]


class TextClassification(LightningModule):
    """A pretrained encoder with a classification head, trained on cross-entropy.

    Args:
        model: Hub id, local folder, or `package:import_name/sub/folder` (an installed package's).
        label_names: The classes in order. Default: those of the Trainer's data module.
        lr: Learning rate of pretrained weights and adapters, at its peak. The default suits LoRA;
            full fine-tuning wants about a tenth of it.
        head_lr: Learning rate of newly initialised weights, at its peak. They start from noise and
            have further to go.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: Share of all steps, 0 <= fraction <= 1, in which the learning rate rises
            to its peak; after them it falls linearly to 0.
    """

    network: nn.Module | None

    def __init__(
        self,
        model: str,
        label_names: list[str] | None = None,
        lr: float = 2e-3,
        head_lr: float = 1e-2,
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
        self.label_names = label_names
        self.lr = lr
        self.head_lr = head_lr
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.network = None
        self.metrics = nn.ModuleDict()
        self.new_parameters: set[str] = set()

    def configure_model(self) -> None:
        """Load the network and give it a head for the classes, once."""
        self.label_names = labels = self._agreed_label_names()
        if self.network is not None:
            return
        self.network, info = load_pretrained(
            "AutoModelForSequenceClassification",
            self.model_name,
            id2label=dict(enumerate(labels)),
            label2id={name: number for number, name in enumerate(labels)},
            # The Trainer's precision decides, not the precision the file was saved in.
            dtype=torch.get_default_dtype(),
            # Only a head trained for other classes can mismatch; it is replaced by a new one.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        self.new_parameters = {f"network.{key}" for key in new}
        # from_pretrained returns eval mode, which the Trainer would keep: dropout would be off.
        self.network.train()
        for stage in ("train", "val", "test"):
            self.metrics[f"{stage}_acc"] = MulticlassAccuracy(len(labels), average="micro")
            if stage != "train":
                self.metrics[f"{stage}_f1"] = MulticlassF1Score(len(labels), average="macro")

    def on_fit_start(self) -> None:
        """Refuse to train with a new head that would stay random."""
        frozen = _frozen_for_good(self, self.new_parameters)
        if frozen:
            names = sorted({name.removeprefix("network.").rpartition(".")[0] for name in frozen})
            raise ConfigError(
                f"{first_few(sorted(frozen))}: newly initialised, because {self.model_name!r} has "
                "no such weights, and frozen, so they would stay random. "
                f"Train them: set lora.modules_to_save: [{', '.join(names)}]"
            )

    def forward(self, batch: Batch) -> Tensor:
        """Class scores (batch, classes) in float32; labels in `batch` are left aside."""
        assert self.network is not None, "configure_model builds the network"
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.network(**inputs).logits.float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        return self._step("train", batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss, accuracy and macro F1."""
        self._step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss, accuracy and macro F1."""
        self._step("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The most probable class name of each text, and the probabilities of all classes."""
        probabilities = self(batch).softmax(dim=-1)
        assert self.label_names is not None, "configure_model sets the names"
        labels = [self.label_names[index] for index in probabilities.argmax(dim=-1).tolist()]
        return {"labels": labels, "probabilities": probabilities}

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
            self._parameter_groups(),
            weight_decay=self.weight_decay,
            fused=self._can_fuse(),
        )
        schedule = get_linear_schedule_with_warmup(
            optimizer, round(self.warmup_fraction * steps), int(steps)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the order of the classes: the head's rows mean nothing without it."""
        checkpoint["label_names"] = self.label_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose classes are others, or in another order."""
        saved, ours = checkpoint.get("label_names"), self.label_names or []
        # None: not a checkpoint of this class; its weights are what gives it away.
        if saved is not None and saved != ours:
            raise ConfigError(
                f"the checkpoint's classes are not this run's: {_difference(saved, ours)} "
                "(model.label_names)"
            )

    def _step(self, stage: str, batch: Batch) -> Tensor:
        scores, labels = self(batch), batch["labels"]
        loss = nn.functional.cross_entropy(scores, labels)
        size, shown = len(labels), stage != "test"
        self.log(f"{stage}_loss", loss, prog_bar=shown, batch_size=size)
        for name, metric in self.metrics.items():
            if name.startswith(stage):
                metric(scores, labels)
                accuracy = name.endswith("_acc")
                self.log(name, metric, prog_bar=shown and accuracy, batch_size=size)  # type: ignore[arg-type]
        return loss

    def _agreed_label_names(self) -> list[str]:
        data = getattr(self._trainer, "datamodule", None)
        theirs: list[str] | None = getattr(data, "label_names", None)
        ours = self.label_names
        if ours and theirs and ours != theirs:
            raise ConfigError(
                f"the model's classes are not the data's: {_difference(ours, theirs)} "
                "(model.label_names, data.label_names)"
            )
        names = ours or theirs
        if not names:
            raise ConfigError(
                "the classes are not known: the Trainer has no data module with `label_names`, "
                "so name them in order. (model.label_names)"
            )
        if len(set(names)) < max(2, len(names)):
            raise ConfigError(
                f"label_names must be at least 2 different names, found {names}. "
                "(model.label_names)"
            )
        return list(names)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        trainable = {n: p for n, p in self.named_parameters() if p.requires_grad}
        # A copy that an adapter trains in place of a new weight starts from noise as well.
        new_modules = set().union(*map(_ancestors, self.new_parameters))
        owners = adapter_owners(self)
        new = {
            name
            for name, parameter in trainable.items()
            if name in self.new_parameters or owners.get(id(parameter)) in new_modules
        }
        groups = [
            {"params": [p for n, p in trainable.items() if n not in new], "lr": self.lr},
            {"params": [p for n, p in trainable.items() if n in new], "lr": self.head_lr},
        ]
        return [group for group in groups if group["params"]]

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
        if not parameters[name].requires_grad and adapted.isdisjoint(_ancestors(name))
    }


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _difference(first: list[str], second: list[str]) -> str:
    if set(first) == set(second):
        return f"the same names in another order, {first} and {second}."
    only_first = first_few([name for name in first if name not in second]) or "nothing"
    only_second = first_few([name for name in second if name not in first]) or "nothing"
    return (
        f"{len(first)} and {len(second)} names; only in the first: {only_first}; "
        f"only in the second: {only_second}."
    )
