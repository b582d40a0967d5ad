"""Small worlds with answers that can be worked out by hand, and the readable twin of the fast path."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedsim.config import EngineConfig
from fedsim.data.dataset import Dataset, Federation, Split
from fedsim.grids.inline import InlineGrid
from fedsim.memory import Memory
from fedsim.rng import Key
from fedsim.types import Batch, Metrics, Strategy, Task, Tree
from server.loop import run_round

KEY = Key.root(7)


def points(clients: Sequence[Sequence[Sequence[float]]], dtype: torch.dtype = torch.float64) -> Federation:
    """Each client holds points of R^d; labels are 0."""
    x = torch.tensor([p for mine in clients for p in mine], dtype=dtype)
    ends = np.cumsum([0, *(len(mine) for mine in clients)])
    partition = [np.arange(a, b) for a, b in pairwise(ends)]
    split = Split(x, torch.zeros(len(x), dtype=torch.int64))
    return Federation(Dataset("points", split, split, 2), partition, 0.0, KEY)


def quadratic(federation: Federation, start: Sequence[float]) -> Task:
    """F_k(w) = mean over the client's points p of ½‖w − p‖²; its gradient is w − (the mean of the points)."""

    def each(params: Tree, batch: Batch) -> Tensor:
        return 0.5 * ((params["w"] - batch.x) ** 2).sum(-1)

    def loss(params: Tree, batch: Batch) -> Tensor:
        if batch.weight is None:
            return each(params, batch).mean()
        return (batch.weight * each(params, batch)).sum() / batch.weight.sum().clamp(min=1)

    def score(params: Tree, batch: Batch) -> Metrics:
        losses = each(params, batch)
        return {"count": torch.ones_like(losses).sum(), "correct": losses.sum() * 0, "loss": losses.sum()}

    dtype = federation.dataset.train.x.dtype
    return Task(
        lambda generator: {"w": torch.tensor(start, dtype=dtype)}, lambda p, x: x, loss, score, 2, len(federation)
    )


def grid(federation: Federation, **engine: object) -> InlineGrid:
    return InlineGrid(federation, EngineConfig.model_validate(engine), Memory())


def train(
    strategy: Strategy,
    federation: Federation,
    rounds: int = 1,
    cohorts: Sequence[list[int]] | None = None,
    **engine: object,
) -> list[Tree]:
    """The global model before the first round and after each, with everybody in the cohort unless told otherwise."""
    executor = grid(federation, **engine)
    state = strategy.init(KEY.at("init").torch())
    out = [strategy.params(state)]
    for r in range(1, rounds + 1):
        cohort = cohorts[r - 1] if cohorts else list(range(len(federation)))
        state, _ = run_round(strategy, state, r, cohort, executor, KEY)
        out.append(strategy.params(state))
    return out


def same(a: Tree, b: Tree) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def naive_fedavg(federation: Federation, task: Task, w: Tree, lr: float, rounds: int) -> Tree:
    """FedAvg with full-batch local steps, everybody taking part: fifteen lines that anybody can check."""
    data = federation.dataset.train
    for _ in range(rounds):
        total, new = 0, {name: torch.zeros_like(x) for name, x in w.items()}
        for client in range(len(federation)):
            rows = torch.from_numpy(federation.partition[client])
            local = {name: x.clone().requires_grad_() for name, x in w.items()}
            task.loss(local, Batch(data.x[rows], data.y[rows])).backward()
            for name, x in local.items():
                assert x.grad is not None
                new[name] += len(rows) * (x.detach() - lr * x.grad)
            total += len(rows)
        w = {name: x / total for name, x in new.items()}
    return w
