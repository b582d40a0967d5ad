"""Multinomial logistic regression: logits = W x + b, with x flattened.

Parameters: ``linear.weight`` (classes, features), ``linear.bias`` (classes,). They start at zero, as is usual where
the loss is convex and no symmetry has to be broken: the loss before training is log(classes).
"""

from collections import OrderedDict
from typing import Literal

from torch import nn

from fedsim.data.dataset import Dataset
from fedsim.tasks.module import ModuleConfig, features, from_dataset
from fedsim.types import Task


class Config(ModuleConfig):
    model: Literal["logistic"] = "logistic"


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for inputs that are not floating numbers."""
    width = features(dataset)

    def make() -> nn.Module:
        linear = nn.Linear(width, dataset.classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(OrderedDict(flat=nn.Flatten(), linear=linear))

    return from_dataset(make, config, dataset, population)
