"""ResNet-18 (He et al. 2016, arXiv:1512.03385) with GroupNorm, for small images.

Batch normalisation has state and mixes examples, which breaks where clients differ (Hsieh et al. 2020,
arXiv:1910.00189); group normalisation (Wu & He 2018, arXiv:1803.08494) takes its place, with two groups as is usual in
federated work. The stem is CIFAR's: a 3×3 convolution of stride 1 and no pooling. With ``width = 64`` and ten classes
on 3-channel images: 11,173,962 parameters.

Parameters: ``stem.weight``, ``norm.*``, ``stage{1..4}.{0,1}.{conv1,norm1,conv2,norm2}.*``, ``fc.*``, and
``shortcut.{conv,norm}.*`` in the first block of stages 2 to 4. Convolutions have no bias. Inputs are (N, H, W) or
(N, C, H, W).
"""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.tasks.module import ModuleConfig, Size, from_dataset, image
from fedsim.types import Task


class Config(ModuleConfig):
    model: Literal["resnet18"] = "resnet18"
    width: Size = 64  # channels of the first stage; each further stage has twice as many
    groups: Size = 2  # of every GroupNorm


class _Block(nn.Module):
    """Two 3×3 convolutions around a shortcut: relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))."""

    def __init__(self, before: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            projection = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=nn.GroupNorm(groups, after)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        out: Tensor = self.shortcut(x) + self.norm2(self.conv2(y))
        return out.relu()


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for inputs that are not images, or a width that the groups do not divide."""
    depth, height, _ = image(dataset)
    width, groups = config.width, config.groups
    if width % groups:
        raise ConfigError(f"task.groups: must divide task.width, {width} (got {groups})")

    def make() -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if dataset.train.x.ndim == 3:
            layers["image"] = nn.Unflatten(1, (1, height))
        layers["stem"] = nn.Conv2d(depth, width, 3, padding=1, bias=False)
        layers["norm"] = nn.GroupNorm(groups, width)
        layers["relu"] = nn.ReLU()
        before = width
        for stage, stride in enumerate((1, 2, 2, 2), 1):
            after = width << (stage - 1)
            layers[f"stage{stage}"] = nn.Sequential(
                _Block(before, after, stride, groups), _Block(after, after, 1, groups)
            )
            before = after
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flat"] = nn.Flatten()
        layers["fc"] = nn.Linear(before, dataset.classes)
        return nn.Sequential(layers)

    return from_dataset(make, config, dataset, population)
