"""`rotated_digits`: scikit-learn's digits at many angles, each of which is a natural client.

Example: an image of 8×8 pixels, rotated by π γ (bilinear, black outside), flattened, with γ as the last number: ``x``
float32 (N, 65), ``y`` int64 (N,). Clients "angle-00" … hold all training digits at γ = (k + ½)/angles; the test set has
each test digit at nine angles, γ = 0, 1/8, …, 1. Source and licence as `digits`.
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedsim.config import DatasetConfig
from fedsim.data import digits
from fedsim.data.dataset import Dataset, Split

TEST_ANGLES = 9


class Config(DatasetConfig):
    """How many angles there are to learn from."""

    name: Literal["rotated_digits"] = "rotated_digits"
    angles: int = Field(64, ge=1, le=1000)


def rotated(x: Tensor, gamma: float) -> Tensor:
    """Images (N, 1, H, W), turned by π γ about their middle."""
    c, s = math.cos(math.pi * gamma), math.sin(math.pi * gamma)
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def at_angles(split: Split, gammas: list[float]) -> tuple[Tensor, Tensor]:
    parts = [
        torch.cat([rotated(split.x, gamma).flatten(1), torch.full((len(split.y), 1), gamma)], 1) for gamma in gammas
    ]
    return torch.cat(parts), split.y.repeat(len(gammas))


def build(config: Config) -> Dataset:
    plain = digits.build(digits.Config())
    x, y = at_angles(plain.train, [(k + 0.5) / config.angles for k in range(config.angles)])
    owners = np.repeat([f"angle-{k:03d}" for k in range(config.angles)], len(plain.train.y))
    test = at_angles(plain.test, [k / (TEST_ANGLES - 1) for k in range(TEST_ANGLES)])
    return Dataset("rotated_digits", Split(x, y, owners), Split(*test), plain.classes)
