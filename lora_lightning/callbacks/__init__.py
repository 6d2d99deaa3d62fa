"""Callbacks that say how training goes, and whether it helped."""

from typing import TYPE_CHECKING

from lora_lightning.utilities.lazy_imports import lazy_names

if TYPE_CHECKING:
    from lora_lightning.callbacks.comparison import Comparison as Comparison
    from lora_lightning.callbacks.comparison import compare_with_base as compare_with_base
    from lora_lightning.callbacks.text_samples import TextSamples as TextSamples
    from lora_lightning.training.progress import TrainingProgress as TrainingProgress
    from lora_lightning.training.terminal_progress import TerminalProgress as TerminalProgress

__all__, __getattr__, __dir__ = lazy_names(__name__)
