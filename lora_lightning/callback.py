"""`LoraCallback`: LoRA fine-tuning of an unchanged LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.lora.linear import LoraConfig
from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.engine.injection import (
    adapters_named,
)
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.errors import ConfigError
from lora_lightning.training import summary as report
from lora_lightning.training.adalora_schedule import RankSchedule
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.attachment import attach
from lora_lightning.training.checkpoints.files import protect_checkpoints
from lora_lightning.training.checks.run import (
    check_callbacks,
    check_names,
    check_strategy,
)
from lora_lightning.training.checks.training import (
    check_before_fit,
    check_first_gradients,
    check_hyperparameters,
    check_loss,
    check_still_there,
    check_what_trains,
)
from lora_lightning.training.eva import starts_from_data
from lora_lightning.training.module_hooks import bind
from lora_lightning.training.module_state import callbacks_of, defines_hook, module_state
from lora_lightning.training.nonfinite import NonfiniteGuard, check_same_policy
from lora_lightning.training.options import (
    LoraOptions,
    check_options,
    log_options,
)
from lora_lightning.training.precision import check_precision
from lora_lightning.training.preemption import (
    Preemption,
    lines_without_checkpoint,
    set_exit_code,
)
from lora_lightning.training.resume.learning_rates import configured_rates
from lora_lightning.training.resume.resumable_loader import make_loaders_resumable
from lora_lightning.training.strategies.deepspeed import check_deepspeed
from lora_lightning.training.strategies.launchers import check_launcher
from lora_lightning.training.strategies.model_parallel import check_model_parallel
from lora_lightning.training.strategies.state import override_state_methods
from lora_lightning.training.weight_averaging import average_what_trains

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoraCallback(AdapterCallback):
    """Fine-tune an unchanged LightningModule with LoRA adapters.

    Adapters are attached to the module when the Trainer sets it up, for fit, validate, test and
    predict alike. The base is frozen, optimizers cover the adapters only, every checkpoint holds
    the adapters only, and `ckpt_path` restores them after checking that adapters and base fit.
    SIGTERM saves at the end of the batch and ends the process with exit code 143.

    Args:
        config: All options as one object, of LoRA or another adapter type; give either this or
            LoRA's options themselves.
        adapter_name: Name of the adapter on the model and in checkpoints.
        module: Dotted path of the submodule to adapt; default: the whole LightningModule. All
            names in the options, modules_to_save too, are then looked up below it.
        init_from: A PEFT folder or an adapter-only checkpoint that the adapter comes from, options
            and all; give no options of your own then.
        trainable: False keeps the adapter as it is: it acts, is saved, but does not train.
        lr: Learning rate of the AdamW that is supplied where the module brings no optimizer.
        nonfinite: What to do about a loss or gradient that is NaN or infinite, before the optimizer
            takes it up: "stop" with an error, "skip" the step, or "ignore" it.
        enabled: False trains the module as if the callback were not there.
        autocast_adapter_dtype: Adapters are fp32 on a base in 16 bits, too. False: they have the
            base's dtype.
        **config_options: The options of `LoraConfig`, one by one.

    Raises:
        ConfigError: If config and single options are both given, or an option is unknown.

    Example:
        >>> callback = LoraCallback(r=16, lora_alpha=32)
        >>> callback.config.r
        16

    """

    def __init__(
        self,
        config: LoraConfig | AdapterConfig | None = None,
        *,
        adapter_name: str = "default",
        module: str | None = None,
        init_from: str | None = None,
        trainable: bool = True,
        lr: float = 1e-3,
        nonfinite: Literal["stop", "skip", "ignore"] = "stop",
        enabled: bool = True,
        autocast_adapter_dtype: bool = True,
        **config_options: Unpack[LoraOptions],
    ) -> None:
        super().__init__()
        check_options(type(self), config, dict(config_options), init_from)
        self.config: AdapterConfig = LoraConfig(**config_options) if config is None else config
        self._requested_config = self.config  # EVA finds other ranks for every module
        self.adapter_name = adapter_name
        self.module = module
        self.init_from = init_from
        self.trainable = trainable
        self.lr = lr
        self.nonfinite = nonfinite
        self.enabled = enabled
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self._selection = Selection()
        self.ranks = RankSchedule()  # for AdaLoRA
        self.guard = NonfiniteGuard(nonfinite)
        self.preemption = Preemption()
        self._gradients_checked = False
        self._log: Any = None

    # -- attaching the adapter ------------------------------------------------------------------

    @property
    def log(self) -> Any:
        """`LightningModule.log`, which the Trainer hands to every callback."""
        return self._log

    @log.setter
    def log(self, method: Any) -> None:
        # The only thing a callback is told before the Trainer refuses modules that define no
        # configure_optimizers; from here on they have one, which supplies AdamW.
        self._log = method
        module = getattr(method, "__self__", None)
        if self.enabled and module is not None:
            bind(module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the run; attach the adapter, now or once the module has built its layers."""
        if not self.enabled:
            bind(pl_module)  # so that an adapter checkpoint is refused in words
            return
        self.ranks.load(None)
        self.guard.skipped = 0
        check_names(callbacks_of(pl_module))
        check_callbacks(trainer)
        check_strategy(trainer)
        check_deepspeed(trainer, [c._requested_config for c in callbacks_of(pl_module)])
        check_model_parallel(trainer, starts_from_data(self))
        check_launcher(trainer, pl_module, self.adapter_name)
        check_precision(trainer)
        protect_checkpoints(trainer)
        override_state_methods(trainer.strategy)
        make_loaders_resumable(trainer.strategy)
        if stage == "fit" and not any(callback.trainable for callback in callbacks_of(pl_module)):
            raise ConfigError(
                "Nothing would train: every LoraCallback has trainable=False. (lora.trainable)"
            )
        check_same_policy({c.adapter_name: c.nonfinite for c in callbacks_of(pl_module)})
        bind(pl_module)
        if not (defines_hook(pl_module, "configure_model") or defines_hook(pl_module, "setup")):
            attach(self, pl_module)

    def _leaves_step_out(self) -> bool:
        return self.guard.skipping

    def _stop_if_asked(self, trainer: Trainer) -> None:
        self.preemption.at_safe_point(trainer)

    def _rank_allocation(self) -> dict[str, Any] | None:
        return self.ranks.state()

    # -- training ------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that exactly the adapters train, and let them."""
        if not self.enabled:
            return
        check_still_there(pl_module, self._selection)
        check_before_fit(trainer, pl_module, self.adapter_name)
        average_what_trains(trainer)
        self.guard.start(trainer, pl_module)
        module_state(pl_module).learning_rates = configured_rates(trainer)
        for adapter in adapters_named(self._root(pl_module), self.adapter_name).values():
            adapter.train()  # also where the base came in eval mode (from_pretrained)
        self._gradients_checked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what trains."""
        if not self.enabled:
            if trainer.is_global_zero:
                report.show(f"no adapters (lora.enabled): {report.trainable_line(pl_module)}")
            return
        if self._is_first(pl_module):
            self.preemption.watch(trainer)
        root = self._root(pl_module)
        self.ranks.start(trainer, root, self.config, self.adapter_name)
        if trainer.is_global_zero:
            report.show(
                report.start_table(root, self.adapter_name, self._selection.left_out),
                *report.start_lines(pl_module, root, self.adapter_name),
            )
            if self._is_last(pl_module):
                check_hyperparameters(pl_module)
                check_hyperparameters(trainer.datamodule)  # type: ignore[attr-defined]
                log_options(
                    trainer, {c.adapter_name: c._requested_config for c in callbacks_of(pl_module)}
                )
                report.show(
                    report.batch_line(
                        report.batch_size(trainer.train_dataloader),
                        trainer.accumulate_grad_batches,
                        trainer.world_size,
                    ),
                )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check at the head of every epoch that nothing else has begun to train."""
        if self._is_first(pl_module):
            self.guard.before_batch()
        if not self.enabled or batch_idx:
            return
        check_what_trains(trainer, pl_module)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """The loss depends on an adapter; let the guard against NaN and inf see it."""
        if self._is_first(pl_module):
            check_loss(loss)
            self.guard.before_backward(trainer, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the first backward, every adapter has a gradient, or something bypasses it."""
        # Under manual optimization a backward pass may be meant for a part of the model.
        if not self.enabled or self._gradients_checked or not pl_module.automatic_optimization:
            return
        self._gradients_checked = True
        check_first_gradients(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Stop at NaN and inf; add the gradient of AdaLoRA's orthogonality term."""
        if self._is_first(pl_module):
            self.guard.before_step(trainer, pl_module, optimizer)
        self.ranks.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let AdaLoRA allocate ranks."""
        self.ranks.after_batch()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say what is left to resume from when a run is interrupted."""
        set_exit_code(trainer, exception)
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self.on_fit_end(trainer, pl_module)
            if self._is_last(pl_module) and trainer.is_global_zero:
                report.show(*lines_without_checkpoint(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the adapters lie."""
        lines = [*self.guard.finish(), *self.ranks.finish()]
        if self.enabled and trainer.is_global_zero:
            callback: Any = trainer.checkpoint_callback
            best = getattr(callback, "best_model_path", "")
            last = getattr(callback, "last_model_path", "")
            weights_only = getattr(callback, "save_weights_only", False)
            report.show(*lines)
            if self._is_last(pl_module):
                report.show(*report.end_lines(pl_module, best, last, weights_only))

    def _is_first(self, pl_module: LightningModule) -> bool:
        """Of several callbacks, the one that acts for the run as a whole."""
        return callbacks_of(pl_module)[:1] == [self]

    def _is_last(self, pl_module: LightningModule) -> bool:
        """Of several callbacks, the one that says what is true of the run as a whole."""
        return callbacks_of(pl_module)[-1:] == [self]

    # -- resuming ------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Of its own for every adapter; a Trainer without this callback is told what it misses."""
        # Before a module is attached, Lightning compares keys: `setup` refuses equal names clearer.
        name = self.adapter_name if self._log is not None else id(self)
        return self._generate_state_key(adapter_name=name)

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out so far."""
        return {"skipped": self.guard.skipped} if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.guard.skipped = state_dict["skipped"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue AdaLoRA's ranks where the checkpoint left off."""
        if self.enabled and KEY in checkpoint and trainer.state.fn == "fit":
            saved = checkpoint[KEY]["adapters"][self.adapter_name]
            self.ranks.load(saved.get("rank_allocation"))


# Of a TypedDict jsonargparse would know neither defaults nor descriptions. Of anything it finds
# them in `LoraConfig`, which `__init__` calls with the options.
LoraCallback.__init__.__annotations__["config_options"] = Any
