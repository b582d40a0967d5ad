"""The partitioners of flwr-datasets, under their own names and with their own options.

The classes only ever see two columns, the label (or owner, or measure) of each example and its index, so nothing is
copied. As ``flwr_datasets.FederatedDataset`` does, the examples are shuffled first: `size`, `linear`, `square` and
`exponential` cut consecutive runs, which would otherwise follow the order of the file. Their seed and the shuffle come
from the partition's key. Requests that they would answer with a traceback, an endless count or an empty client are a
``DataError`` here, and every result is checked: no example is held twice, no client is empty.

`iid` and `natural_id` are ours (fedsim/data/partition.py): theirs hold a Python list for every client, and print a
progress bar. The vertical partitioners split features, not examples, and are no partition of ours.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Mapping
from hashlib import blake2b
from importlib.metadata import version
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedsim import files
from fedsim.config import PartitionConfig
from fedsim.data import fetch
from fedsim.data.dataset import Dataset, Indices, Partition
from fedsim.data.partition import MAX_ALPHA, Lists, Partitioner, enough, labels, owners
from fedsim.errors import DataError
from fedsim.rng import Key

Column = npt.NDArray[Any]
Count = Annotated[int, Field(ge=1)]

KEPT = 256  # splits on disk, the newest


def _split(
    cls: str, config: PartitionConfig, arguments: Mapping[str, Any], column: Column, key: Key, *, whole: bool = True
) -> Partition:
    """The partition that ``flwr_datasets.partitioner.<cls>(**arguments)`` makes of ``column``, (N,).

    ``whole``: every example must be held by a client. Raises ``DataError`` with the library's own reason.
    """
    n = len(column)
    try:
        clients = _kept(cls, arguments, column, key)
    except (ValueError, IndexError, KeyError, TypeError, AssertionError, ZeroDivisionError, OverflowError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise DataError(f"data.partition: {config.name} cannot split {n} examples: {reason}") from None
    empty = [i for i, held in enumerate(clients) if len(held) == 0]
    if empty or not clients:
        raise DataError(
            f"data.partition.clients: {config.name} leaves {len(empty)} of {len(clients)} clients without examples"
            f" (first: client {empty[0] if empty else 0}); {n} examples are too few for these options"
        )
    held = np.bincount(np.concatenate(clients), minlength=n)
    if held.max() > 1 or (whole and held.min() < 1):
        raise DataError(f"data.partition: {config.name} does not give each of {n} examples to one client")
    return Lists(clients)


def _kept(cls: str, arguments: Mapping[str, Any], column: Column, key: Key) -> list[Indices]:
    """The examples of each client, from a file where the same split was made before.

    The library takes 2 s to load, and makes a thousand clients in another: of each run, and of each node.
    """
    what = repr((version("flwr-datasets"), cls, sorted(arguments.items()), key.digest, column.dtype.str, len(column)))
    digest = blake2b(what.encode() + (repr(column.tolist()).encode() if column.dtype == object else column.tobytes()))
    file = fetch.folder() / "partitions" / f"{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(io.BytesIO(file.read_bytes())) as found:
            return list(np.split(found["rows"], found["cuts"]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        clients = _drawn(cls, arguments, column, key)
    cuts = np.cumsum([len(c) for c in clients[:-1]], dtype=np.int64)
    with contextlib.suppress(OSError):  # a machine that does not let us write draws again
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.contribute(file) as made:
            np.savez_compressed(made, rows=np.concatenate(clients), cuts=cuts)
        for old in sorted(file.parent.glob("*.npz"), key=os.path.getmtime)[:-KEPT]:
            old.unlink()
    return clients


def _drawn(cls: str, arguments: Mapping[str, Any], column: Column, key: Key) -> list[Indices]:
    """The examples of each client, by the library."""
    import datasets
    from flwr_datasets import partitioner as library

    order = key.at("shuffle").numpy().permutation(len(column))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library warns about is checked later, or is what was asked for
        split = getattr(library, cls)(**arguments)
        split.dataset = datasets.Dataset.from_dict({"index": order, "column": column[order]})
        return _clients(split, order)


def _clients(split: Any, order: Indices) -> list[Indices]:
    """The examples of each client."""
    n = split.num_partitions
    split.load_partition(0)  # has the partition made
    # The Dirichlet partitioner keeps its rows as they are. By its public method each client costs a new Arrow table:
    # seconds, for a thousand of them.
    rows = getattr(split, "_partition_id_to_indices", None) if type(split).__name__ == "DirichletPartitioner" else None
    if isinstance(rows, dict) and rows.keys() == set(range(n)):
        return [order[np.asarray(rows[i], np.int64)] for i in range(n)]
    return [np.asarray(split.load_partition(i)["index"][:], np.int64) for i in range(n)]


def _seed(key: Key) -> int:
    return int(key.at("seed").numpy().integers(1 << 32))


def _codes(partitioner: str, dataset: Dataset) -> Indices:
    """Labels as 0..K-1: a label that no training example has would upset the library."""
    return np.unique(labels(partitioner, dataset), return_inverse=True)[1].astype(np.int64)


class DirichletConfig(PartitionConfig):
    """Label skew: of each label, the clients get shares drawn from Dirichlet(alpha) (Yurochkin et al. 2019)."""

    name: Literal["dirichlet"] = "dirichlet"
    clients: int = Field(100, ge=1)
    alpha: float = Field(0.5, gt=0, le=MAX_ALPHA, description="small: few labels a client; large: all alike")
    min_partition_size: int = Field(
        1, ge=1, description="drawn again, 11 times at most, until every client has so many"
    )
    self_balancing: bool = Field(False, description="a client with more than the average gets no further label")


def _dirichlet(config: DirichletConfig, dataset: Dataset, key: Key) -> Partition:
    column, n = _codes("dirichlet", dataset), len(dataset.train.y)
    enough(config.clients, n)
    needed = config.clients * config.min_partition_size
    if needed > n:
        raise DataError(
            f"data.partition.min_partition_size: {config.clients} clients of at least {config.min_partition_size} need"
            f" {needed} examples, and there are {n}"
        )
    arguments = {
        "num_partitions": config.clients,
        "partition_by": "column",
        "alpha": float(config.alpha),
        "min_partition_size": config.min_partition_size,
        "self_balancing": config.self_balancing,
        "seed": _seed(key),
    }
    try:
        return _split("DirichletPartitioner", config, arguments, column, key)
    except DataError as e:
        if "max number of attempts" not in str(e):
            raise
        raise DataError(
            f"data.partition.alpha: {config.alpha} over {config.clients} clients left a client with fewer than"
            f" {config.min_partition_size} of {n} examples in each of 11 draws; raise alpha, take fewer clients,"
            " or use the partition 'sampled', whose clients all have one size"
        ) from None


class InnerDirichletConfig(PartitionConfig):
    """Given sizes, and in each client label shares drawn from Dirichlet(alpha) (Acar et al. 2021)."""

    name: Literal["inner_dirichlet"] = "inner_dirichlet"
    partition_sizes: list[Count] = Field(min_length=1, description="examples of each client")
    alpha: float = Field(0.5, gt=0, le=MAX_ALPHA)


def _fits(sizes: list[int], n: int) -> None:
    if sum(sizes) > n:
        raise DataError(f"data.partition.partition_sizes: they sum to {sum(sizes)}, and there are {n} examples")


def _inner_dirichlet(config: InnerDirichletConfig, dataset: Dataset, key: Key) -> Partition:
    column, n = _codes("inner_dirichlet", dataset), len(dataset.train.y)
    _fits(config.partition_sizes, n)
    arguments = {
        "partition_sizes": config.partition_sizes,
        "partition_by": "column",
        "alpha": float(config.alpha),
        "seed": _seed(key),
    }
    try:
        return _split("InnerDirichletPartitioner", config, arguments, column, key, whole=False)
    except DataError as e:
        if "NaN" not in str(e) and "nan" not in str(e):
            raise
        raise DataError(
            f"data.partition.alpha: {config.alpha} asks for labels that have run out ({sum(config.partition_sizes)} of"
            f" {n} examples are to be used); raise alpha, or use fewer examples"
        ) from None


class DistributionConfig(PartitionConfig):
    """Neighbouring labels a client, in amounts by a table (the power law of Li et al. 2020)."""

    name: Literal["distribution"] = "distribution"
    clients: int = Field(ge=1, description="a multiple of the number of labels")
    distribution_array: list[list[Annotated[float, Field(ge=0)]]] = Field(
        min_length=1, description="labels x (num_unique_labels_per_partition * clients / labels)"
    )
    num_unique_labels_per_partition: int = Field(2, ge=1)
    preassigned_num_samples_per_label: int = Field(5, ge=0)
    rescale: bool = True


def _distribution(config: DistributionConfig, dataset: Dataset, key: Key) -> Partition:
    column, n = _codes("distribution", dataset), len(dataset.train.y)
    enough(config.clients, n)
    widths = {len(row) for row in config.distribution_array}
    if len(widths) != 1:
        raise DataError(f"data.partition.distribution_array: rows of {sorted(widths)} numbers, which is not a table")
    if config.rescale and not all(sum(row) > 0 for row in config.distribution_array):
        raise DataError("data.partition.distribution_array: a row sums to 0, so its label would go to nobody")
    arguments = {
        "distribution_array": np.array(config.distribution_array, dtype=np.float64),
        "num_partitions": config.clients,
        "num_unique_labels_per_partition": config.num_unique_labels_per_partition,
        "partition_by": "column",
        "preassigned_num_samples_per_label": config.preassigned_num_samples_per_label,
        "rescale": config.rescale,
        "seed": _seed(key),
    }
    return _split("DistributionPartitioner", config, arguments, column, key, whole=config.rescale)


class LinearConfig(PartitionConfig):
    """Client k of 1..K has a share of the examples in proportion to k."""

    name: Literal["linear"] = "linear"
    clients: int = Field(10, ge=1)


class SquareConfig(PartitionConfig):
    """Client k of 1..K has a share of the examples in proportion to k²."""

    name: Literal["square"] = "square"
    clients: int = Field(10, ge=1)


class ExponentialConfig(PartitionConfig):
    """Client k of 1..K has a share of the examples in proportion to exp(k)."""

    name: Literal["exponential"] = "exponential"
    clients: int = Field(5, ge=1)


def _growing(cls: str, growth: str) -> Callable[[Any, Dataset, Key], Partition]:
    def build(config: Any, dataset: Dataset, key: Key) -> Partition:
        n = len(dataset.train.y)
        enough(config.clients, n)
        try:
            return _split(cls, config, {"num_partitions": config.clients}, np.zeros(n, np.int64), key)
        except DataError:
            raise DataError(
                f"data.partition.clients: {config.clients} clients with sizes that grow as {growth} leave the smallest"
                f" without any of {n} examples; take fewer clients"
            ) from None

    return build


class SizeConfig(PartitionConfig):
    """Given sizes; examples beyond their sum stay unused."""

    name: Literal["size"] = "size"
    partition_sizes: list[Count] = Field(min_length=1, description="examples of each client")


def _size(config: SizeConfig, dataset: Dataset, key: Key) -> Partition:
    n = len(dataset.train.y)
    _fits(config.partition_sizes, n)
    arguments = {"partition_sizes": config.partition_sizes}
    return _split("SizePartitioner", config, arguments, np.zeros(n, np.int64), key, whole=False)


class ShardConfig(PartitionConfig):
    """Examples sorted by label and cut into shards; each client gets some of them (McMahan et al. 2017: two each)."""

    name: Literal["shard"] = "shard"
    clients: int = Field(100, ge=1)
    num_shards_per_partition: int | None = Field(None, ge=1)
    shard_size: int | None = Field(None, ge=1)
    keep_incomplete_shard: bool | None = Field(
        None, description="where shards do not divide the data: true gives the rest to a client, false leaves it out"
    )


def _shard(config: ShardConfig, dataset: Dataset, key: Key) -> Partition:
    column, n = _codes("shard", dataset), len(dataset.train.y)
    enough(config.clients, n)
    shards, size = config.num_shards_per_partition, config.shard_size
    if shards is None and size is None:
        raise DataError("data.partition.num_shards_per_partition: give it, or shard_size, or both")
    if shards is not None:
        count = config.clients * shards
        needed = count * (size or 1)
        if needed > n:
            raise DataError(
                f"data.partition.num_shards_per_partition: {config.clients} clients of {shards} shards of"
                f" {size or 'at least 1'} need {needed} examples, and there are {n}"
            )
        # With both given it is plain how many examples are used; with one, all of them are meant to be.
        rest = 0 if size is not None else n % count
        cut = f"{count} equal shards"
    else:
        assert size is not None
        if n // size < config.clients:
            raise DataError(f"data.partition.shard_size: {n} examples are {n // size} shards of {size}"
                            f" for {config.clients} clients")  # fmt: skip
        rest, cut = n % size, f"shards of {size}"
    if rest and config.keep_incomplete_shard is None:
        raise DataError(
            f"data.partition.keep_incomplete_shard: {n} examples do not divide into {cut} ({rest} are left over);"
            " set it to false to leave them out, or choose other numbers"
        )
    if rest and config.keep_incomplete_shard and shards is not None:
        raise DataError(
            "data.partition.keep_incomplete_shard: needs shard_size without num_shards_per_partition, since the"
            " incomplete shard would be one too many"
        )
    arguments = {
        "num_partitions": config.clients,
        "partition_by": "column",
        "num_shards_per_partition": shards,
        "shard_size": size,
        "keep_incomplete_shard": bool(config.keep_incomplete_shard),
        "seed": _seed(key),
    }
    whole = bool(config.keep_incomplete_shard) or (rest == 0 and size is None)
    return _split("ShardPartitioner", config, arguments, column, key, whole=whole)


class PathologicalConfig(PartitionConfig):
    """Each client has examples of exactly so many labels. A label that no client was given stays unused."""

    name: Literal["pathological"] = "pathological"
    clients: int = Field(100, ge=1)
    num_classes_per_partition: int = Field(2, ge=1)
    class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = "random"


def _pathological(config: PathologicalConfig, dataset: Dataset, key: Key) -> Partition:
    column, n = _codes("pathological", dataset), len(dataset.train.y)
    enough(config.clients, n)
    if config.num_classes_per_partition > column.max() + 1:
        raise DataError(
            f"data.partition.num_classes_per_partition: {config.num_classes_per_partition}, and {dataset.name} has"
            f" {column.max() + 1} labels"
        )
    needed = config.clients * config.num_classes_per_partition
    if needed > n:
        raise DataError(
            f"data.partition.num_classes_per_partition: {config.clients} clients of"
            f" {config.num_classes_per_partition} labels need {needed} examples, and there are {n}"
        )
    arguments = {
        "num_partitions": config.clients,
        "partition_by": "column",
        "num_classes_per_partition": config.num_classes_per_partition,
        "class_assignment_mode": config.class_assignment_mode,
        "seed": _seed(key),
    }
    return _split("PathologicalPartitioner", config, arguments, column, key, whole=False)


class GroupedNaturalIdConfig(PartitionConfig):
    """Natural owners put together, so many a client. The owners are in random order unless sorted."""

    name: Literal["grouped_natural_id"] = "grouped_natural_id"
    group_size: int = Field(2, ge=1)
    mode: Literal["allow-smaller", "allow-bigger", "drop-reminder", "strict"] = "allow-smaller"
    sort_unique_ids: bool = False


def _grouped_natural_id(config: GroupedNaturalIdConfig, dataset: Dataset, key: Key) -> Partition:
    column = owners("grouped_natural_id", dataset)
    count = len(np.unique(column))
    if config.mode != "allow-smaller" and config.group_size > count:
        raise DataError(
            f"data.partition.group_size: {config.group_size}, and {dataset.name} has {count} natural clients"
        )
    if config.mode == "strict" and count % config.group_size:
        raise DataError(
            f"data.partition.group_size: {count} natural clients do not divide into groups of {config.group_size},"
            " which mode = 'strict' asks for"
        )
    arguments = {
        "partition_by": "column",
        "group_size": config.group_size,
        "mode": config.mode,
        "sort_unique_ids": config.sort_unique_ids,
    }
    whole = config.mode != "drop-reminder"
    return _split("GroupedNaturalIdPartitioner", config, arguments, column, key, whole=whole)


class ContinuousConfig(PartitionConfig):
    """Examples sorted by a number and noise: strictness 0 is iid, 1 follows the number strictly."""

    name: Literal["continuous"] = "continuous"
    clients: int = Field(10, ge=1)
    partition_by: Literal["mean"] | int = Field("mean", description="the mean of the input, or one feature's position")
    strictness: float = Field(0.7, ge=0, le=1)


def _continuous(config: ContinuousConfig, dataset: Dataset, key: Key) -> Partition:
    x, n = dataset.train.x, len(dataset.train.x)
    enough(config.clients, n)
    if not x.is_floating_point():
        raise DataError(f"data.partition.name: continuous needs real-valued inputs, and {dataset.name} has {x.dtype}")
    flat = x.reshape(n, -1)
    if isinstance(config.partition_by, int) and not 0 <= config.partition_by < flat.shape[1]:
        raise DataError(f"data.partition.partition_by: {config.partition_by}, and inputs have {flat.shape[1]} features")
    column = (flat.mean(1) if config.partition_by == "mean" else flat[:, config.partition_by]).numpy()
    if config.strictness > 0 and column.std() < 1e-6:
        raise DataError(f"data.partition.partition_by: {config.partition_by} is the same in all {n} examples")
    arguments = {
        "num_partitions": config.clients,
        "partition_by": "column",
        "strictness": config.strictness,
        "seed": _seed(key),
    }
    return _split("ContinuousPartitioner", config, arguments, column, key)


dirichlet = Partitioner(DirichletConfig, _dirichlet)
inner_dirichlet = Partitioner(InnerDirichletConfig, _inner_dirichlet)
distribution = Partitioner(DistributionConfig, _distribution)
linear = Partitioner(LinearConfig, _growing("LinearPartitioner", "k"))
square = Partitioner(SquareConfig, _growing("SquarePartitioner", "k²"))
exponential = Partitioner(ExponentialConfig, _growing("ExponentialPartitioner", "exp(k)"))
size = Partitioner(SizeConfig, _size)
shard = Partitioner(ShardConfig, _shard)
pathological = Partitioner(PathologicalConfig, _pathological)
grouped_natural_id = Partitioner(GroupedNaturalIdConfig, _grouped_natural_id)
continuous = Partitioner(ContinuousConfig, _continuous)
