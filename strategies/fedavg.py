"""FedAvg (McMahan et al. 2017, arXiv:1602.05629), Algorithm 1, in the form of a server step.

    w_k ← local SGD from w on client k's data          for k in the cohort
    Δ   ← Σ p_k (w_k − w) / Σ p_k                      (p_k = n_k, or 1 with uniform weighting)
    w   ← w + η_s Δ                                    (η_s = 1 is FedAvg)

``server_lr_schedule`` makes η_s a function of the round, as ``lr_schedule`` does with the clients' η.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field

from clients.sgd import RateSchedule, SgdConfig, scheduled, sgd
from fedsim import Mean, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(SgdConfig):
    name: str = "fedavg"
    server_lr: float = Field(1.0, gt=0, description="η_s, the server's step along the mean update")
    server_lr_schedule: Annotated[RateSchedule, Field(discriminator="name")] | None = None


class State(NamedTuple):
    w: Tree
    rounds: int = 0  # that w has seen


def build(config: Config, task: Task) -> Strategy[State]:
    def init(generator: torch.Generator) -> State:
        return State(task.init(generator))

    def finish(state: State, mean: Mean) -> State:
        rounds = state.rounds + 1
        eta = scheduled(config.server_lr, config.server_lr_schedule, rounds)
        return State(tree.axpy(eta, mean.value["delta"], state.w), rounds)

    phase = Phase(lambda state: {"params": state.w}, sgd(task, config), weighted_mean(config.weighting), finish)
    return Strategy(init, (phase,), lambda state: state.w, (frozenset({"delta"}),))
