"""Tests run on one thread, offline, with strangers' telemetry off, and with the global generators spoiled."""

import os
import random
from pathlib import Path

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def spoiled_generators() -> None:
    """Nothing may depend on the global generators, so every test starts them somewhere else."""
    salt = int.from_bytes(os.urandom(4), "little")
    random.seed(salt)
    np.random.seed(salt)  # noqa: NPY002
    torch.manual_seed(salt)


@pytest.fixture(autouse=True)
def nothing_beside() -> None:
    """A process runs one command; a test that runs several leaves no folder behind in which the next would look."""
    from fedsim import registry

    registry.look_in()


@pytest.fixture
def experiments() -> Path:
    return Path(__file__).parent.parent / "experiments"
