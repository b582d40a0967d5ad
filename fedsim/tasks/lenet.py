"""The LeNet of the gradient inversion literature: sigmoids and strides, which give attackers their best case.

conv5×5/2 – conv5×5/2 – conv5×5/1, each of ``channels`` and followed by a sigmoid, then logits (Zhu, Liu and Han 2019,
arXiv:1906.08935, section 4). A positive control: an attack that fails on this model shows nothing by failing on others.
Weights are drawn uniformly from ±``spread``, as in that paper's code; PyTorch's own initialisation leaves a sigmoid
network with gradients too small to be matched.

Parameters, each with ``.weight`` and ``.bias``: ``conv1``, ``conv2``, ``conv3``, ``fc1``.
"""

from collections import OrderedDict
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fedsim.data.dataset import Dataset
from fedsim.tasks.module import ModuleConfig, Size, from_dataset, image
from fedsim.types import Task


class Config(ModuleConfig):
    model: Literal["lenet"] = "lenet"
    channels: Size = 12
    spread: float = Field(0.5, gt=0, description="weights and biases start uniform in ±spread")


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for inputs that are not images."""
    depth, height, width = image(dataset)
    rows, columns = ((side + 3) // 4 for side in (height, width))  # halved twice, rounding up

    def make() -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if dataset.train.x.ndim == 3:
            layers["image"] = nn.Unflatten(1, (1, height))
        c = config.channels
        for i, (before, stride) in enumerate(((depth, 2), (c, 2), (c, 1)), 1):
            layers[f"conv{i}"] = nn.Conv2d(before, c, 5, stride=stride, padding=2)
            layers[f"sigmoid{i}"] = nn.Sigmoid()
        layers |= OrderedDict(flat=nn.Flatten(), fc1=nn.Linear(c * rows * columns, dataset.classes))
        net = nn.Sequential(layers)
        for p in net.parameters():
            torch.nn.init.uniform_(p, -config.spread, config.spread)
        return net

    return from_dataset(make, config, dataset, population)
