"""SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378), Algorithm 1 with option II.

    client i, K steps from x:   y ← y − η_l (∇f_i(y) − c_i + c)
                                c_i⁺ ← c_i − c + (x − y)/(K η_l)
    sends                       Δy = y − x,  Δc = c_i⁺ − c_i;   keeps c_i⁺
    server                      x ← x + η_g mean(Δy),  c ← c + |S|/N mean(Δc)

Means are uniform, as in the paper. With one client, c = c_i from round 2 on, so every step is plain SGD.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field

from clients.sgd import Carry, SgdConfig, sgd, train_metrics
from fedsim import Done, Mean, Payload, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(SgdConfig):
    name: str = "scaffold"
    server_lr: float = Field(1.0, gt=0, description="η_g")
    optimizer: Literal["sgd"] = "sgd"
    momentum: float = Field(0.0, ge=0, le=0, description="none: c_i⁺ assumes plain steps")
    weighting: Literal["uniform"] = "uniform"


class State(NamedTuple):
    x: Tree
    c: Tree


def build(config: Config, task: Task) -> Strategy[State]:
    def init(generator: torch.Generator) -> State:
        x = task.init(generator)
        return State(x, tree.zeros(x))

    def broadcast(state: State) -> Payload:
        return {"params": state.x, "control": state.c}

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        return {"control": tree.zeros(shared["control"])}

    def correction(shared: Payload, memory: Payload, y: Tree) -> Tree:
        return tree.sub(shared["control"], memory["control"])

    def final(shared: Payload, carry: Carry) -> Done:
        dy = tree.sub(carry.params, shared["params"])
        dc = tree.axpy(-1 / (carry.step * carry.rate), dy, tree.scale(-1, shared["control"]))
        memory = {"control": tree.add(carry.memory["control"], dc)}
        return Done({"delta": dy, "control": dc}, memory, train_metrics(carry))

    def finish(state: State, mean: Mean) -> State:
        x = tree.axpy(config.server_lr, mean.value["delta"], state.x)
        c = tree.axpy(mean.clients / task.population, mean.value["control"], state.c)
        return State(x, c)

    local = sgd(task, config, correction, final, remember)
    phase = Phase(broadcast, local, weighted_mean("uniform"), finish)
    return Strategy(init, (phase,), lambda state: state.x, (frozenset({"delta", "control"}),))
