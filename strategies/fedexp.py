"""FedExP (Jhunjhunwala et al. 2023, arXiv:2301.09604), Algorithm 1: the server's step by extrapolation.

    Δ_i = w − w_i,   Δ̄ = Σ p_i Δ_i / Σ p_i
    η_g ← max(1, Σ p_i ‖Δ_i‖² / (2 Σ p_i (‖Δ̄‖² + ε)))        (p_i = 1/M in the paper)
    w ← w − η_g Δ̄

Equal updates give η_g = 1, which is FedAvg. The paper reports the mean of the last two iterates; here the last one is.
"""

from typing import NamedTuple

import torch
from pydantic import Field

from clients.sgd import SgdConfig, sgd
from fedsim import Mean, Phase, Report, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(SgdConfig):
    name: str = "fedexp"
    epsilon: float = Field(1e-3, ge=0, description="ε")


class State(NamedTuple):
    w: Tree
    eta: float  # η_g of the last round


def build(config: Config, task: Task) -> Strategy[State]:
    def init(generator: torch.Generator) -> State:
        return State(task.init(generator), 1.0)

    def square(delta: Tree) -> float:
        wide = {name: x.double() for name, x in delta.items()}
        return float(tree.dot(wide, wide))

    def gauge(report: Report) -> dict[str, float]:
        return {"squared_norm": square(report.value["delta"])}

    def finish(state: State, mean: Mean) -> State:
        spread, of_mean = mean.metrics["squared_norm"], square(mean.value["delta"]) + config.epsilon
        eta = max(1.0, spread / (2 * of_mean)) if of_mean else 1.0
        return State(tree.axpy(eta, mean.value["delta"], state.w), eta)

    phase = Phase(lambda state: {"params": state.w}, sgd(task, config), weighted_mean(config.weighting, gauge), finish)
    return Strategy(
        init, (phase,), lambda state: state.w, (frozenset({"delta"}),), gauges=lambda state: {"server_rate": state.eta}
    )
