"""Settings of the test run. That `sparse_detr` is this checkout's is set in pyproject.toml."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
