"""The two-convolution CNN of the FedAvg and LEAF line.

conv5×5 – maxpool2 – ReLU – conv5×5 – maxpool2 – ReLU – fully connected – ReLU – logits (McMahan et al. 2017,
arXiv:1602.05629, section 3; LEAF, Caldas et al. 2018, arXiv:1812.01097, has the same with 2048 hidden units). The
default, 32 and 64 channels and 512 hidden units, has the paper's 1,663,370 parameters for 28×28 inputs and ten
classes. ReLU stands after the pooling, where it has a quarter of the work: it can be exchanged with the maximum.

``padding = "same"`` (the default, and what that count implies) keeps the size in each convolution, so inputs from
4×4 on will do: 8×8 digits, 28×28, 32×32×3. ``"valid"`` pads nothing and needs 16×16; with ``channels = [16, 32]`` and
``hidden = 64`` it is the small CNN of the benchmarks (46,730 parameters for 28×28).

Parameters, each with ``.weight`` and ``.bias``: ``conv1``, ``conv2``, ``fc1``, ``fc2``. Inputs are (N, H, W) or
(N, C, H, W).
"""

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.tasks.module import ModuleConfig, Size, from_dataset, image
from fedsim.types import Task


class Config(ModuleConfig):
    model: Literal["cnn"] = "cnn"
    channels: Annotated[tuple[Size, Size], Field(strict=False, description="of the two convolutions")] = (32, 64)
    hidden: Size = 512
    padding: Literal["same", "valid"] = "same"


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for inputs that are not images, or too small for two poolings."""
    depth, height, width = image(dataset)
    lost = 0 if config.padding == "same" else 4  # what a 5×5 convolution takes off each side length
    rows, columns = (((side - lost) // 2 - lost) // 2 for side in (height, width))
    if rows < 1 or columns < 1:
        least = "4×4" if config.padding == "same" else '16×16, or padding = "same"'
        raise ConfigError(f"task.padding: '{config.padding}' needs images of at least {least} (got {height}×{width})")
    first, second = config.channels

    def make() -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if dataset.train.x.ndim == 3:
            layers["image"] = nn.Unflatten(1, (1, height))
        layers |= OrderedDict(
            conv1=nn.Conv2d(depth, first, 5, padding=config.padding),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, 5, padding=config.padding),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            fc1=nn.Linear(second * rows * columns, config.hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(config.hidden, dataset.classes),
        )
        return nn.Sequential(layers)

    return from_dataset(make, config, dataset, population)
