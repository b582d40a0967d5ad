"""How a process that computes is set up."""

import os

import pytest
import torch

from fedsim import process


def test_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and operations with the same bits every time, without what would load a compiler."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    process.prepare()
    assert torch.get_num_threads() == 1
    assert torch.get_deterministic_debug_mode() == 1  # warn
    assert not torch.backends.cudnn.allow_tf32
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    process.prepare()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # as somebody wanted it
