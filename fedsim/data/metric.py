"""`metric`: client i's function is a metric of a classifier on the examples that client i holds.

Of the source's training examples one half, drawn by the seed, trains a classifier here: an MLP of 30 and 14 ReLUs, by
Adam on all of them for 200 steps. The other half is the clients': its natural owners' where it has some (hospitals, all
of different size and balance), else ``clients`` of them with ⌈P·C⌉ classes each and equal shares of those.

An example is the whole of a function, a table (rows, p + 2): first the classifier's parameters, row by row, with zeros
at the end; then an example a row, its p features, its label, and 1; rows of zeros fill it up.
"""

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedsim import registry
from fedsim.config import DatasetConfig
from fedsim.data.dataset import Dataset
from fedsim.data.functions import functions
from fedsim.rng import Key

HIDDEN, STEPS, RATE = (30, 14), 200, 0.01


class Config(DatasetConfig):
    name: Literal["metric"] = "metric"
    source: str = Field("heart_disease", description="a data set with labels")
    clients: int = Field(7, ge=1, description="how many, where the source has no natural owners")
    portion: float = Field(0.3, gt=0, le=1, description="P, the share of classes that each of these holds")
    seed: int = Field(0, ge=0, description="of the halves, the classes and the classifier")


def build(config: Config) -> Dataset:
    plugin = registry.load("datasets", config.source)
    data = plugin.build(plugin.Config(name=config.source))
    key, classes = Key.root(config.seed).at("metric"), data.classes
    x, y = data.train.x.flatten(1).float(), data.train.y
    order = torch.from_numpy(key.at("halves").numpy().permutation(len(y)))
    ours, theirs = order[: len(y) // 2], order[len(y) // 2 :].sort().values
    mean, deviation = x[ours].mean(0), x[ours].std(0).clamp(min=1e-6)
    x = torch.where(x[ours].std(0) > 0, (x - mean) / deviation, 0.0)
    parameters = _train(x[ours], y[ours], classes, key)
    if data.train.client is not None:
        owners = data.train.client[theirs.numpy()]
        groups = [theirs[torch.from_numpy(owners == name)] for name in np.unique(owners)]
    else:
        groups = _deal(theirs, y, classes, config, key)
    return functions(f"metric on {config.source}", _tables(parameters, x, y, groups), classes)


def layers(features: int, classes: int) -> list[tuple[int, int]]:
    """Inputs and outputs of the classifier's layers."""
    return list(zip((features, *HIDDEN), (*HIDDEN, classes), strict=True))


def logits(parameters: Tensor, x: Tensor, classes: int) -> Tensor:
    """(n, C) for parameters (d,) and x (n, p)."""
    shapes = layers(x.shape[1], classes)
    parts = torch.split(parameters, [size for a, b in shapes for size in (a * b, b)])
    for i, (a, b) in enumerate(shapes):
        x = (x.relu() if i else x) @ parts[2 * i].view(a, b) + parts[2 * i + 1]
    return x


def _train(x: Tensor, y: Tensor, classes: int, key: Key) -> Tensor:
    g = key.at("train").wide()
    parts = []
    for a, b in layers(x.shape[1], classes):
        parts += [torch.randn(a * b, generator=g) * (2 / a) ** 0.5, torch.zeros(b)]
    parameters = torch.cat(parts).requires_grad_()
    adam = torch.optim.Adam([parameters], RATE)
    for _ in range(STEPS):
        with torch.enable_grad():
            adam.zero_grad()
            F.cross_entropy(logits(parameters, x, classes), y).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return parameters.detach()


def _deal(rows: Tensor, y: Tensor, classes: int, config: Config, key: Key) -> list[Tensor]:
    """Rows for each client: of each of its classes an equal share with the others that hold it."""
    held = max(1, math.ceil(config.portion * classes))
    holders: list[list[int]] = [[] for _ in range(classes)]
    for i in range(config.clients):
        # The first class goes round, so that nobody's classes are empty and few classes are nobody's.
        rest = key.at("classes", i).numpy().permutation(np.delete(np.arange(classes), i % classes))
        for c in (i % classes, *rest[: held - 1].tolist()):
            holders[c].append(i)
    mine: list[list[Tensor]] = [[] for _ in range(config.clients)]
    for c, who in enumerate(holders):
        for k, i in enumerate(who):
            mine[i].append(rows[y[rows] == c][k :: len(who)])
    return [torch.cat(parts) for parts in mine]


def _tables(parameters: Tensor, x: Tensor, y: Tensor, groups: list[Tensor]) -> Tensor:
    width = x.shape[1] + 2
    head = F.pad(parameters, (0, -len(parameters) % width)).view(-1, width)
    longest = max(len(group) for group in groups)
    tables = []
    for group in groups:
        table = torch.cat([x[group], y[group, None].float(), torch.ones(len(group), 1)], 1)
        tables.append(torch.cat([head, F.pad(table, (0, 0, 0, longest - len(group)))]))
    return torch.stack(tables)
