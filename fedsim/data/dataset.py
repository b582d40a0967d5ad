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

    One that knows how many these are without drawing them says so by a method ``size(client)``, and one whose clients
    may hold the same example by an attribute ``overlaps = True``.
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
        mine = np.asarray(self.partition[client], dtype=np.int64)
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
        n: int = known(client) if known else len(self.partition[client])
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
        """The same federation with its examples on ``device``, floating inputs as ``dtype``."""

        def move(s: Split) -> Split:
            x = s.x.to(device, dtype) if s.x.is_floating_point() else s.x.to(device)
            return Split(x, s.y.to(device), s.client)

        data = self.dataset
        return replace(self, dataset=data._replace(train=move(data.train), test=move(data.test)))


def validate(dataset: Dataset) -> Dataset:
    """Refuse a data set that would only fail later: NaN, labels out of range, lengths that differ."""
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        n, m = len(split.x), len(split.y)
        if n != m:
            raise DataError(f"data: {dataset.name} {name} has {n} inputs and {m} labels")
        if n == 0:
            raise DataError(f"data: {dataset.name} {name} is empty")
        if split.x.is_floating_point() and not tree.finite({"x": split.x}):
            bad = (~torch.isfinite(split.x.reshape(n, -1))).any(1).nonzero()[:, 0]
            raise DataError(f"data: {dataset.name} {name} has NaN or Inf in {len(bad)} rows (first: row {int(bad[0])})")
        low, high = int(split.y.min()), int(split.y.max())
        if low < 0 or high >= dataset.classes:
            raise DataError(f"data: {dataset.name} {name} has labels {low}..{high}, expected 0..{dataset.classes - 1}")
    return dataset
