"""`attack`: client i's function is the margin by which its own classifier still names an image right.

N classifiers are trained here, once a process: an MLP of 32 ReLUs each, on the training examples of its client's
classes, by Adam for 400 steps of 64. Of the C classes every client holds ⌈P·C⌉: three that all of them hold, so that
there are images which all of them know, and others at random. An example is the whole of a function, a vector
[classifier | image | label]: with d pixels 32 d + 32 + 32 C + C numbers, then d, then 1.

``image`` counts the test images that every client's classifier names right, in their order.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedsim import registry
from fedsim.config import DatasetConfig
from fedsim.data.dataset import Dataset
from fedsim.data.functions import functions
from fedsim.errors import DataError
from fedsim.rng import Key

HIDDEN, COMMON, STEPS, BATCH, RATE = 32, 3, 400, 64, 3e-3


class Config(DatasetConfig):
    name: Literal["attack"] = "attack"
    source: str = Field("mnist_small", description="a data set of images with labels")
    clients: int = Field(10, ge=1, description="N")
    portion: float = Field(0.7, gt=0, le=1, description="P, the share of classes that a client holds")
    image: int = Field(0, ge=0, description="which of the images that all classifiers name right")
    seed: int = Field(0, ge=0, description="of the clients' classes and classifiers")


class Victims(NamedTuple):
    """Classifiers (N, …) as vectors, and the test images (K, d) that all of them name right, with their labels (K,)."""

    classifiers: Tensor
    x: Tensor
    y: Tensor
    classes: int


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where there are not so many images that all classifiers name right."""
    found = victims(config.source, config.clients, config.portion, config.seed)
    if config.image >= len(found.y):
        raise DataError(f"data.image: {len(found.y)} images are named right by all classifiers (got {config.image})")
    target = torch.cat([found.x[config.image], found.y[config.image, None].float()])
    rows = torch.cat([found.classifiers, target.expand(config.clients, -1)], 1)
    return functions(f"attack on {config.source}", rows, found.classes)


@lru_cache(maxsize=2)
def victims(source: str, clients: int, portion: float, seed: int) -> Victims:
    plugin = registry.load("datasets", source)
    data = plugin.build(plugin.Config(name=source))
    key, classes = Key.root(seed).at("attack"), data.classes
    x, y, test = data.train.x.flatten(1).float(), data.train.y, data.test.x.flatten(1).float()
    held = min(classes, max(COMMON, -int(-portion * classes // 1)))
    order = torch.from_numpy(key.at("common").numpy().permutation(classes))
    pools = []
    for i in range(clients):
        others = order[COMMON:][torch.from_numpy(key.at("classes", i).numpy().permutation(classes - COMMON))]
        mine = torch.cat([order[:COMMON], others[: held - COMMON]])
        pools.append(torch.isin(y, mine).nonzero()[:, 0])
    weights = _train(x, y, pools, classes, key)
    logits = _forward(weights, test.expand(clients, -1, -1))
    right = (logits.argmax(-1) == data.test.y).all(0)
    flat = torch.cat([w.flatten(1) for w in weights], 1)
    return Victims(flat, test[right], data.test.y[right], classes)


def _forward(weights: list[Tensor], x: Tensor) -> Tensor:
    """Logits (N, B, C) of N classifiers for x (N, B, d)."""
    w1, b1, w2, b2 = weights
    return torch.baddbmm(b2[:, None], torch.baddbmm(b1[:, None], x, w1).relu(), w2)


def _train(x: Tensor, y: Tensor, pools: list[Tensor], classes: int, key: Key) -> list[Tensor]:
    """All classifiers at once, each on its own pool of examples."""
    n, d, g = len(pools), x.shape[1], key.at("train").wide()
    shapes = [(n, d, HIDDEN), (n, HIDDEN), (n, HIDDEN, classes), (n, classes)]
    scales = [d**-0.5, 0.0, HIDDEN**-0.5, 0.0]
    weights = [(torch.randn(s, generator=g) * c).requires_grad_() for s, c in zip(shapes, scales, strict=True)]
    adam = torch.optim.Adam(weights, RATE)
    for _ in range(STEPS):
        at = torch.stack([pool[torch.randint(len(pool), (BATCH,), generator=g)] for pool in pools])
        with torch.enable_grad():
            loss = n * F.cross_entropy(_forward(weights, x[at]).flatten(0, 1), y[at].flatten())
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return [w.detach() for w in weights]
