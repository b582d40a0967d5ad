"""FedRep (Collins et al. 2021, arXiv:2102.07078), Algorithm 1: a shared representation, a head of each client's own.

client i keeps a head h_i, drawn by itself; the server has the body φ
client i   h_i ← SGD on F_i(φ, h) over h alone          (head_epochs)
           φ_i ← SGD on F_i(φ, h_i) over φ alone        (epochs; 1 in the paper)
sends      φ_i − φ
server     φ ← φ + Σ p_k (φ_k − φ) / Σ p_k              (p_k = 1 in the paper)
"""

from typing import NamedTuple

import torch

from clients import alternate
from clients.alternate import AlternateConfig, Carry, private_names, take, train_metrics
from fedsim import Done, Mean, Payload, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(AlternateConfig):
    name: str = "fedrep"


class State(NamedTuple):
    phi: Tree


def build(config: Config, task: Task) -> Strategy[State]:
    names = alternate.shapes(task)
    head = private_names(names, config.private)
    body = [name for name in names if name not in head]

    def init(generator: torch.Generator) -> State:
        return State(take(task.init(generator), body))

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        return {"head": take(task.init(generator), head)}

    def final(shared: Payload, c: Carry) -> Done:
        return Done({"delta": tree.sub(c.outer, shared["body"])}, {"head": c.head}, train_metrics(c))

    def finish(state: State, mean: Mean) -> State:
        return State(tree.add(state.phi, mean.value["delta"]))

    def personal(shared: Payload, memory: Payload) -> Tree:
        return take(shared["body"] | memory["head"], names)

    local = alternate.alternate(task, config, lambda shared, memory: shared["body"], lambda o: o, final, remember)
    phase = Phase(lambda state: {"body": state.phi}, local, weighted_mean(config.weighting), finish)
    return Strategy(init, (phase,), lambda state: state.phi, (frozenset({"delta"}),), personal, is_global=False)
