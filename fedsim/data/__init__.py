"""Data sets, and how they are partitioned over clients.

A data set plugin is a module or object with ``Config`` (a ``DatasetConfig``) and ``build(config) -> Dataset``; a
partitioner has ``Config`` (a ``PartitionConfig``) and ``build(config, dataset, key) -> Partition``. Ours are entry
points of ``fedsim.datasets`` and ``fedsim.partitioners``. Your own data needs no entry point: with this in ``mine.py``,
beside the experiment, ``[data] name = "mine.py:scans"`` loads it (more: docs/your-own.md)::

    from fedsim import Dataset, DatasetConfig, Split

    class Config(DatasetConfig):
        folder: str = "scans"

    class scans:
        Config = Config

        @staticmethod
        def build(config: Config) -> Dataset: ...
"""

import numpy as np

from fedsim import errors, registry
from fedsim.config import DataConfig
from fedsim.data.dataset import Dataset, Federation, Partition, drawn, validate
from fedsim.errors import DataError, FedsimError
from fedsim.rng import Key

# A partition may be lazy and have a million clients, so a mistake of its author is looked for in a few of them.
SPOT_CHECKS = 256


def federation(config: DataConfig, seed: int) -> Federation:
    """The data set of ``[data]``, partitioned by the stream "partition" of ``seed``.

    Raises ``DataError``: the data is not here, is broken, or cannot be partitioned as asked.
    """
    dataset = validate(registry.build("datasets", config.dataset.name, "data.name", config.dataset))
    key = Key.root(seed).at("partition")
    partition = registry.build(
        "partitioners", config.partition.name, "data.partition.name", config.partition, dataset, key
    )
    _check(config.partition.name, partition, dataset)
    return Federation(dataset, partition, config.holdout, Key.root(seed).at("data"))


def _check(name: str, partition: Partition, dataset: Dataset) -> None:
    """Refuse what is no partition, one without clients, and clients (a few are looked at) with nothing or nonsense."""
    where = f"data.partition.name: {name}"
    if not (hasattr(partition, "__len__") and hasattr(partition, "__getitem__")):
        raise DataError(f"{where} must build a Partition, with len() and [client] (got {type(partition).__name__})")
    clients, examples = len(partition), len(dataset.train.y)
    if clients == 0:
        raise DataError(f"{where} made no client")
    for client in np.unique(np.linspace(0, clients - 1, SPOT_CHECKS, dtype=np.int64)).tolist():
        try:
            indices = drawn(partition, client, name)
            size = getattr(partition, "size", None)
            said = size(client) if callable(size) else len(indices)
        except FedsimError:
            raise
        except Exception as e:
            what = f"{type(e).__name__}: {' '.join(str(e).split())}"
            raise DataError(f"{where} fails for client {client} of {clients}: {what} ({errors.where(e)})") from e
        if len(indices) == 0:
            raise DataError(f"{where} leaves client {client} of {clients} without examples")
        if indices.min() < 0 or indices.max() >= examples:
            raise DataError(f"{where} gives client {client} examples outside 0..{examples - 1}")
        if len(np.unique(indices)) != len(indices):
            raise DataError(f"{where} gives client {client} an example twice")
        if said != len(indices):
            raise DataError(f"{where} gives client {client} {len(indices)} examples, and size({client}) is {said}")
