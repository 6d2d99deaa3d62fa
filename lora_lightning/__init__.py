"""LoRA fine-tuning for PyTorch Lightning: one callback, any LightningModule.

    import lightning as L
    from lora_lightning import LoraCallback

    trainer = L.Trainer(callbacks=[LoraCallback(r=8)])
    trainer.fit(module)      # your own module, unchanged

Names load when they are first used: `import lora_lightning` alone imports nothing heavy, and the
adapter engine (`inject_adapter` and what goes with it) needs torch only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.utilities.lazy_imports import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_lightning.adapters.adalora import AdaLoraConfig as AdaLoraConfig
    from lora_lightning.adapters.base import Adapter as Adapter
    from lora_lightning.adapters.base import AdapterSpec as AdapterSpec
    from lora_lightning.adapters.base import BaseWeight as BaseWeight
    from lora_lightning.adapters.base import DeltaAdapter as DeltaAdapter
    from lora_lightning.adapters.config import AdapterConfig as AdapterConfig
    from lora_lightning.adapters.ia3 import IA3Config as IA3Config
    from lora_lightning.adapters.ia3 import Ia3Config as Ia3Config
    from lora_lightning.adapters.loha import LoHaConfig as LoHaConfig
    from lora_lightning.adapters.loha import LohaConfig as LohaConfig
    from lora_lightning.adapters.lokr import LoKrConfig as LoKrConfig
    from lora_lightning.adapters.lokr import LokrConfig as LokrConfig
    from lora_lightning.adapters.lora.config import LoraConfig as LoraConfig
    from lora_lightning.adapters.lora.init_weights import EvaConfig as EvaConfig
    from lora_lightning.adapters.lora.init_weights import LoftQConfig as LoftQConfig
    from lora_lightning.adapters.lora.init_weights import LoftqConfig as LoftqConfig
    from lora_lightning.adapters.oft import OFTConfig as OFTConfig
    from lora_lightning.adapters.oft import OftConfig as OftConfig
    from lora_lightning.adapters.registry import register_adapter as register_adapter
    from lora_lightning.adapters.shira import ShiraConfig as ShiraConfig
    from lora_lightning.adapters.vera import VeraConfig as VeraConfig
    from lora_lightning.callback import LoraCallback as LoraCallback
    from lora_lightning.callbacks.comparison import compare_with_base as compare_with_base
    from lora_lightning.callbacks.text_samples import TextSamples as TextSamples
    from lora_lightning.checkpoint.loading import load_adapter as load_adapter
    from lora_lightning.checkpoint.peft.hotswap import hotswap_adapter as hotswap_adapter
    from lora_lightning.checkpoint.peft.writing import save_adapter as save_adapter
    from lora_lightning.checkpoint.state_dict import adapter_state_dict as adapter_state_dict
    from lora_lightning.checkpoint.state_dict import (
        load_adapter_state_dict as load_adapter_state_dict,
    )
    from lora_lightning.data.images import ImageDataModule as ImageDataModule
    from lora_lightning.data.stdlib_docstrings import StdlibDocstrings as StdlibDocstrings
    from lora_lightning.data.text import TextDataModule as TextDataModule
    from lora_lightning.data.text_classification import (
        TextClassificationDataModule as TextClassificationDataModule,
    )
    from lora_lightning.data.token_classification import (
        TokenClassificationDataModule as TokenClassificationDataModule,
    )
    from lora_lightning.engine.combine import add_weighted_adapter as add_weighted_adapter
    from lora_lightning.engine.eva import eva_start as eva_start
    from lora_lightning.engine.injection import delete_adapter as delete_adapter
    from lora_lightning.engine.injection import inject_adapter as inject_adapter
    from lora_lightning.engine.merging import merge_adapter as merge_adapter
    from lora_lightning.engine.merging import unmerge_adapter as unmerge_adapter
    from lora_lightning.engine.status import adapter_status as adapter_status
    from lora_lightning.engine.switching import active_adapters as active_adapters
    from lora_lightning.engine.switching import adapter_names as adapter_names
    from lora_lightning.engine.switching import adapters_per_row as adapters_per_row
    from lora_lightning.engine.switching import disable_adapter as disable_adapter
    from lora_lightning.engine.switching import scale_adapter as scale_adapter
    from lora_lightning.engine.switching import set_adapter as set_adapter
    from lora_lightning.engine.targets.selection import Selection as Selection
    from lora_lightning.engine.unloading import merge_and_unload as merge_and_unload
    from lora_lightning.engine.unloading import unload as unload
    from lora_lightning.errors import AdapterMismatchError as AdapterMismatchError
    from lora_lightning.errors import AdapterStateError as AdapterStateError
    from lora_lightning.errors import CheckpointError as CheckpointError
    from lora_lightning.errors import ConfigError as ConfigError
    from lora_lightning.errors import LoraError as LoraError
    from lora_lightning.errors import ModelError as ModelError
    from lora_lightning.errors import NonfiniteError as NonfiniteError
    from lora_lightning.errors import OptimizerError as OptimizerError
    from lora_lightning.errors import RankError as RankError
    from lora_lightning.errors import RecordError as RecordError
    from lora_lightning.errors import TargetError as TargetError
    from lora_lightning.examination.examine import examine as examine
    from lora_lightning.examination.result import Examination as Examination
    from lora_lightning.tasks.causal_lm import CausalLM as CausalLM
    from lora_lightning.tasks.image_classification import (
        ImageClassification as ImageClassification,
    )
    from lora_lightning.tasks.seq2seq_lm import Seq2SeqLM as Seq2SeqLM
    from lora_lightning.tasks.sequence_classification import (
        SequenceClassification as SequenceClassification,
    )
    from lora_lightning.tasks.token_classification import (
        TokenClassification as TokenClassification,
    )
    from lora_lightning.training.checkpoint_io.loading import (
        load_from_checkpoint as load_from_checkpoint,
    )
    from lora_lightning.training.progress import TrainingProgress as TrainingProgress
    from lora_lightning.training.terminal_progress import TerminalProgress as TerminalProgress
    from lora_lightning.verbs.export.export import export as export
    from lora_lightning.verbs.generate.generate import generate as generate
    from lora_lightning.verbs.inspect.inspect import Inspection as Inspection
    from lora_lightning.verbs.inspect.inspect import inspect as inspect
    from lora_lightning.verbs.merge.merge import merge as merge
    from lora_lightning.verbs.plan.plan import plan as plan
    from lora_lightning.verbs.plan.result import Plan as Plan
    from lora_lightning.verbs.preview.preview import preview as preview
    from lora_lightning.verbs.report.report import report as report

__all__, __getattr__, __dir__ = lazy_names(__name__)
