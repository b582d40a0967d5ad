"""`attack`: find one small change of an image that fools the clients' classifiers on average, by queries alone.

u in [0, 1]^d is the change δ = bound (2 u − 1), and a client's function is the margin of the right label,

    f_i(u) = logit_label(x + δ) − max_{other} logit(x + δ),      x + δ clipped to [0, 1]

F < 0 is success (``success``, 0 or 1). The first point, u = ½, changes nothing.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.config import TaskConfig
from fedsim.data.attack import HIDDEN
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.tasks.objective import constant, task
from fedsim.types import Metrics, Task


class Config(TaskConfig):
    model: Literal["attack"] = "attack"
    bound: float = Field(0.3, gt=0, le=1, description="the largest change of a pixel")


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for a data set that does not hold classifiers and an image."""
    classes, x = dataset.classes, dataset.train.x
    d, rest = divmod(x.shape[-1] - HIDDEN - HIDDEN * classes - classes - 1, HIDDEN + 1)
    if x.ndim != 2 or rest or d < 1 or not dataset.name.startswith("attack"):
        raise ConfigError(f"task.model: 'attack' needs the data set 'attack' (got {dataset.name})")
    sizes = [d * HIDDEN, HIDDEN, HIDDEN * classes, classes, d, 1]

    def value(u: Tensor, example: Tensor) -> Tensor:
        w1, b1, w2, b2, image, label = torch.split(example, sizes)
        changed = (image + config.bound * (2 * u - 1)).clamp(0, 1)
        logits = (changed @ w1.view(d, HIDDEN) + b1).relu() @ w2.view(HIDDEN, classes) + b2
        right = torch.arange(classes, device=u.device) == label
        return torch.where(right, logits, 0.0).sum() - torch.where(right, -torch.inf, logits).amax()

    def success(values: Tensor) -> Metrics:
        return {"success": (values.mean() < 0).to(values.dtype)}

    return task(value, d, constant(0.5), config, population, measure=success)
