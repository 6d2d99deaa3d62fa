"""Ready LightningDataModules for users who bring only a file."""

from typing import TYPE_CHECKING

from lora_lightning.utilities.lazy_imports import lazy_names

if TYPE_CHECKING:
    from lora_lightning.data.images import ImageDataModule as ImageDataModule
    from lora_lightning.data.stdlib_docstrings import StdlibDocstrings as StdlibDocstrings
    from lora_lightning.data.text import TextDataModule as TextDataModule
    from lora_lightning.data.text_classification import (
        TextClassificationDataModule as TextClassificationDataModule,
    )
    from lora_lightning.data.token_classification import (
        TokenClassificationDataModule as TokenClassificationDataModule,
    )

__all__, __getattr__, __dir__ = lazy_names(__name__)
