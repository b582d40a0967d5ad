"""`label_skew`: three clients with given shares of the labels, the splits of FFA-LoRA (arXiv:2403.12313, section 5).

    severe   two classes [.1 .9] [.9 .1] [.5 .5];   more: .9 of a client's weight is on its own classes, .05 elsewhere
    mild     two classes [.3 .7] [.7 .3] [.5 .5];   more: .6 and .2
    iid      equal shares

A row is a client, a column a class. The examples of class c are dealt out in proportion to column c, so every example
has one owner. With more than three classes, class c belongs to client c mod 3. The paper's numbers of "severe" for two
and three classes are these; those of "mild" are not public, and ours are a choice. ``shares`` gives rows of one's own.
"""

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from fedsim.config import PartitionConfig
from fedsim.data.dataset import Dataset, Partition
from fedsim.data.partition import Lists, labels
from fedsim.errors import DataError
from fedsim.rng import Key

CLIENTS = 3
BINARY = {"severe": 0.9, "mild": 0.7, "iid": 0.5}
OWN = {"severe": 0.9, "mild": 0.6, "iid": 1 / 3}

Share = Annotated[float, Field(ge=0, strict=False)]


class Config(PartitionConfig):
    """Which shares."""

    name: Literal["label_skew"] = "label_skew"
    level: Literal["severe", "mild", "iid"] = "severe"
    shares: list[list[Share]] | None = Field(None, description="a row a client, a column a class; instead of a level")

    @model_validator(mode="after")
    def _rectangular(self) -> "Config":
        if self.shares is not None:
            widths = {len(row) for row in self.shares}
            if len(self.shares) < 1 or len(widths) != 1 or widths == {0}:
                raise ValueError("shares: rows must be of one length, at least 1")
            if not np.array(self.shares).sum(0).all():
                raise ValueError("shares: every class needs a client with a share above 0")
        return self


def shares(level: str, classes: int) -> npt.NDArray[np.float64]:
    """The rows of a level, (3, classes); each sums to 1 for two and three classes."""
    if classes == 2:
        most = BINARY[level]
        return np.array([[1 - most, most], [most, 1 - most], [0.5, 0.5]])
    mine = np.arange(classes) % CLIENTS == np.arange(CLIENTS)[:, None]
    return np.where(mine, OWN[level], (1 - OWN[level]) / (CLIENTS - 1))


def build(config: Config, dataset: Dataset, key: Key) -> Partition:
    """Raises ``DataError``: another number of classes than columns, or a client without examples."""
    y = labels("label_skew", dataset)
    rows = np.array(config.shares) if config.shares is not None else shares(config.level, dataset.classes)
    if rows.shape[1] != dataset.classes:
        raise DataError(
            f"data.partition.shares: needs a column for each of {dataset.classes} classes (got {rows.shape[1]})"
        )
    clients: list[list[npt.NDArray[np.int64]]] = [[] for _ in rows]
    for c in range(dataset.classes):
        mine = key.at("class", c).numpy().permutation(np.flatnonzero(y == c))
        ends = np.rint(np.cumsum(rows[:, c]) / rows[:, c].sum() * len(mine)).astype(np.int64)
        for own, part in zip(clients, np.split(mine, ends[:-1]), strict=True):
            own.append(part)
    whole = [np.concatenate(parts) for parts in clients]
    if not all(len(w) for w in whole):
        raise DataError("data.partition.shares: a client has no example")
    return Lists(whole)
