"""Models as pure functions of their parameters, and what is measured on them.

A task plugin is a module with ``Config`` (a ``TaskConfig``, or a ``ModuleConfig`` for an ``nn.Module``) and
``build(config, dataset, population) -> Task``. A user's own model needs neither: ``model = "package.module:function"``
(or ``"mine.py:function"``) names a function that returns an ``nn.Module``.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.tasks.module import ModuleConfig, from_dataset
from fedsim.types import Task


def plugin(name: str, function: Callable[..., nn.Module]) -> SimpleNamespace:
    """A task plugin (``Config`` and ``build``) from a function, or a class, that gives an ``nn.Module``.

    Its arguments are the table ``[task.args]``; those that the function does not take, or misses, are config errors.
    Raises ``ConfigError`` for anything that cannot be called.
    """
    if not callable(function):
        raise ConfigError(f"'{name}' must be a function that returns an nn.Module (got {type(function).__name__})")

    class Config(ModuleConfig):
        args: dict[str, Any] = Field(default_factory=dict, description="arguments of the function")

        @model_validator(mode="after")
        def _fits(self) -> "Config":
            try:
                inspect.signature(function).bind(**self.args)
            except TypeError as e:
                raise ValueError(f"args: {name} {e}") from None
            return self

    def build(config: Config, dataset: Dataset, population: int) -> Task:
        return from_dataset(lambda: function(**config.args), config, dataset, population)

    return SimpleNamespace(Config=Config, build=build, __doc__=function.__doc__)
