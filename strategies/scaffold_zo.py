"""SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378) on FedZO's estimates, types I and II of arXiv:2308.04077.

    each step has     g ← Δ_i(u) + c − c_i
    type I            c_i = Δ_i(x) at the point where the round begins, c = mean_i c_i: an exchange, Q + 1 queries more
    type II           c_i = 1/T Σ_τ Δ_i(u_τ) along the client's last visit; clients send how it changed, δ_i,
                      c ← c + |S|/N mean_i δ_i

In type II there is no correction on a client's first visit but what others already know: c_i = 0. With one client
c = c_i, and every step is FedZO's.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from clients.zeroth_order import Carry, by_differences, flat, pattern, report, shaped
from fedsim import Done, Mean, Payload, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean
from strategies import fedzo
from strategies.fedzo import State, counted, estimable, strategy, walk


class Config(fedzo.Config):
    name: str = "scaffold_zo"
    type: Literal[1, 2] = Field(
        2, description="where control variates come from: 1, the round's start; 2, the last visit"
    )


def build(config: Config, task: Task) -> Strategy[State]:
    estimable(config, task)
    like, queries = pattern(task), config.directions + 1

    def zero(x: Tree) -> Payload:
        return {"control": tree.zeros(x)}

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        return zero(shared["params"])

    def correction(shared: Payload, memory: Payload, u: Tensor) -> Tensor:
        return flat(shared["control"]) - flat(memory["control"])

    def broadcast(state: State) -> Payload:
        return {"params": state.x, "control": state.common["control"]}

    if config.type == 1:

        def estimate(shared: Payload, c: Carry) -> Done:
            control = shaped(c.total, like)
            metrics = {"queries": c.walk.start.new_full((), queries)}
            return Done({"control": control}, {"control": tree.map(torch.clone, control)}, metrics)

        def collect(state: State, mean: Mean) -> State:
            return counted(state, mean)._replace(common={"control": mean.value["control"]})

        once = by_differences(task, config.model_copy(update={"steps": 1}), None, estimate, remember)
        ask = Phase(lambda state: {"params": state.x}, once, weighted_mean(config.weighting), collect)
        iterate = walk(config, by_differences(task, config, correction), broadcast)
        return strategy(config, task, (ask, iterate), (frozenset({"control"}), frozenset({"params"})), zero)

    def final(shared: Payload, c: Carry) -> Done:
        delta = tree.axpy(1 / config.steps, shaped(c.total, like), tree.scale(-1, c.memory["control"]))
        # Kept as the server keeps it, so that with one client both have the same bits.
        memory = {"control": tree.add(c.memory["control"], delta)}
        done = report(config, like, c.walk, config.steps * queries, memory)
        return done._replace(value=done.value | {"control": delta})

    def learn(state: State, mean: Mean) -> Payload:
        share = mean.clients / task.population
        return {"control": tree.axpy(share, mean.value["control"], state.common["control"])}

    local = by_differences(task, config, correction, final, remember)
    iterate = walk(config, local, broadcast, learn)
    return strategy(config, task, (iterate,), (frozenset({"params", "control"}),), zero)
