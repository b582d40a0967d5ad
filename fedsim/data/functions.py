"""Data sets of functions: one example a client, which says all there is to say of the function that it answers for.

`numbered` is the plainest: clients 0 … N−1, each known by its number. ``x`` (N, …), ``y`` zeros; the natural clients
are the functions, in their order, and the test split is all of them, so that F is measured there.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim.config import DatasetConfig
from fedsim.data.dataset import Dataset, Split


class Config(DatasetConfig):
    name: Literal["numbered"] = "numbered"
    clients: int = Field(5, ge=1, le=1_000_000)


def build(config: Config) -> Dataset:
    return functions("numbered", torch.arange(config.clients, dtype=torch.float64), 1)


def functions(name: str, x: Tensor, classes: int) -> Dataset:
    """N functions described by x (N, …). ``classes`` is for functions that are about labels; 1 otherwise."""
    names = np.array([f"{i:07d}" for i in range(len(x))])
    split = Split(x, torch.zeros(len(x), dtype=torch.int64), names)
    return Dataset(name, split, split, classes)
