"""`dominant_groups`: some of a client's examples are spread over all labels, the others come from a few dominant ones.

The partition of HyperFL (Guo et al. 2025, arXiv:2412.07187): of ``size`` examples a share ``spread`` (20 %) is spread
evenly over all labels, the rest evenly over client i's group, ``groups[i mod len(groups)]``. Numbers that do not divide
give their first labels one example more. Examples are drawn without replacement, over all clients.

Ten labels have the paper's five groups of three, each of which shares a label with the next; another number of labels
needs ``groups`` to be given.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedsim.config import PartitionConfig
from fedsim.data.dataset import Dataset, Indices, Partition
from fedsim.data.partition import Lists, labels
from fedsim.errors import DataError
from fedsim.rng import Key

TEN = [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8], [8, 9, 0]]


class Config(PartitionConfig):
    """How many clients, how many examples each, and which labels dominate."""

    name: Literal["dominant_groups"] = "dominant_groups"
    clients: int = Field(20, ge=1)
    size: int = Field(600, ge=1, description="examples of each client, held-out ones included")
    spread: float = Field(0.2, ge=0, le=1, description="share of the examples that is spread over all labels")
    groups: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]] | None = Field(
        None, min_length=1, description="the dominant labels of client 0, 1, …, and from the first again"
    )


def evenly(total: int, among: int) -> Indices:
    """``total`` as ``among`` whole numbers that differ by at most 1, the larger ones first."""
    return np.array([total // among + (i < total % among) for i in range(among)], dtype=np.int64)


def counts(config: Config, client: int, classes: int, groups: list[list[int]]) -> Indices:
    """How many examples of each label this client holds, (classes,)."""
    spread = round(config.spread * config.size)
    out = evenly(spread, classes)
    group = groups[client % len(groups)]
    np.add.at(out, group, evenly(config.size - spread, len(group)))
    return out


def build(config: Config, dataset: Dataset, key: Key) -> Partition:
    """Raises ``DataError``: no groups for these labels, an unknown label, or too few examples of one."""
    label, classes = labels("dominant_groups", dataset), dataset.classes
    groups = config.groups or (TEN if classes == 10 else None)
    if groups is None:
        raise DataError(
            f"data.partition.groups: missing; {dataset.name} has {classes} labels, and only 10 have a default"
        )
    unknown = sorted({c for group in groups for c in group if c >= classes})
    if unknown:
        raise DataError(f"data.partition.groups: {dataset.name} has labels 0..{classes - 1} (got {unknown[0]})")
    wanted = np.stack([counts(config, i, classes, groups) for i in range(config.clients)])
    pools = [key.at("label", c).numpy().permutation(np.flatnonzero(label == c)) for c in range(classes)]
    for c, pool in enumerate(pools):
        if wanted[:, c].sum() > len(pool):
            raise DataError(
                f"data.partition.size: {config.clients} clients of {config.size} need {wanted[:, c].sum()} examples of"
                f" label {c}, and there are {len(pool)}"
            )
    ends = np.cumsum(wanted, axis=0)
    return Lists(
        [
            np.concatenate([pools[c][ends[i, c] - wanted[i, c] : ends[i, c]] for c in range(classes)])
            for i in range(config.clients)
        ]
    )
