"""The model, and each node's share of the digits."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn


def model() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


@cache
def share(partition: int, partitions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every ``partitions``-th picture: (n, 64) pixels in [0, 1] and (n,) digits."""
    digits = load_digits()
    x = torch.tensor(digits.data[partition::partitions], dtype=torch.float32) / 16
    return x, torch.tensor(digits.target[partition::partitions])
