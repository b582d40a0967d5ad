"""FZooS (Shu, Lin, Dai and Low 2023, arXiv:2308.04077): federated zeroth-order optimisation with shared surrogates.

    client i, from x:   asks y_i(x) and the points around x that its surrogate knows least of, fits w_i   (sends w_i)
    server              w ← mean_i w_i
    client i, T steps   g ← ∇μ_i(u) + γ_t (∇φ(u)ᵀ w − ∇φ(u)ᵀ w_i),   γ_t = 1/t,   u ← u − η g
                        before each step but the first, it asks for more points that it knows least of
    (sends u_i)
    server              x ← mean_i u_i

The surrogate μ_i, its doubt, and the features φ are in ``clients.surrogate``. All queries go into a bounded history
that never leaves the client; a fit uses the nearest of them. Per round and client: T + (T − 1)·active + 1 + survey
queries, and d + M numbers each way. The paper counts the exchange of weights to the round before; here it comes first,
at the same point x and with the same queries. So the correction is on from round 1, no weights are stale where cohorts
change, and the first survey takes the place of the authors' ten initial queries.
"""

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from clients import surrogate
from clients.surrogate import History, Surrogate, doubt, features, learned, nearest, noted, slope, surface
from clients.zeroth_order import ALL, QueryConfig, Walk, advance, begin, flat, pattern, querying, report, within
from fedsim import Batch, Done, Local, Mean, Pass, Payload, Phase, Schedule, Strategy, Task, Visit
from fedsim.errors import ConfigError
from server.reduce import weighted_mean
from strategies.fedzo import State, counted, strategy, walk


class Config(QueryConfig):
    name: str = "fzoos"
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
    def _room(self) -> "Config":
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


# The contract's model has 63 parameters.
CHECK = {
    "features": 64,
    "survey": 10,
    "survey_candidates": 20,
    "candidates": 20,
    "active": 2,
    "local": 40,
    "fit": 60,
    "history": 80,
}


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


def build(config: Config, task: Task) -> Strategy[State]:
    like = pattern(task)
    query, clip, some = querying(task, like), within(task), flat(like)
    d, m, kept = len(some), config.features, config.local - config.asked
    if m * d > 1 << 29:
        raise ConfigError(f"strategy.features: {m} features in {d} dimensions need more than 2 GiB")

    def phi(x: Tensor) -> surrogate.Features:
        return features(config.feature_seed, m, d, config.length, x)

    def chosen(gp: Surrogate, candidates: Tensor, count: int) -> Tensor:
        if config.choose == "random":
            return candidates[:count]
        return candidates[doubt(gp, candidates.double(), config.length).topk(count).indices]

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        x = flat(shared["params"])
        # Where nothing is known of u yet, a distance that makes the first box one of ± radius.
        empty = surrogate.no_history(config.history, x)._asdict()
        return {"history": empty, "point": {"x": x, "u": x + 2 * config.radius}, "surrogate": {"w": x.new_zeros(m)}}

    def look(shared: Payload, memory: Payload, visit: Visit) -> Survey:
        x = flat(shared["params"])
        spread = ((x - memory["point"]["u"]).abs().mean() / 2).clamp(min=config.radius)
        return Survey(x, spread, History(**memory["history"]), memory["surrogate"]["w"], x.new_zeros(()))

    def survey(shared: Payload, c: Survey, batch: Batch, draw: Tensor) -> Survey:
        gp = surrogate.fit(*nearest(c.history, c.x, config.local), config.length, config.noise)
        points = torch.cat([c.x[None], chosen(gp, clip(c.x + c.spread * draw), config.survey)])
        y = query(points, batch)
        history = noted(c.history, points, y)
        w = surrogate.weights(phi(c.x), *nearest(history, c.x, config.fit), config.noise)
        return c._replace(history=history, w=w.to(c.w.dtype), value=y[0])

    def surveyed(shared: Payload, c: Survey) -> Done:
        memory = {"history": c.history._asdict(), "point": {"x": c.x, "u": c.x}, "surrogate": {"w": c.w.clone()}}
        queries = c.value.new_tensor(1 + config.survey)
        return Done({"surrogate": {"w": c.w}}, memory, {"train_loss": c.value, "queries": queries})

    def start(shared: Payload, memory: Payload, visit: Visit) -> Steps:
        history, x = History(**memory["history"]), memory["point"]["x"]
        gp = surrogate.fit(*nearest(history, x, kept), config.length, config.noise)
        row = torch.full((), kept, device=x.device)
        return Steps(begin(x), surrogate.room(gp, config.asked), row, history, memory)

    def step(shared: Payload, c: Steps, batch: Batch, draw: Tensor, active: int) -> Steps:
        u, points = c.walk.u, c.walk.u[None]
        if active:
            points = torch.cat([chosen(c.gp, clip(u + config.radius * draw[: config.candidates]), active), points])
        y = query(points, batch)
        gp = learned(c.gp, c.row, points, y, config.length, config.noise)
        g = slope(gp, u.double(), config.length).to(u.dtype)
        if config.gamma:
            gamma = 1 / (c.walk.t + 1) if config.gamma == "1/t" else config.gamma
            at = u if config.correct_at == "iterate" else c.memory["point"]["x"]
            g = g + gamma * surface(phi(u), shared["surrogate"]["w"] - c.memory["surrogate"]["w"], at)
        moved = advance(config, c.walk, g, y[-1], clip)
        return Steps(moved, gp, c.row + len(y), noted(c.history, points, y), c.memory)

    def first(shared: Payload, c: Steps, batch: Batch, draw: Tensor) -> Steps:
        return step(shared, c, batch, draw, 0)

    def later(shared: Payload, c: Steps, batch: Batch, draw: Tensor) -> Steps:
        return step(shared, c, batch, draw, config.active)

    def final(shared: Payload, c: Steps) -> Done:
        memory = c.memory | {"history": c.history._asdict(), "point": c.memory["point"] | {"u": c.walk.u.clone()}}
        return report(config, like, c.walk, config.asked, memory)

    def box(count: int) -> Any:
        def draw(shared: Payload, generator: torch.Generator) -> Tensor:
            return torch.rand(count, d, generator=generator, dtype=some.dtype) * 2 - 1

        return draw

    def mean_weights(state: State, mean: Mean) -> State:
        return counted(state, mean)._replace(common={"surrogate": mean.value["surrogate"]})

    # (K + σ²I)⁻¹ makes a seventh digit of a last bit, and stacked products differ from single ones in the last bit.
    why = task.unbatchable or "fits of surrogates amplify the rounding in which stacked tensors differ"
    looking = Local(
        look, (Pass(survey, Schedule(ALL, steps=1)),), surveyed, remember, box(config.survey_candidates), why
    )
    passes = (Pass(first, Schedule(ALL, steps=1)), Pass(later, Schedule(ALL, steps=config.steps - 1)))
    walking = Local(start, passes, final, None, box(config.candidates), why)
    reduce = weighted_mean(config.weighting)
    exchange = Phase(lambda state: {"params": state.x}, looking, reduce, mean_weights)
    iterate = walk(config, walking, lambda state: {"surrogate": state.common["surrogate"]})
    sends = (frozenset({"surrogate"}), frozenset({"params"}))
    return strategy(config, task, (exchange, iterate), sends, lambda x: {"surrogate": {"w": flat(x).new_zeros(m)}})
