"""What a client does that can only query its function: steps along finite differences, and single queries.

Points are vectors u (d,), queries are values y(u), and nothing here asks for a gradient. A query sees all of a client's
examples: y is the client's function, without noise. Under ``torch.vmap`` a block of clients works at once, and many
points are queried at once where the task allows. A finite difference (Fang et al. 2022, arXiv:2201.09531; in the form
of Shu et al. 2023, arXiv:2308.04077, eq. 3) has orthonormal directions u_q:

    Δ(u) = 1/Q Σ_q [y(u + λ u_q) − y(u)]/λ · u_q
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from clients.sgd import BETA1, BETA2, EPS
from fedsim.config import StrategyConfig
from fedsim.rng import Key
from fedsim.types import Batch, Done, Local, Pass, Payload, Schedule, Task, Tree, Visit

ALL = 1 << 40  # the batch size that takes every example

Query = Callable[[Tensor, Batch], Tensor]
"""Values (n,) of a client's function at points (n, d)."""


class QueryConfig(StrategyConfig):
    """What every strategy is told whose clients only query."""

    lr: float = Field(0.01, gt=0, description="η, the clients' step size")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="new moments at every visit, as in the authors' code")
    steps: int = Field(10, ge=1, description="T, local iterations a visit")
    accept: Literal["always", "if-better"] = Field(
        "always", description="if-better: keep the new point only where F is lower; costs a query a client a round"
    )
    weighting: Literal["examples", "uniform"] = Field("uniform", description="what the mean over clients weighs by")


class DifferenceConfig(QueryConfig):
    """Finite differences."""

    directions: int = Field(20, ge=1, description="Q, orthonormal directions an estimate; at most the dimension")
    smoothing: float = Field(0.01, gt=0, description="λ, how far away the queries are")


def flat(params: Tree) -> Tensor:
    """A tree as one vector (d,), in the order of its names."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def shaped(u: Tensor, like: Tree) -> Tree:
    """The inverse of ``flat``: a vector (d,) with the names and shapes of ``like``."""
    parts = torch.split(u, [p.numel() for p in like.values()])
    return {name: part.reshape(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def pattern(task: Task) -> Tree:
    """Some parameters of the task, for their names, shapes and dtypes."""
    return task.init(Key.root(0).at("pattern").torch())


def alone(task: Task, like: Tree) -> str | None:
    """Why clients cannot run as a block, or None. Differences of close values show the order in which these were
    summed; in float32 a block, which sums in another order, would give other numbers."""
    if any(p.dtype != torch.float64 for p in like.values()):
        return task.unbatchable or "in float32, differences of values depend on the order of their sums"
    return task.unbatchable


def within(task: Task) -> Callable[[Tensor], Tensor]:
    """The projection onto the task's domain: [0, 1]^d for an objective (it has no classes), R^d for a model."""
    if task.classes == 0:
        return lambda u: u.clamp(0, 1)
    return lambda u: u


def querying(task: Task, like: Tree) -> Query:
    """Queries of the task's loss: all points at once where it has a batching rule, else one by one.

    Raises ``ValueError`` for a loss that is not one number.
    """

    def one(u: Tensor, batch: Batch) -> Tensor:
        value = task.loss(shaped(u, like), batch)
        if value.shape:
            raise ValueError(f"the objective gave shape {tuple(value.shape)}, expected a single number")
        return value

    def query(points: Tensor, batch: Batch) -> Tensor:
        if task.unbatchable is not None:
            return torch.stack([one(u, batch) for u in points])
        values: Tensor = torch.vmap(lambda u: one(u, batch))(points)
        return values

    return query


def orthonormal(generator: torch.Generator, count: int, dimension: int, dtype: torch.dtype) -> Tensor:
    """``count`` orthonormal directions (count, d), uniformly distributed: the Q of a Gaussian matrix's QR."""
    gauss = torch.randn(dimension, count, generator=generator, dtype=dtype, device=generator.device)
    q, r = torch.linalg.qr(gauss)
    signed: Tensor = q * r.diagonal().sign()  # LAPACK's signs are not uniform
    return signed.T


def difference(
    query: Query, u: Tensor, directions: Tensor, smoothing: float, batch: Batch, clip: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """y(u), shape (), and Δ(u), shape (d,), from Q + 1 queries. Points outside the domain are queried at its border."""
    y = query(clip(torch.cat([u[None], u + smoothing * directions])), batch)
    return y[0], ((y[1:] - y[0]) / smoothing) @ directions / len(directions)


class Walk(NamedTuple):
    """A client in the middle of its steps. Without a shape: ()."""

    u: Tensor  # (d,)
    m: Tensor  # (d,) Adam's moments
    v: Tensor  # (d,)
    t: Tensor  # steps taken
    start: Tensor  # y(x), the first query


def begin(x: Tensor) -> Walk:
    """Before the first step, at x (d,)."""
    zero = x.new_zeros(())
    return Walk(x, torch.zeros_like(x), torch.zeros_like(x), zero, zero)


def advance(config: QueryConfig, walk: Walk, g: Tensor, value: Tensor, clip: Callable[[Tensor], Tensor]) -> Walk:
    """One step along −g (d,) from a point that has the value y(u), shape (); never out of the domain."""
    t, m, v = walk.t + 1, walk.m, walk.v
    if config.optimizer == "adam":
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        g = m / ((v / (1 - BETA2**t)).sqrt() + EPS) / (1 - BETA1**t)
    start = torch.where(walk.t == 0, value, walk.start)
    return Walk(clip(walk.u - config.lr * g), m, v, t, start)


class Carry(NamedTuple):
    walk: Walk
    total: Tensor  # (d,) Σ Δ
    memory: Payload


def by_differences(
    task: Task,
    config: DifferenceConfig,
    correction: Callable[[Payload, Payload, Tensor], Tensor] | None = None,
    final: Callable[[Payload, Carry], Done] | None = None,
    remember: Callable[[Payload, torch.Generator], Payload] | None = None,
) -> Local:
    """T steps from the broadcast ``params`` along Δ(u) + ``correction(shared, memory, u)``, all flat vectors.

    ``final`` makes what is sent; without it, ``report``.
    """
    like = pattern(task)
    query, clip, some = querying(task, like), within(task), next(iter(like.values()))
    dimension = sum(p.numel() for p in like.values())

    def init(shared: Payload, memory: Payload, visit: Visit) -> Carry:
        walk = begin(flat(shared["params"]))
        return Carry(walk, torch.zeros_like(walk.u), memory)

    def step(shared: Payload, c: Carry, batch: Batch, draw: Tensor) -> Carry:
        value, g = difference(query, c.walk.u, draw, config.smoothing, batch, clip)
        total = c.total + g
        if correction:
            g = g + correction(shared, c.memory, c.walk.u)
        return Carry(advance(config, c.walk, g, value, clip), total, c.memory)

    def draw(shared: Payload, generator: torch.Generator) -> Tensor:
        return orthonormal(generator, config.directions, dimension, some.dtype).to(flat(shared["params"]).device)

    def done(shared: Payload, c: Carry) -> Done:
        return report(config, like, c.walk, config.steps * (config.directions + 1))

    passes = (Pass(step, Schedule(ALL, steps=config.steps)),)
    return Local(init, passes, final or done, remember, draw, alone(task, like))


def report(config: QueryConfig, like: Tree, walk: Walk, queries: int, memory: Payload | None = None) -> Done:
    """The point that was reached, the value where the walk began (sent where the server judges), and the queries."""
    value: Payload = {"params": shaped(walk.u, like)}
    if config.accept == "if-better":
        value["value"] = {"value": walk.start}
    return Done(value, memory or {}, {"train_loss": walk.start, "queries": walk.start.new_full((), queries)})


def one_query(task: Task) -> Local:
    """A single query, at the broadcast ``params``: what the server judges a new point by. No memory changes."""
    like = pattern(task)
    query = querying(task, like)

    def init(shared: Payload, memory: Payload, visit: Visit) -> Tensor:
        return flat(shared["params"]).new_zeros(())

    def step(shared: Payload, value: Tensor, batch: Batch, draw: None) -> Tensor:
        return query(flat(shared["params"])[None], batch)[0]

    def final(shared: Payload, value: Tensor) -> Done:
        return Done({"value": {"value": value}}, {}, {"queries": torch.ones_like(value)})

    return Local(init, (Pass(step, Schedule(ALL, steps=1)),), final, None, None, alone(task, like))
