"""What a client does that descends along a surrogate of its function: a survey, and steps (``strategies.fzoos``).

All queries go into a bounded history, which is the client's memory and never leaves it; a fit uses the nearest of them.
The factorisation of a visit's surrogate grows with its queries, and is made anew at the next visit.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from clients import surrogate
from clients.surrogate import Features, History, Surrogate, doubt, learned, nearest, noted, slope, surface
from clients.zeroth_order import ALL, QueryConfig, Walk, advance, begin, flat, pattern, querying, report, within
from fedsim.errors import ConfigError
from fedsim.types import Batch, Done, Local, Pass, Payload, Schedule, Task, Visit


class SurrogateConfig(QueryConfig):
    """What such a client is told."""

    gamma: Literal["1/t"] | Annotated[float, Field(ge=0)] = Field("1/t", description="γ; 0: no correction")
    correct_at: Literal["iterate", "start"] = Field("iterate", description="where the correction is evaluated: u, or x")
    length: float = Field(1.0, gt=0, description="l of the kernel")
    noise: float = Field(1e-4, gt=0, description="σ², of values scaled to [0, 1]; the authors' code has 1e-6")
    features: int = Field(2_000, ge=1, description="M, the numbers that clients exchange; 10,000 in the paper")
    feature_seed: int = Field(0, ge=0, description="the seed of the features, shared by everybody")
    active: int = Field(5, ge=0, description="queries before a step, beside that of the iterate")
    candidates: int = Field(100, ge=1, description="points that they are chosen from, in u ± radius")
    survey: int = Field(50, ge=0, description="queries around x, for the weights")
    survey_candidates: int = Field(200, ge=1, description="points that they are chosen from")
    radius: float = Field(0.01, gt=0, description="half the width of the box of candidates; around x, at least that")
    choose: Literal["doubt", "random"] = Field("doubt", description="by the trace of ∂σ², or any")
    local: int = Field(150, ge=2, description="points that a local surrogate is made of")
    fit: int = Field(500, ge=1, description="points that the weights are fitted to")
    history: int = Field(1000, ge=1, description="latest queries that a client remembers")

    @model_validator(mode="after")
    def _room(self) -> "SurrogateConfig":
        if self.active > self.candidates or self.survey > self.survey_candidates:
            raise ValueError("candidates: must be at least the number that is chosen of them")
        if not self.active and not self.survey:
            raise ValueError("survey: must be at least 1 where active is 0: one point alone has no gradient")
        if self.local <= self.asked or self.history < max(self.local, self.fit, self.survey + 1):
            raise ValueError(
                f"local: needs steps + (steps - 1)·active = {self.asked} < local, and history ≥ local, fit"
            )
        return self

    @property
    def asked(self) -> int:
        """Queries of a visit's steps."""
        return self.steps + (self.steps - 1) * self.active


class Survey(NamedTuple):
    x: Tensor  # (d,)
    spread: Tensor  # () half the width of the box around x
    history: History
    w: Tensor  # (M,)
    value: Tensor  # () y(x)


class Steps(NamedTuple):
    walk: Walk
    gp: Surrogate
    row: Tensor  # () the first empty row of gp
    history: History
    memory: Payload


def survey(task: Task, config: SurrogateConfig) -> Local:
    """Asks y(x) and some points around the broadcast ``params`` x, fits weights to the history, and sends these (M,).

    Raises ``ConfigError`` for more features than memory is likely to hold.
    """
    x = flat(pattern(task))
    query, clip, m = querying(task, pattern(task)), within(task), config.features
    if m * len(x) > 1 << 29:
        raise ConfigError(f"strategy.features: {m} features in {len(x)} dimensions need more than 2 GiB")

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        x = flat(shared["params"])
        # Where nothing is known of u yet, a distance that makes the first box one of ± radius.
        empty = surrogate.no_history(config.history, x)._asdict()
        return {"history": empty, "point": {"x": x, "u": x + 2 * config.radius}, "surrogate": {"w": x.new_zeros(m)}}

    def look(shared: Payload, memory: Payload, visit: Visit) -> Survey:
        x = flat(shared["params"])
        spread = ((x - memory["point"]["u"]).abs().mean() / 2).clamp(min=config.radius)
        return Survey(x, spread, History(**memory["history"]), memory["surrogate"]["w"], x.new_zeros(()))

    def ask(shared: Payload, c: Survey, batch: Batch, draw: Tensor) -> Survey:
        gp = surrogate.fit(*nearest(c.history, c.x, config.local), config.length, config.noise)
        points = torch.cat([c.x[None], _chosen(config, gp, clip(c.x + c.spread * draw), config.survey)])
        y = query(points, batch)
        history = noted(c.history, points, y)
        w = surrogate.weights(_features(config, c.x), *nearest(history, c.x, config.fit), config.noise)
        return c._replace(history=history, w=w.to(c.w.dtype), value=y[0])

    def surveyed(shared: Payload, c: Survey) -> Done:
        memory = {"history": c.history._asdict(), "point": {"x": c.x, "u": c.x}, "surrogate": {"w": c.w.clone()}}
        queries = c.value.new_full((), 1 + config.survey)
        return Done({"surrogate": {"w": c.w}}, memory, {"train_loss": c.value, "queries": queries})

    passes = (Pass(ask, Schedule(ALL, steps=1)),)
    return Local(look, passes, surveyed, remember, _box(config.survey_candidates, x), _alone(task))


def by_surrogate(task: Task, config: SurrogateConfig) -> Local:
    """T steps from the surveyed x along ∇μ(u) + γ_t ∇φ(u)ᵀ(w − w_i), with ``surrogate`` w broadcast.

    Before each step but the first, ``active`` more points are asked. Sends ``report``.
    """
    like, kept = pattern(task), config.local - config.asked
    query, clip = querying(task, like), within(task)

    def start(shared: Payload, memory: Payload, visit: Visit) -> Steps:
        history, x = History(**memory["history"]), memory["point"]["x"]
        gp = surrogate.fit(*nearest(history, x, kept), config.length, config.noise)
        row = torch.full((), kept, device=x.device)
        return Steps(begin(x), surrogate.room(gp, config.asked), row, history, memory)

    def step(shared: Payload, c: Steps, batch: Batch, draw: Tensor, active: int) -> Steps:
        u, points = c.walk.u, c.walk.u[None]
        if active:
            points = torch.cat([_chosen(config, c.gp, clip(u + config.radius * draw), active), points])
        y = query(points, batch)
        gp = learned(c.gp, c.row, points, y, config.length, config.noise)
        g = slope(gp, u.double(), config.length).to(u.dtype)
        if config.gamma:
            gamma = 1 / (c.walk.t + 1) if config.gamma == "1/t" else config.gamma
            at = u if config.correct_at == "iterate" else c.memory["point"]["x"]
            g = g + gamma * surface(_features(config, u), shared["surrogate"]["w"] - c.memory["surrogate"]["w"], at)
        moved = advance(config, c.walk, g, y[-1], clip)
        return Steps(moved, gp, c.row + len(y), noted(c.history, points, y), c.memory)

    def first(shared: Payload, c: Steps, batch: Batch, draw: Tensor) -> Steps:
        return step(shared, c, batch, draw, 0)

    def later(shared: Payload, c: Steps, batch: Batch, draw: Tensor) -> Steps:
        return step(shared, c, batch, draw, config.active)

    def final(shared: Payload, c: Steps) -> Done:
        memory = c.memory | {"history": c.history._asdict(), "point": c.memory["point"] | {"u": c.walk.u.clone()}}
        return report(config, like, c.walk, config.asked, memory)

    passes = (Pass(first, Schedule(ALL, steps=1)), Pass(later, Schedule(ALL, steps=config.steps - 1)))
    return Local(start, passes, final, None, _box(config.candidates, flat(like)), _alone(task))


def _features(config: SurrogateConfig, x: Tensor) -> Features:
    return surrogate.features(config.feature_seed, config.features, len(x), config.length, x)


def _chosen(config: SurrogateConfig, gp: Surrogate, candidates: Tensor, count: int) -> Tensor:
    """``count`` of the candidates (c, d)."""
    if config.choose == "random":
        return candidates[:count]
    return candidates[doubt(gp, candidates.double(), config.length).topk(count).indices]


def _box(count: int, like: Tensor) -> Callable[[Payload, torch.Generator], Any]:
    """Draws ``count`` points of [−1, 1]^d, in the dtype of ``like`` (d,)."""

    def draw(shared: Payload, generator: torch.Generator) -> Tensor:
        size, at = (count, len(like)), generator.device
        return torch.rand(size, generator=generator, dtype=like.dtype, device=at) * 2 - 1

    return draw


def _alone(task: Task) -> str:
    """Why clients do not run as a block: (K + σ²I)⁻¹ makes a seventh digit of a last bit, in which stacked products
    differ from single ones."""
    return task.unbatchable or "fits of surrogates amplify the rounding in which stacked tensors differ"
