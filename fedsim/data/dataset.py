"""A data set in memory, and the federation of clients that hold it."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim import tree
from fedsim.errors import DataError
from fedsim.rng import Key

Indices = npt.NDArray[np.int64]


class Split(NamedTuple):
    """Examples. ``x`` (N, …) inputs, ``y`` (N,) or (N, T) labels, ``client`` (N,) natural owner of each, if known."""

    x: Tensor
    y: Tensor
    client: npt.NDArray[np.str_] | None = None


class Dataset(NamedTuple):
    """A data set. ``classes`` is the number of labels, or the size of the vocabulary for language modelling."""

    name: str
    train: Split
    test: Split
    classes: int


class Partition(Protocol):
    """Which training examples each client holds. Lazy, so that a million clients cost nothing until they are asked.

    ``partition[client]`` is positions in the training split: distinct whole numbers, (n,), n ≥ 1; a list of arrays has
    that. One that knows how many these are without drawing them says so by a method ``size(client)``, and one whose
    clients may hold the same example by an attribute ``overlaps = True``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, client: int) -> Indices: ...


@dataclass(frozen=True)
class Federation:
    """A data set held by clients, some of each client's examples kept back as its own test set."""

    dataset: Dataset
    partition: Partition
    holdout: float
    key: Key

    def __len__(self) -> int:
        return len(self.partition)

    def indices(self, client: int, split: str) -> Indices:
        """The positions in ``dataset.train`` that this client has in ``split`` ("train" or "holdout")."""
        mine = drawn(self.partition, client)
        if not self.holdout:
            return mine if split == "train" else mine[:0]
        if self._overlaps:
            held = self._held_out[mine]
            return mine[held if split == "holdout" else ~held]
        kept = self._kept_back(len(mine))
        order = self.key.at("holdout", client).numpy().permutation(len(mine))
        return mine[np.sort(order[kept:] if split == "train" else order[:kept])]

    def size(self, client: int, split: str) -> int:
        """How many positions ``indices`` gives."""
        if self.holdout and self._overlaps:
            return len(self.indices(client, split))
        known = getattr(self.partition, "size", None)
        n: int = known(client) if callable(known) else len(self.partition[client])  # of an array, it is a number
        kept = self._kept_back(n)
        return n - kept if split == "train" else kept

    @property
    def _overlaps(self) -> bool:
        return bool(getattr(self.partition, "overlaps", False))

    @cached_property
    def _held_out(self) -> npt.NDArray[np.bool_]:
        """Of each example, whether all who have it keep it back: nobody may train on what another is tested on."""
        n = len(self.dataset.train.y)
        out = np.zeros(n, dtype=np.bool_)
        out[self.key.at("holdout", "examples").numpy().permutation(n)[: max(1, round(self.holdout * n))]] = True
        return out

    def _kept_back(self, n: int) -> int:
        """Of a client's n examples. At least one stays for training, and with two or more at least one is held out."""
        return max(0, min(max(1, round(self.holdout * n)), n - 1)) if self.holdout else 0

    def to(self, device: torch.device, dtype: torch.dtype) -> "Federation":
        """The same federation with its examples on ``device``, floating inputs as ``dtype``.

        Raises ``DataError`` for values that ``dtype`` cannot hold.
        """
        data = self.dataset

        def move(name: str, s: Split) -> Split:
            if not s.x.is_floating_point():
                return Split(s.x.to(device), s.y.to(device), s.client)
            x = s.x.to(device, dtype)
            if torch.finfo(s.x.dtype).max > torch.finfo(dtype).max and not tree.finite({"x": x}):
                kind = str(dtype).removeprefix("torch.")
                raise DataError(f"data: {data.name} {name} has numbers that {kind} cannot hold in {_bad_rows(x)}")
            return Split(x, s.y.to(device), s.client)

        return replace(self, dataset=data._replace(train=move("train", data.train), test=move("test", data.test)))


def drawn(partition: Partition, client: int, of: str = "the partitioner") -> Indices:
    """What a client holds, int64 (n,). Raises ``DataError`` for anything but whole numbers in one dimension."""
    given = partition[client]
    mine = np.asarray(given)
    if mine.ndim != 1 or (mine.dtype.kind not in "iu" and len(mine)):
        got = f"{mine.dtype} {mine.shape}" if mine.dtype.kind in "biufc" else type(given).__name__
        raise DataError(f"data.partition.name: {of} must give client {client} whole numbers, (n,) (got {got})")
    return mine.astype(np.int64, copy=False)


def validate(dataset: Dataset) -> Dataset:
    """Refuse a data set that would only fail later: other types, shapes that differ, NaN, labels out of range."""
    if not isinstance(dataset, Dataset):
        raise DataError(f"data: must be a fedsim.Dataset (got {type(dataset).__name__})")
    for part in (dataset.train, dataset.test):
        if not isinstance(part, Split):
            raise DataError(f"data: train and test must be a fedsim.Split (got {type(part).__name__})")
    if not isinstance(dataset.classes, int | np.integer) or dataset.classes < 1:
        raise DataError(f"data: classes must be a whole number of at least 1 (got {dataset.classes!r})")
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        where = f"data: {dataset.name} {name}"
        _check_types(where, split)
        n, m = len(split.x), len(split.y)
        if n != m:
            raise DataError(f"{where} has {n} inputs and {m} labels")
        if n == 0:
            raise DataError(f"{where} is empty")
        if split.client is not None and split.client.shape != (n,):
            raise DataError(f"{where}: client must name the owner of each of {n} examples (got {split.client.shape})")
        if split.x.is_floating_point() and not tree.finite({"x": split.x}):
            raise DataError(f"{where} has NaN or Inf in {_bad_rows(split.x)}")
        low, high = int(split.y.min()), int(split.y.max())
        if low < 0 or high >= dataset.classes:
            raise DataError(f"{where} has labels {low}..{high}, expected 0..{dataset.classes - 1}")
    for of in ("x", "y"):
        train, test = (getattr(split, of) for split in (dataset.train, dataset.test))
        if train.shape[1:] != test.shape[1:] or train.is_floating_point() != test.is_floating_point():
            kinds = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape[1:])}" for t in (train, test)]
            raise DataError(
                f"data: {dataset.name} {of} of an example must be {kinds[0]} as in train (got {kinds[1]} in test)"
            )
    return dataset._replace(classes=int(dataset.classes))


def _check_types(where: str, split: Split) -> None:
    for of, found in (("x", split.x), ("y", split.y)):
        if not isinstance(found, Tensor):
            raise DataError(f"{where}: {of} must be a torch.Tensor (got {type(found).__name__})")
    if split.x.ndim == 0:
        raise DataError(f"{where}: x must be (N, …) (got a single number)")
    if split.y.dtype != torch.int64 or split.y.ndim not in (1, 2):
        raise DataError(f"{where}: y must be torch.int64, (N,) or (N, T) (got {split.y.dtype} {tuple(split.y.shape)})")
    if split.client is not None and (not isinstance(split.client, np.ndarray) or split.client.dtype.kind != "U"):
        got = getattr(split.client, "dtype", type(split.client).__name__)
        raise DataError(f"{where}: client must be a NumPy array of strings (got {got}); np.array(…).astype(str) is one")


def _bad_rows(x: Tensor) -> str:
    """How many rows of (N, …) hold a number that is none, and the first."""
    bad = (~torch.isfinite(x.reshape(len(x), -1))).any(1).nonzero()[:, 0]
    return f"{len(bad)} rows (first: row {int(bad[0])})"
