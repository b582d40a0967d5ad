"""A multilayer perceptron with ReLU, on flattened inputs.

The default is the "2NN" of the FedAvg paper (McMahan et al. 2017, arXiv:1602.05629, section 3): two hidden layers of
200 units, 199,210 parameters for 28×28 inputs and ten classes. ``hidden = [128]`` is the small MLP of the benchmarks
(101,770 parameters).

Parameters: ``fc1.weight`` (hidden[0], features), ``fc1.bias``, …, the last pair gives the logits.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fedsim.data.dataset import Dataset
from fedsim.tasks.module import ModuleConfig, Size, features, from_dataset
from fedsim.types import Task


class Config(ModuleConfig):
    model: Literal["mlp"] = "mlp"
    hidden: Annotated[tuple[Size, ...], Field(strict=False, min_length=1, max_length=16)] = (200, 200)


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for inputs that are not floating numbers."""
    widths = [features(dataset), *config.hidden, dataset.classes]

    def make() -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flat=nn.Flatten())
        for i, (before, after) in enumerate(pairwise(widths), 1):
            layers[f"fc{i}"] = nn.Linear(before, after)
            if i < len(widths) - 1:
                layers[f"relu{i}"] = nn.ReLU()
        return nn.Sequential(layers)

    return from_dataset(make, config, dataset, population)
