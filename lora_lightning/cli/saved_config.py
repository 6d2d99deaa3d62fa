"""The resolved config of a run, where the verbs find it: `config.yaml` in the run directory."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lora_lightning.runs.run import CONFIG
from lora_lightning.utilities.atomic_write import write_atomically


class RunConfig(SaveConfigCallback):
    """Lightning's, of every call into its log directory; that of fit into the run directory too."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it, but for an evaluation without a logger: its place is that of the run's own."""
        log_dir = trainer.log_dir  # all processes ask for it together
        alone = log_dir is not None and Path(log_dir) == Path(trainer.default_root_dir)
        if stage == "fit" or not alone:
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the config of a fit, without what only some verbs take: the checkpoint, too."""
        if stage != "fit":
            return
        config = self.config.clone()
        for name in ("ckpt_path", "weights_only"):
            config.pop(name, None)
        content = self.parser.dump(config, skip_none=False)
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically({directory / CONFIG: content.encode()})
