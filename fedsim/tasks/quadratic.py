"""`quadratic`: f_i(u) = 1/(10 d) (Σ_j α_ij z_j² + β_ij z_j + 1), z = 20 u − 10, with the factors of the data set.

The factors average to 1 over clients, so F(u) = 1/(10 d) (Σ_j z_j² + z_j + 1) whatever the heterogeneity; its minimum
is −1/40 + 1/(10 d) at u = 0.475.
"""

from typing import Literal

from torch import Tensor

from fedsim.config import TaskConfig
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.tasks.objective import task, uniform
from fedsim.types import Task


class Config(TaskConfig):
    model: Literal["quadratic"] = "quadratic"


def value(u: Tensor, factors: Tensor) -> Tensor:
    """f at u (d,) for factors (d, 2), shape ()."""
    z = 20 * u - 10
    return ((factors[:, 0] * z * z + factors[:, 1] * z).sum() + 1) / (10 * len(u))


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for a data set that does not hold factors."""
    shape = tuple(dataset.train.x.shape)
    if len(shape) != 3 or shape[2] != 2:
        raise ConfigError(f"task.model: 'quadratic' needs the data set 'quadratic' (got {dataset.name})")
    return task(value, shape[1], uniform, config, population)
