"""What holds for every test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Weights drawn without a seed are the same each time, in whatever order the tests run."""
    torch.manual_seed(0)
