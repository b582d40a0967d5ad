"""The student of the data set `teacher`: an MLP inputs–hidden–hidden–3 that always begins with the same weights.

It plays the pre-trained model. Parameters, each with ``.weight`` and ``.bias``: ``fc1``, ``fc2``, ``head``.
"""

from typing import Literal

from fedsim.data import teacher
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.tasks.module import ModuleConfig, Size, features, from_dataset
from fedsim.types import Task


class Config(ModuleConfig):
    model: Literal["teacher"] = "teacher"
    hidden: Size = 64  # as in [data]


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for other data than the teacher's."""
    if dataset.name != "teacher":
        raise ConfigError(f"task.model: 'teacher' is the student of the data set 'teacher' (got {dataset.name})")
    width = features(dataset)
    return from_dataset(lambda: teacher.student(width, config.hidden), config, dataset, population)
