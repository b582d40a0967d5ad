"""Local-only training: the yardstick that a federated method must beat. Nothing travels, each client keeps its model.

    w_k ← local SGD from w_k on client k's data            (w_k starts at the client's own draw)

There is no global model; what is measured is each client's own on its own held-out examples.
"""

from typing import NamedTuple

import torch

from clients.sgd import Carry, SgdConfig, sgd, train_metrics
from fedsim import Done, Mean, Payload, Phase, Strategy, Task
from server.reduce import weighted_mean


class Config(SgdConfig):
    name: str = "local"


class State(NamedTuple):
    rounds: int  # the server has nothing else to know


def build(config: Config, task: Task) -> Strategy[State]:
    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        return {"params": task.init(generator)}

    def final(shared: Payload, carry: Carry) -> Done:
        return Done({}, {"params": carry.params}, train_metrics(carry))

    def finish(state: State, mean: Mean) -> State:
        return State(state.rounds + 1)

    local = sgd(task, config, final=final, remember=remember, start=lambda shared, memory: memory["params"])
    phase = Phase(lambda state: {}, local, weighted_mean(config.weighting), finish)
    return Strategy(
        lambda generator: State(0),
        (phase,),
        lambda state: {},
        (frozenset(),),
        personal=lambda shared, memory: memory["params"],
        is_global=False,
    )
