"""Any strategy of Flower's, named in the config with its arguments.

    [strategy]
    name = "flwr.serverapp.strategy:FedAdam"
    args = { eta = 0.01, tau = 1e-3 }
    cohort = 10                                  # and what the clients do: lr, epochs, batch_size …

The clients do local SGD, and honour the "proximal-mu" that Flower's FedProx sends them. An argument that is itself a
strategy (Flower's privacy wrappers take one) is written as a table with ``name`` and ``args``.
"""

import inspect
from typing import Any

from flwr.serverapp.strategy import Strategy as FlowerStrategy
from pydantic import Field, model_validator

from clients.sgd import SgdConfig
from fedsim import Task
from fedsim.errors import ConfigError
from server.foreign import Foreign


class Settings(SgdConfig):
    """What a Flower strategy and its clients are told."""

    args: dict[str, Any] = Field(default_factory=dict, description="the strategy's own arguments")

    @model_validator(mode="after")
    def _flowers_own(self) -> "Settings":
        if self.weighting != "examples":
            raise ValueError(
                f"weighting: must be 'examples', by which Flower's averages weigh (got '{self.weighting}')"
            )
        return self


class Plugin:
    """What the registry gives for a class: a plugin with ``Config`` and ``build``."""

    Config = Settings

    def __init__(self, cls: type[FlowerStrategy]) -> None:
        self._cls, self.__doc__ = cls, cls.__doc__

    def build(self, config: Settings, task: Task) -> Foreign:
        return Foreign(self._cls, config.args, config.cohort, config)


def plugin(name: str, cls: type) -> Plugin:
    """A class as a strategy plugin. Raises ``ConfigError`` for a class that is not one of Flower's strategies."""
    if not issubclass(cls, FlowerStrategy) or inspect.isabstract(cls):
        raise ConfigError(f"'{name}' is not a strategy: neither a module with Config and build, nor a Flower Strategy")
    return Plugin(cls)
