"""FedPer (Arivazhagan et al. 2019, arXiv:1912.00818), Algorithms 1 and 2: base layers shared, the last ones personal.

client i keeps its personal layers W_i, drawn by itself; the server has the base layers W_B
client i   W_B,i, W_i ← SGD on F_i(W_B, W_i) over both at once
sends      W_B,i − W_B
server     W_B ← W_B + Σ p_k (W_B,k − W_B) / Σ p_k
"""

from typing import NamedTuple

import torch
from pydantic import Field

from clients.alternate import private_names, shapes, take
from clients.sgd import Carry, SgdConfig, sgd, train_metrics
from fedsim import Done, Mean, Payload, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(SgdConfig):
    name: str = "fedper"
    private: str | None = Field(None, description="layer whose parameters are personal; the last by default")


class State(NamedTuple):
    base: Tree


def build(config: Config, task: Task) -> Strategy[State]:
    names = shapes(task)
    own = private_names(names, config.private)
    base = [name for name in names if name not in own]

    def init(generator: torch.Generator) -> State:
        return State(take(task.init(generator), base))

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        return {"head": take(task.init(generator), own)}

    def start(shared: Payload, memory: Payload) -> Tree:
        return take(shared["body"] | memory["head"], names)

    def final(shared: Payload, c: Carry) -> Done:
        delta = tree.sub(take(c.params, base), shared["body"])
        return Done({"delta": delta}, {"head": take(c.params, own)}, train_metrics(c))

    def finish(state: State, mean: Mean) -> State:
        return State(tree.add(state.base, mean.value["delta"]))

    local = sgd(task, config, final=final, remember=remember, start=start)
    phase = Phase(lambda state: {"body": state.base}, local, weighted_mean(config.weighting), finish)
    return Strategy(init, (phase,), lambda state: state.base, (frozenset({"delta"}),), start, is_global=False)
