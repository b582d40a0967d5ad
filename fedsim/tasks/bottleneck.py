"""An adapter and a head behind a frozen backbone, whose features are the inputs (data set ``features``).

    z = norm(x)                                            LayerNorm without parameters
    z ← z + norm'(W_up ReLU(W_down z + b_down) + b_up)     the adapter: ``width`` units
    logits = head(z)

The adapter is that of HyperFL's ViT (Guo et al. 2025, arXiv:2412.07187), after Houlsby et al. 2019 (arXiv:1902.00751).
norm' has gain 0 at the start, so that training begins at the backbone as it is. ``trainable = "head"`` leaves the
adapter out: a linear probe. Parameters: ``down``, ``up``, ``norm``, ``head``, each with ``.weight`` and ``.bias``. With
a hypernetwork for all but the head (strategy ``hyperfl``) this is HyperFL-LPM.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data.dataset import Dataset
from fedsim.tasks.module import ModuleConfig, Size, features, from_dataset
from fedsim.types import Task


class Config(ModuleConfig):
    model: Literal["bottleneck"] = "bottleneck"
    width: Size = 16
    trainable: Literal["all", "head"] = "all"


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, classes: int, adapted: bool) -> None:
        super().__init__()
        self.inputs, self.adapted = inputs, adapted
        if adapted:
            self.down, self.up = nn.Linear(inputs, width), nn.Linear(width, inputs)
            self.norm = nn.LayerNorm(inputs)
            nn.init.zeros_(self.norm.weight)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        z = F.layer_norm(x.flatten(1), (self.inputs,))
        if self.adapted:
            z = z + self.norm(self.up(self.down(z).relu()))
        logits: Tensor = self.head(z)
        return logits


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for inputs that are not floating numbers."""
    inputs = features(dataset)

    def make() -> nn.Module:
        return _Bottleneck(inputs, config.width, dataset.classes, config.trainable == "all")

    return from_dataset(make, config, dataset, population)
