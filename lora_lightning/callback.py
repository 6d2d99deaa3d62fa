"""`LoraCallback`: LoRA fine-tuning of an unchanged LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.engine.followers import take_off_unmoved
from lora_lightning.engine.injection import adapters_named
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.training import checks, messages, summary
from lora_lightning.training._lightning import state_key
from lora_lightning.training.adalora_schedule import RankSchedule
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.attachment import attach
from lora_lightning.training.checkpoint_io.files import protect_checkpoints
from lora_lightning.training.checkpoint_io.readable import check_states
from lora_lightning.training.frozen_base import (
    EvalModeAdvice,
    freeze_again,
    settle_what_trains,
)
from lora_lightning.training.module_hooks import bind
from lora_lightning.training.module_state import callbacks_of, defines_hook, module_state
from lora_lightning.training.nonfinite import NonfiniteGuard
from lora_lightning.training.options import LoraOptions, check_options, log_options
from lora_lightning.training.own_averages import explain_failure, warn_of_notes
from lora_lightning.training.preemption import Preemption, lines_without_checkpoint, set_exit_code
from lora_lightning.training.resume.checks import configured_rates
from lora_lightning.training.resume.hook_turns import follow_hooks
from lora_lightning.training.resume.resumable_loader import make_loaders_resumable
from lora_lightning.training.resume.run_state import end_wait
from lora_lightning.training.strategies.launchers import hand_back_adapters
from lora_lightning.training.strategies.state_overrides import override_state_methods
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
        self._new_modules: list[str] = []
        self._selection = Selection()
        self._rank_schedule = RankSchedule()  # for AdaLoRA
        self._nonfinite_guard = NonfiniteGuard(nonfinite)
        self._preemption = Preemption()
        self._eval_advice = EvalModeAdvice()
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
        bind(pl_module)  # without adapters too: a checkpoint of adapters is refused in words
        if not self.enabled:
            return
        self._rank_schedule.load(None)
        self._nonfinite_guard.skipped = 0
        checks.check_run(self, trainer, pl_module)
        hand_back_adapters(trainer, pl_module, self.adapter_name)
        protect_checkpoints(trainer)
        follow_hooks(trainer)
        override_state_methods(trainer.strategy)
        make_loaders_resumable(trainer.strategy)
        if not (defines_hook(pl_module, "configure_model") or defines_hook(pl_module, "setup")):
            attach(self, pl_module)

    # -- training ------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that exactly the adapters train, and put them into train mode."""
        if not self.enabled:
            return
        checks.check_still_there(pl_module, self._selection)
        checks.check_before_fit(trainer, pl_module, self.adapter_name)
        settle_what_trains(pl_module)
        module_state(pl_module).final_states = []
        average_what_trains(trainer)
        self._nonfinite_guard.start(trainer, pl_module)
        module_state(pl_module).learning_rates = configured_rates(trainer)
        for adapter in adapters_named(self._root(pl_module), self.adapter_name).values():
            adapter.train()  # also where the base came in eval mode (from_pretrained)
        self._eval_advice.leave_out(pl_module)
        self._gradients_checked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what trains; from now on signals save and end the run."""
        self._eval_advice.let_in()
        if not self.enabled:
            summary.show_without_adapters(trainer, pl_module)
            return
        if self._is_first(pl_module):
            self._preemption.watch(trainer)
        self._rank_schedule.start(trainer, self._root(pl_module), self.config, self.adapter_name)
        summary.show_start(self, trainer, pl_module)
        if self._is_last(pl_module):
            check_states(trainer, pl_module)
            warn_of_notes(pl_module)
        if self._is_last(pl_module) and trainer.is_global_zero:
            log_options(trainer, callbacks_of(pl_module))
            messages.show(summary.batch_line(trainer))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check at the head of every epoch that nothing else has begun to train."""
        if self._is_first(pl_module):
            self._nonfinite_guard.before_batch()
            if batch_idx == 0:
                checks.check_what_trains(trainer, pl_module)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Check that the loss depends on an adapter; remember it for the check of NaN and inf."""
        if self._is_first(pl_module):
            freeze_again(trainer, pl_module)
            checks.check_loss(loss)
            self._nonfinite_guard.before_backward(trainer, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check after the first backward that every adapter has a gradient."""
        # Under manual optimization a backward pass may be meant for a part of the model.
        if self.enabled and not self._gradients_checked and pl_module.automatic_optimization:
            self._gradients_checked = True
            checks.check_first_gradients(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Stop at NaN and inf; add the gradient of AdaLoRA's orthogonality term."""
        if self._is_first(pl_module):
            freeze_again(trainer, pl_module)
            self._nonfinite_guard.before_step(trainer, pl_module, optimizer)
        self._rank_schedule.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Freeze the base again; allocate AdaLoRA's ranks."""
        if self._is_first(pl_module):
            freeze_again(trainer, pl_module)
        self._rank_schedule.after_batch()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Set the exit code; tell what there is to resume from when Ctrl-C ends a run."""
        self._eval_advice.let_in()
        set_exit_code(trainer, exception)
        if self._is_first(pl_module):
            explain_failure(pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self.on_fit_end(trainer, pl_module)
            if self._is_last(pl_module) and trainer.is_global_zero:
                messages.show(*lines_without_checkpoint(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell which steps were left out, how ranks were shared out and where checkpoints are."""
        lines = [*self._nonfinite_guard.finish(), *self._rank_schedule.finish()]
        if self.enabled and trainer.is_global_zero:
            if self._is_last(pl_module):
                lines += summary.end_lines(trainer, pl_module)
            messages.show(*lines)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what the module has moved of its base: at the next run that is no other base."""
        end_wait(pl_module)  # of a run that never came to train
        if self._is_last(pl_module):
            moved = module_state(pl_module).baseline.changed(pl_module)
            take_off_unmoved(pl_module, moved)

    # -- resuming ------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """A key of its own for each adapter: a Trainer without it is told what it misses."""
        # Before a module is attached, Lightning compares keys: `setup` refuses equal names clearer.
        name = self.adapter_name if self._log is not None else id(self)
        return state_key(self, adapter_name=name)

    def state_dict(self) -> dict[str, Any]:
        """The number of optimizer steps that were left out so far."""
        return {"skipped": self._nonfinite_guard.skipped} if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint's number."""
        self._nonfinite_guard.skipped = state_dict["skipped"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue AdaLoRA's ranks where the checkpoint left off."""
        if self.enabled and KEY in checkpoint and trainer.state.fn == "fit":
            saved = checkpoint[KEY]["adapters"][self.adapter_name]
            self._rank_schedule.load(saved.get("rank_allocation"))

    # -- what the modules of training/ ask for -------------------------------------------------

    def _leaves_step_out(self) -> bool:
        return self._nonfinite_guard.skipping

    def _stop_if_asked(self, trainer: Trainer) -> None:
        self._preemption.at_safe_point(trainer)

    def _rank_allocation(self) -> dict[str, Any] | None:
        return self._rank_schedule.state()

    def _is_first(self, pl_module: LightningModule) -> bool:
        """True for the one of several callbacks that acts for the run as a whole."""
        return callbacks_of(pl_module)[:1] == [self]

    def _is_last(self, pl_module: LightningModule) -> bool:
        """True for the one of several callbacks that tells what is true of the run as a whole."""
        return callbacks_of(pl_module)[-1:] == [self]


# Of a TypedDict jsonargparse would know neither defaults nor descriptions. Of anything it finds
# them in `LoraConfig`, which `__init__` calls with the options.
LoraCallback.__init__.__annotations__["config_options"] = Any
