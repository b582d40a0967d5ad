"""`quadratic`: synthetic quadratics of any heterogeneity (Shu et al. 2023, arXiv:2308.04077, appendix 12.1).

Client i's example is (d, 2): the factors 1 + C(a_j − 1/N) and 1 + C(b_j − 1/N) of its quadratic and linear terms, with
a_j and b_j, over the clients, drawn from Dir(1/N, …, 1/N) for each coordinate j. Over clients the factors average to 1.
"""

from typing import Literal

import torch
from pydantic import Field

from fedsim.config import DatasetConfig
from fedsim.data.dataset import Dataset
from fedsim.data.functions import functions
from fedsim.rng import Key


class Config(DatasetConfig):
    name: Literal["quadratic"] = "quadratic"
    clients: int = Field(5, ge=1, description="N")
    dimension: int = Field(100, ge=1, description="d")
    heterogeneity: float = Field(5.0, ge=0, description="C; 0: all functions are the same")
    seed: int = Field(0, ge=0, description="of the coefficients")


def build(config: Config) -> Dataset:
    rng, n = Key.root(config.seed).at("quadratic").numpy(), config.clients
    shares = rng.dirichlet([1 / n] * n, size=(config.dimension, 2))  # (d, 2, N)
    return functions("quadratic", torch.from_numpy(1 + config.heterogeneity * (shares - 1 / n)).movedim(2, 0), 1)
