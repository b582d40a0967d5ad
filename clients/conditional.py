"""A task whose model is generated from a number in its input: an MLP with θ = h(γ; φ), φ learned.

In the manner of the MIP paper (Gonzalez Ortiz, Guttag and Dalca 2024, arXiv:2304.07645). An example is (x, γ),
flattened, with γ in [0, 1] as its last number; the parameters of the task are φ. Every example has its own γ and so its
own network, whoever holds it and whatever is in its batch.

h has hidden layers of ``hidden`` units; ``parametrization`` is that of ``clients.hypernet``. With an output encoding θ⁰
starts as PyTorch initialises the MLP.
"""

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clients.hypernet import Parametrization, hypernet
from fedsim.config import TaskConfig
from fedsim.data.dataset import Dataset
from fedsim.tasks.module import Size, cross_entropy, features, scores
from fedsim.types import Batch, Metrics, Task, Tree

SLOPE = 0.01


class Config(TaskConfig):
    model: Literal["conditional_mlp"] = "conditional_mlp"
    widths: Annotated[tuple[Size, ...], Field(strict=False, description="of the generated MLP's hidden layers")] = (
        64, 64, 64,
    )  # fmt: skip
    hidden: Annotated[tuple[Size, ...], Field(strict=False, description="of the hypernetwork")] = (16, 128)
    parametrization: Parametrization = "mip"


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for inputs that are not floating numbers."""
    widths = [features(dataset) - 1, *config.widths, dataset.classes]
    shapes: dict[str, torch.Size] = {}
    for i, (before, after) in enumerate(pairwise(widths)):
        shapes |= {f"fc{i}.weight": torch.Size([after, before]), f"fc{i}.bias": torch.Size([after])}
    net = hypernet(shapes, 1, config.hidden, config.parametrization, squash=False)
    dtype = getattr(torch, config.dtype)

    def init(generator: torch.Generator) -> Tree:
        theta: Tree = {}
        for i, before in enumerate(widths[:-1]):
            bound = 1 / math.sqrt(before)
            for name in (f"fc{i}.weight", f"fc{i}.bias"):
                empty = torch.empty(shapes[name], device=generator.device)
                theta[name] = empty.uniform_(-bound, bound, generator=generator).to(dtype)
        return net.init(generator, theta)

    def one(phi: Tree, x: Tensor) -> Tensor:
        """The logits of one example, (classes,)."""
        theta, a = net.generate(phi, x[-1:]), x[:-1]
        for i in range(len(widths) - 1):
            a = F.linear(a, theta[f"fc{i}.weight"], theta[f"fc{i}.bias"])
            a = F.leaky_relu(a, SLOPE) if i < len(widths) - 2 else a
        return a

    def predict(phi: Tree, x: Tensor) -> Tensor:
        return torch.vmap(one, in_dims=(None, 0))(phi, x.flatten(1))

    def loss(phi: Tree, batch: Batch) -> Tensor:
        return cross_entropy(predict(phi, batch.x), batch)

    def score(phi: Tree, batch: Batch) -> Metrics:
        return scores(predict(phi, batch.x), batch)

    return Task(init, predict, loss, score, dataset.classes, population)
