"""The form that FedAvgM, FedAdagrad, FedAdam and FedYogi share: local SGD, and a server optimiser on the mean update.

Δ ← Σ p_k (w_k − w) / Σ p_k,    w ← optimiser(w, Δ)          (Reddi et al. 2021, arXiv:2003.00295, Algorithm 1)
"""

from typing import NamedTuple

import torch
from pydantic import Field

from clients.sgd import SgdConfig, sgd
from fedsim import Mean, Phase, Strategy, Task, Tree
from server.optim import Moments, ServerOptimizer
from server.reduce import weighted_mean


class AdaptiveConfig(SgdConfig):
    """What the adaptive server optimisers share."""

    server_lr: float = Field(0.01, gt=0, description="η")
    beta1: float = Field(0.9, ge=0, lt=1, description="β₁")
    tau: float = Field(1e-3, gt=0, description="τ, the degree of adaptivity")


class State(NamedTuple):
    w: Tree
    moments: Moments


def fedopt(config: SgdConfig, task: Task, optimizer: ServerOptimizer) -> Strategy[State]:
    """FedAvg with a server optimiser in the place of its last line."""

    def init(generator: torch.Generator) -> State:
        w = task.init(generator)
        return State(w, optimizer.init(w))

    def finish(state: State, mean: Mean) -> State:
        return State(*optimizer.step(state.w, mean.value["delta"], state.moments))

    phase = Phase(lambda state: {"params": state.w}, sgd(task, config), weighted_mean(config.weighting), finish)
    return Strategy(init, (phase,), lambda state: state.w, (frozenset({"delta"}),))
