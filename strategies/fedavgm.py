"""FedAvgM: FedAvg with server momentum (Hsu et al. 2019, arXiv:1909.06335, section 4.3).

Δ ← Σ p_k (w_k − w) / Σ p_k
m ← β m + Δ
w ← w + η_s m                         (β = 0 is FedAvg)
"""

from pydantic import Field

from clients.sgd import SgdConfig
from fedsim import Strategy, Task
from server import optim
from strategies.fedopt import State, fedopt


class Config(SgdConfig):
    name: str = "fedavgm"
    server_lr: float = Field(1.0, gt=0, description="η_s")
    beta: float = Field(0.9, ge=0, lt=1, description="β, server momentum")


def build(config: Config, task: Task) -> Strategy[State]:
    return fedopt(config, task, optim.momentum(config.server_lr, config.beta))
