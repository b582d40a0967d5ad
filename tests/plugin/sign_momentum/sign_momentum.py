"""A server that follows signs only, after signSGD with momentum (Bernstein et al. 2018, arXiv:1802.04434), Algorithm 2.

Δ ← Σ p_k (w_k − w) / Σ p_k
m ← β m + (1 − β) Δ
w ← w + η sign(m)
"""

from typing import NamedTuple

import torch
from pydantic import Field

from clients.sgd import SgdConfig, sgd
from fedsim import Mean, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(SgdConfig):
    name: str = "sign_momentum"
    server_lr: float = Field(0.01, gt=0, description="η")
    beta: float = Field(0.9, ge=0, lt=1, description="β")


class State(NamedTuple):
    w: Tree
    m: Tree


def build(config: Config, task: Task) -> Strategy[State]:
    def init(generator: torch.Generator) -> State:
        w = task.init(generator)
        return State(w, tree.zeros(w))

    def finish(state: State, mean: Mean) -> State:
        m = tree.axpy(1 - config.beta, mean.value["delta"], tree.scale(config.beta, state.m))
        return State(tree.axpy(config.server_lr, tree.map(torch.sign, m), state.w), m)

    phase = Phase(lambda state: {"params": state.w}, sgd(task, config), weighted_mean(config.weighting), finish)
    return Strategy(init, (phase,), lambda state: state.w, sends=(frozenset({"delta"}),))
