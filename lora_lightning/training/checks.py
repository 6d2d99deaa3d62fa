"""Checks before a run and during it: what cannot work is refused, and only adapters train."""

from __future__ import annotations

from types import MethodType

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lora_lightning.checkpoint.fingerprint import base_tensors
from lora_lightning.engine.switching import adapter_names
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.errors import AdapterStateError, ConfigError, first_few
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.training._lightning import all_callbacks
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.eva import starts_from_data
from lora_lightning.training.frozen_base import freeze_again, trained_parameters
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.module_state import callbacks_of, module_state
from lora_lightning.training.nonfinite import check_same_policy
from lora_lightning.training.optimizers import check_coverage, trainable_parameters
from lora_lightning.training.precision import check_precision
from lora_lightning.training.strategies import deepspeed, fsdp2
from lora_lightning.training.weight_averaging import averaged_models
from lora_lightning.utilities.dtensor import reshard
from lora_lightning.utilities.is_a import is_a

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy", "FSDPStrategy"}
_BASE_CHANGERS = {"BaseFinetuning", "ModelPruning"}


def check_run(callback: AdapterCallback, trainer: Trainer, module: LightningModule) -> None:
    """Refuse what cannot work, before anything is changed: ConfigError says what to use instead."""
    callbacks = callbacks_of(module)
    check_names(callbacks)
    check_callbacks(trainer)
    check_strategy(trainer)
    deepspeed.check_deepspeed(trainer, [c._requested_config for c in callbacks])
    fsdp2.check_model_parallel(trainer, starts_from_data(callback))
    check_precision(trainer)
    if trainer.state.fn == "fit" and not any(c.trainable for c in callbacks):
        raise ConfigError(
            "Nothing would train: every LoraCallback has trainable=False. (lora.trainable)"
        )
    check_same_policy({c.adapter_name: c.nonfinite for c in callbacks})


def check_strategy(trainer: Trainer) -> None:
    """Refuse (ConfigError) strategies under which adapters may not train, save and resume."""
    name = type(trainer.strategy).__name__
    if not is_a(trainer.strategy, *_STRATEGIES):
        raise ConfigError(
            f"LoraCallback does not support {name} in this version: adapters would not be sharded, "
            "saved or restored correctly. Use a single device, strategy='ddp' or 'fsdp', or "
            "ModelParallelStrategy. (trainer.strategy)"
        )


def check_callbacks(trainer: Trainer) -> None:
    """Refuse (ConfigError) callbacks that change base weights, which checkpoints do not hold."""
    for callback in all_callbacks(trainer):
        if is_a(callback, *_BASE_CHANGERS):
            raise ConfigError(
                f"{type(callback).__name__} changes base weights, but with LoraCallback the base "
                "is frozen and checkpoints hold adapters only: its work would be lost. Take one of "
                "the two out. (trainer.callbacks)"
            )


def check_names(callbacks: list[AdapterCallback]) -> None:
    """Raise ConfigError if two LoraCallbacks of the Trainer have the same adapter name."""
    names = [callback.adapter_name for callback in callbacks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"Two LoraCallbacks of this Trainer have adapter_name={name!r}. "
                "Give each a name of its own. (lora.adapter_name)"
            )


def check_base_has_values(module: LightningModule) -> None:
    """Raise AdapterStateError if base tensors are on the meta device, and will stay there."""
    strategy = module.trainer.strategy
    if strategy.restore_checkpoint_after_setup and not deepspeed.is_deepspeed(strategy):
        return
    empty = [name for name, tensor in base_tensors(module) if tensor.is_meta]
    if empty:
        # On its way out Lightning moves the module to the CPU, which would hide this error.
        module.cpu = MethodType(cpu, module)  # type: ignore[method-assign]
        raise AdapterStateError(
            f"{len(empty)} tensors of the base are on the meta device and have no values: "
            f"{first_few(empty, 3)}. Load the base model where the module builds it, as "
            "from_pretrained does, or with load_state_dict(state, assign=True). (model)"
        )


def cpu(self: nn.Module) -> nn.Module:
    """`Module.cpu`, which leaves meta tensors where they are; of its name, for pickle."""
    moved: nn.Module = self._apply(lambda tensor: tensor if tensor.is_meta else tensor.cpu())
    return moved


def check_before_fit(trainer: Trainer, module: LightningModule, adapter_name: str) -> None:
    """Check (LoraError) that no adapter is merged, and averages and optimizers cover them."""
    for path, layer in named_adapted_layers(module):
        if layer.merged_adapters:
            raise AdapterStateError(
                f"Adapters {layer.merged_adapters} are merged into the base ({path!r}, for one) "
                "and would not train. Call unmerge_adapter(module) before fit."
            )
    for averaged in averaged_models(trainer):
        if adapter_name not in adapter_names(averaged):
            raise ConfigError(
                "WeightAveraging copied the module before the adapters were on it, so they "
                "would not be averaged. List LoraCallback before it. (trainer.callbacks)"
            )
    check_coverage(deepspeed.whole_optimizers(trainer.optimizers), module)
    fsdp2.check_dtypes(module)


def check_still_there(module: LightningModule, selection: Selection) -> None:
    """Raise AdapterStateError if modules that carry adapters are not in the module any more."""
    present = {id(part) for part in module.modules()}
    lost = [path for path, target in selection.targets.items() if id(target) not in present]
    if lost:
        raise AdapterStateError(
            f"{first_few(lost)} were replaced after adapters were attached to them, by a plugin "
            "or in a hook: the adapters are gone with them. Replace modules in the module's "
            "__init__, setup or configure_model, before adapters are attached."
        )


def check_what_trains(trainer: Trainer, module: LightningModule) -> None:
    """Raise AdapterStateError or OptimizerError if something trains that is not saved."""
    reshard(module)  # validation may have left it gathered
    freeze_again(trainer, module)
    trained = trained_parameters(module)
    check_coverage(deepspeed.whole_optimizers(trainer.optimizers), module, trained)
    owned = {key for callback in callbacks_of(module) for key in callback._saved_keys(module)}
    others = [name for name in trained if name not in owned]
    if others:
        raise AdapterStateError(
            f"{first_few(others)} began to train, but belong to no adapter: they would not be "
            "saved. Train them as a copy instead: lora.modules_to_save. (lora.modules_to_save)"
        )


def check_loss(loss: Tensor) -> None:
    """Raise AdapterStateError if the loss depends on nothing that trains, before torch does."""
    if not loss.requires_grad:
        raise AdapterStateError(
            "The loss does not depend on any tensor that trains. Is it computed under "
            "torch.no_grad, from detached outputs, or past the adapted submodule? Gradient "
            "checkpointing lets no gradient through frozen inputs while it is reentrant: give it "
            "use_reentrant=False. (lora.target_modules)"
        )


def check_first_gradients(module: LightningModule) -> None:
    """Check after the first backward that every adapter has a gradient, or something bypasses it.

    AdapterStateError if none has one; where only some have, a warning names the others.
    """
    trainable = trainable_parameters(module)
    remembered = module_state(module)
    reached, remembered.had_gradient = remembered.had_gradient, set()  # of this run only
    without = [n for n, p in trainable.items() if p.grad is None and id(p) not in reached]
    if len(without) == len(trainable):
        raise AdapterStateError(
            "After the first backward pass no adapter has a gradient: the loss does not depend "
            "on any of them. Is the adapted submodule used in training_step, are its outputs "
            "detached, or its weights read without calling the module? (lora.target_modules)"
        )
    if without:
        rank_zero_warn(
            f"{len(without)} of {len(trainable)} trainable tensors had no gradient in the "
            f"first step ({', '.join(without[:3])}, ...): these modules were not called, "
            "their weights are read without calling them, or gradient checkpointing is reentrant "
            "(use_reentrant=False lets gradients through)."
        )


def check_no_unmanaged_adapters(module: LightningModule) -> None:
    """Raise AdapterStateError if the model carries adapters that no callback manages."""
    managed = [callback.adapter_name for callback in callbacks_of(module)]
    unmanaged = [name for name in adapter_names(module) if name not in managed]
    if unmanaged:
        raise AdapterStateError(
            f"The model carries adapters {unmanaged}, which no LoraCallback of this Trainer "
            "manages: they would not be saved. Make them part of the base with "
            "merge_and_unload(module), take them off with delete_adapter, or give each a "
            "LoraCallback of its own. (lora.adapter_name)"
        )
