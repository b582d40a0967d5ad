"""FedAdagrad (Reddi et al. 2021, arXiv:2003.00295), Algorithm 2.

Δ ← Σ p_k (w_k − w) / Σ p_k
m ← β₁ m + (1 − β₁) Δ                 (m starts at 0; the paper's experiments have β₁ = 0)
v ← v + Δ²                            (v starts at τ²)
w ← w + η m / (√v + τ)
"""

from pydantic import Field

from fedsim import Strategy, Task
from server import optim
from strategies.fedopt import AdaptiveConfig, State, fedopt


class Config(AdaptiveConfig):
    name: str = "fedadagrad"
    beta1: float = Field(0.0, ge=0, lt=1, description="β₁")


def build(config: Config, task: Task) -> Strategy[State]:
    return fedopt(config, task, optim.adaptive("adagrad", config.server_lr, config.beta1, 0.0, config.tau))
