"""What every test starts from: no hub, fixed seeds, few threads."""

import os

# Before torch is imported anywhere: two processes with two OpenMP threads each on two cores spin
# in each other's way and slow down twenty-fold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
