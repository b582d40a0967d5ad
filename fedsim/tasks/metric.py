"""`metric`: raise a metric that has no useful gradient, by changing a trained classifier's parameters a little.

u in [0, 1]^d changes the parameters by bound (2 u − 1); a client's function is 1 − metric of the classifier on its own
examples, the plain mean over the classes that occur among labels or predictions (scikit-learn's "macro", with 0 for
0/0). Precision, recall, F1 and Jaccard are TP/(TP + FP), TP/(TP + FN), 2TP/(2TP + FP + FN) and TP/(TP + FP + FN).
The first point, u = ½, is the classifier as it was trained.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.config import TaskConfig
from fedsim.data.dataset import Dataset
from fedsim.data.metric import layers, logits
from fedsim.errors import ConfigError
from fedsim.tasks.objective import constant, task
from fedsim.types import Task


class Config(TaskConfig):
    model: Literal["metric"] = "metric"
    metric: Literal["f1", "precision", "recall", "jaccard"] = "f1"
    bound: float = Field(0.2, gt=0, description="the largest change of a parameter")


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for a data set that does not hold tables of examples."""
    x, classes = dataset.train.x, dataset.classes
    if x.ndim != 3 or not dataset.name.startswith("metric"):
        raise ConfigError(f"task.model: 'metric' needs the data set 'metric' (got {dataset.name})")
    width = x.shape[2]
    d = sum((a + 1) * b for a, b in layers(width - 2, classes))
    head = -(-d // width)

    def value(u: Tensor, example: Tensor) -> Tensor:
        trained, table = example[:head].reshape(-1)[:d], example[head:]
        guess = logits(trained + config.bound * (2 * u - 1), table[:, :-2], classes).argmax(-1)
        every, on = torch.arange(classes, device=u.device), table[:, -1:]
        said, true = (guess[:, None] == every) * on, (table[:, -2:-1] == every) * on
        hit, wrong, missed = (said * true).sum(0), (said * (1 - true)).sum(0), ((1 - said) * true).sum(0)
        return 1 - macro(config.metric, hit, wrong, missed)

    return task(value, d, constant(0.5), config, population)


def macro(metric: str, hit: Tensor, wrong: Tensor, missed: Tensor) -> Tensor:
    """The mean over classes of a metric of counts (C,), shape ()."""
    total = {"precision": hit + wrong, "recall": hit + missed, "jaccard": hit + wrong + missed}
    top, bottom = (2 * hit, 2 * hit + wrong + missed) if metric == "f1" else (hit, total[metric])
    occurs = (hit + wrong + missed) > 0
    return torch.where(occurs, top / bottom.clamp(min=1), 0.0).sum() / occurs.sum().clamp(min=1)
