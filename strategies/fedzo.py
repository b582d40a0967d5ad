"""FedZO (Fang et al. 2022, arXiv:2201.09531): local descent along finite differences, for functions that are queried.

    min_x F(x) = 1/N Σ_i f_i(x),  client i answers y_i(u) = f_i(u)
    client i, T steps from x:   u ← u − η Δ_i(u)          (Δ: ``clients.zeroth_order``; Adam's step by default)
    sends                       u_i
    server                      x ← mean_i u_i

Q + 1 queries a step. ``accept = "if-better"`` is the rule of the code released with arXiv:2308.04077, made of queries
that are counted: clients send y_i(x) with u_i, are asked for y_i at the mean as well, and x stays where the mean of
these is not lower. What the other methods of this kind share with FedZO is here too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from clients.zeroth_order import DifferenceConfig, QueryConfig, by_differences, one_query, pattern
from fedsim import Local, Mean, Payload, Phase, Strategy, Task, Tree
from fedsim.errors import ConfigError
from fedsim.worker import say_once
from server.reduce import weighted_mean


class Config(DifferenceConfig):
    name: str = "fedzo"


class State(NamedTuple):
    x: Tree
    queries: int  # all that were ever made, by all clients
    before: Tree  # x at the round's start while the new one is on trial; {} otherwise
    start: float  # the cohort's mean value there
    common: Payload  # what a method's correction is made of: mean control variates, mean surrogate weights


def build(config: Config, task: Task) -> Strategy[State]:
    estimable(config, task)
    iterate = walk(config, by_differences(task, config), lambda state: {"params": state.x})
    return strategy(config, task, (iterate,), (frozenset({"params"}),))


def estimable(config: DifferenceConfig, task: Task) -> None:
    """Raises ``ConfigError`` where there are more orthonormal directions to be drawn than there are dimensions."""
    d = sum(p.numel() for p in pattern(task).values())
    if config.directions > d:
        raise ConfigError(f"strategy.directions: must be at most {d}, the dimension (got {config.directions})")


def counted(state: State, mean: Mean) -> State:
    """With the queries of a phase. All clients of a phase make equally many, so the mean is a whole number."""
    return state._replace(queries=state.queries + round(mean.metrics["queries"] * mean.clients))


def walk(
    config: QueryConfig,
    local: Local,
    broadcast: Callable[[State], Payload],
    learn: Callable[[State, Mean], Payload] = lambda state, mean: state.common,
) -> Phase[State]:
    """The exchange that moves x to the mean of the clients' points; ``learn`` gives the new ``common``."""
    judged = config.accept == "if-better"

    def finish(state: State, mean: Mean) -> State:
        state = counted(state, mean)._replace(common=learn(state, mean))
        if judged:
            state = state._replace(before=state.x, start=float(mean.value["value"]["value"]))
        return state._replace(x=mean.value["params"])

    return Phase(broadcast, local, weighted_mean(config.weighting), finish)


def strategy(
    config: QueryConfig,
    task: Task,
    phases: tuple[Phase[State], ...],
    sends: tuple[frozenset[str], ...],
    common: Callable[[Tree], Payload] = lambda x: {},
) -> Strategy[State]:
    """A strategy of these exchanges, the last of which moves x, and of the server's judgement where it judges."""

    def init(generator: torch.Generator) -> State:
        x = task.init(generator)
        return State(x, 0, {}, 0.0, common(x))

    def judge(state: State, mean: Mean) -> State:
        better = float(mean.value["value"]["value"]) < state.start
        return counted(state, mean)._replace(x=state.x if better else state.before, before={})

    if config.accept == "if-better":
        say_once("a new point is kept only where F is lower there: one more query a client a round, counted")
        asked = Phase(lambda state: {"params": state.x}, one_query(task), weighted_mean(config.weighting), judge)
        phases, sends = (*phases, asked), (*sends[:-1], sends[-1] | {"value"}, frozenset({"value"}))

    def gauges(state: State) -> dict[str, float]:
        return {"queries": state.queries}

    return Strategy(init, phases, lambda state: state.x, sends, gauges=gauges)
