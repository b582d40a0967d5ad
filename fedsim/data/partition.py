"""Partitions of our own: `iid`, `natural_id`, and `sampled`, which has as many clients as one likes.

A partitioner is an object with ``Config`` and ``build(config, dataset, key) -> Partition``. All randomness comes from
``key``; a request that cannot be met is a ``DataError`` that names the option and the constraint.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from fedsim.config import PartitionConfig
from fedsim.data.dataset import Dataset, Indices, Partition
from fedsim.errors import DataError
from fedsim.rng import Key

# Far beyond any use: shares are then equal to a part in a thousand. At 1e308 their sum would overflow, and the shares
# would all be 0.
MAX_ALPHA = 1e6


class Partitioner(NamedTuple):
    """What an entry point of ``fedsim.partitioners`` gives; a module with the same two names does as well."""

    Config: type[PartitionConfig]
    build: Callable[[Any, Dataset, Key], Partition]


class Lists:
    """Clients' examples written out: client ``i`` holds ``order[bounds[i]:bounds[i + 1]]``."""

    def __init__(self, clients: Sequence[Indices]) -> None:
        self._order = np.concatenate([np.sort(np.asarray(c, dtype=np.int64)) for c in clients])
        self._bounds = np.concatenate([[0], np.cumsum([len(c) for c in clients])])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, client: int) -> Indices:
        within(client, len(self))
        return self._order[self._bounds[client] : self._bounds[client + 1]]

    def size(self, client: int) -> int:
        within(client, len(self))
        return int(self._bounds[client + 1] - self._bounds[client])


def within(client: int, clients: int) -> None:
    """A partition is a sequence: an index outside it is an ``IndexError``, which also ends ``for c in partition``."""
    if not 0 <= client < clients:
        raise IndexError(f"client {client} of {clients}")


def enough(clients: int, examples: int) -> None:
    """Every client needs an example. Raises ``DataError``."""
    if clients > examples:
        raise DataError(f"data.partition.clients: {clients} clients for {examples} examples")


def labels(partitioner: str, dataset: Dataset) -> Indices:
    """The label of each training example, (N,). Raises ``DataError`` for a data set that has sequences of labels."""
    if dataset.train.y.ndim != 1:
        shape = tuple(dataset.train.y.shape)
        raise DataError(f"data.partition.name: {partitioner} needs one label an example; {dataset.name} has {shape}")
    return dataset.train.y.numpy().astype(np.int64)


class IidConfig(PartitionConfig):
    """Equal shares of a random permutation."""

    name: Literal["iid"] = "iid"
    clients: int = Field(100, ge=1)


class Iid:
    """Client ``i`` of ``c`` holds the ``i``-th of ``c`` slices of one permutation; sizes differ by at most 1."""

    def __init__(self, clients: int, order: Indices) -> None:
        self._clients, self._order = clients, order

    def __len__(self) -> int:
        return self._clients

    def __getitem__(self, client: int) -> Indices:
        within(client, self._clients)
        n = len(self._order)
        return np.sort(self._order[client * n // self._clients : (client + 1) * n // self._clients])

    def size(self, client: int) -> int:
        within(client, self._clients)
        n = len(self._order)
        return (client + 1) * n // self._clients - client * n // self._clients


def _iid(config: IidConfig, dataset: Dataset, key: Key) -> Partition:
    enough(config.clients, len(dataset.train.y))
    return Iid(config.clients, key.numpy().permutation(len(dataset.train.y)))


class SampledConfig(PartitionConfig):
    """A population of any size over one data set: clients' examples overlap, those within a client do not."""

    name: Literal["sampled"] = "sampled"
    clients: int = Field(1000, ge=1, le=10**9)
    size: int = Field(20, ge=1, description="examples of each client")
    alpha: float | None = Field(
        None, gt=0, le=MAX_ALPHA, description="label skew: each client's label shares are Dirichlet(alpha)"
    )


class Sampled:
    """Client ``i`` holds ``size`` distinct examples drawn by the stream ``key.at(i)``. Nothing is set up per client.

    With ``alpha``: label shares p ~ Dirichlet(alpha, …, alpha), label counts ~ Multinomial(size, p). What a label
    cannot give is drawn from the examples that are left of the others.
    """

    overlaps = True

    def __init__(self, clients: int, size: int, examples: int, alpha: float | None, pools: Sequence[Indices], key: Key):
        self._clients, self._size, self._examples, self._alpha, self._key = clients, size, examples, alpha, key
        self._pools, self._room = pools, np.array([len(p) for p in pools], dtype=np.int64)

    def __len__(self) -> int:
        return self._clients

    def __getitem__(self, client: int) -> Indices:
        within(client, self._clients)
        rng = self._key.at(int(client)).numpy()
        if self._alpha is None:
            return np.sort(rng.choice(self._examples, self._size, replace=False, shuffle=False))
        shares = rng.dirichlet(np.full(len(self._pools), self._alpha))
        counts = rng.multinomial(self._size, shares)
        given = np.minimum(counts, self._room)
        given += rng.multivariate_hypergeometric(self._room - given, self._size - given.sum(), method="marginals")
        parts = [pool[rng.choice(len(pool), k, replace=False)] for pool, k in zip(self._pools, given) if k]
        return np.sort(np.concatenate(parts))

    def size(self, client: int) -> int:
        within(client, self._clients)
        return self._size


def _sampled(config: SampledConfig, dataset: Dataset, key: Key) -> Partition:
    n = len(dataset.train.y)
    if config.size > n:
        raise DataError(f"data.partition.size: {config.size} distinct examples a client from {n} examples")
    pools: list[Indices] = []
    if config.alpha is not None:
        label = labels("sampled with alpha", dataset)
        pools = [np.flatnonzero(label == c) for c in np.unique(label)]
    return Sampled(config.clients, config.size, n, config.alpha, pools, key)


class NaturalIdConfig(PartitionConfig):
    """One client for each natural owner in the data (a hospital, a play's character), in the order of their names."""

    name: Literal["natural_id"] = "natural_id"
    min_partition_size: int = Field(1, ge=1, description="owners with fewer examples are left out")


def owners(partitioner: str, dataset: Dataset) -> np.ndarray[Any, np.dtype[np.str_]]:
    """The natural owner of each training example, (N,). Raises ``DataError`` where the data set has none."""
    if dataset.train.client is None:
        raise DataError(f"data.partition.name: {partitioner} needs natural clients, and {dataset.name} has none")
    return dataset.train.client


def _natural_id(config: NaturalIdConfig, dataset: Dataset, key: Key) -> Partition:
    names, owner, sizes = np.unique(owners("natural_id", dataset), return_inverse=True, return_counts=True)
    groups = np.split(np.argsort(owner, kind="stable"), np.cumsum(sizes)[:-1])
    kept = [g for g in groups if len(g) >= config.min_partition_size]
    if not kept:
        raise DataError(
            f"data.partition.min_partition_size: {config.min_partition_size}, and the largest of {len(names)} natural"
            f" clients has {sizes.max()} examples"
        )
    return Lists(kept)


iid = Partitioner(IidConfig, _iid)
sampled = Partitioner(SampledConfig, _sampled)
natural_id = Partitioner(NaturalIdConfig, _natural_id)
