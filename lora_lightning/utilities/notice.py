"""Notices of what works, but has a consequence that its user should know."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("lora_lightning")
_said: set[str] = set()


def say_once(text: str) -> None:
    """Log `text` as a warning, the first time in a process and on rank 0 only."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if text in _said or (distributed and torch.distributed.get_rank() != 0):
        return
    _said.add(text)
    logger.warning(text)
