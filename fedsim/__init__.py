"""Federated-learning simulation on Flower. Public names are those in ``__all__``; the rest may change."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim import tree
    from fedsim.config import DatasetConfig, Experiment, PartitionConfig, StrategyConfig, TaskConfig
    from fedsim.data.dataset import Dataset, Partition, Split
    from fedsim.errors import ConfigError, DataError
    from fedsim.rng import Key
    from fedsim.types import (
        Batch,
        Done,
        Local,
        Mean,
        Metrics,
        Pass,
        Payload,
        Phase,
        Reducer,
        Report,
        Schedule,
        Strategy,
        Task,
        Tree,
        Visit,
    )

__version__ = "0.1.0"

__all__ = [
    "Batch", "ConfigError", "DataError", "Dataset", "DatasetConfig", "Done", "Experiment", "Key", "Local", "Mean",
    "Metrics", "Partition", "PartitionConfig", "Pass", "Payload", "Phase", "Reducer", "Report", "Schedule", "Split",
    "Strategy", "StrategyConfig", "Task", "TaskConfig", "Tree", "Visit", "__version__", "tree",
]  # fmt: skip

_HOME = {
    "Experiment": "config", "DatasetConfig": "config", "PartitionConfig": "config", "StrategyConfig": "config",
    "TaskConfig": "config", "Dataset": "data.dataset", "Partition": "data.dataset", "Split": "data.dataset",
    "ConfigError": "errors", "DataError": "errors", "Key": "rng",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are loaded when they are asked for: the command line must answer without importing torch."""
    if name == "tree":
        return importlib.import_module("fedsim.tree")
    if name in __all__:
        return getattr(importlib.import_module(f"fedsim.{_HOME.get(name, 'types')}"), name)
    raise AttributeError(f"module 'fedsim' has no attribute '{name}'")
