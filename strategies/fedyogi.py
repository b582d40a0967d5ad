"""FedYogi (Reddi et al. 2021, arXiv:2003.00295), Algorithm 2.

Δ ← Σ p_k (w_k − w) / Σ p_k
m ← β₁ m + (1 − β₁) Δ                 (m starts at 0)
v ← v − (1 − β₂) Δ² sign(v − Δ²)          (v starts at τ²)
w ← w + η m / (√v + τ)
"""

from pydantic import Field

from fedsim import Strategy, Task
from server import optim
from strategies.fedopt import AdaptiveConfig, State, fedopt


class Config(AdaptiveConfig):
    name: str = "fedyogi"
    beta2: float = Field(0.99, ge=0, lt=1, description="β₂")


def build(config: Config, task: Task) -> Strategy[State]:
    return fedopt(config, task, optim.adaptive("yogi", config.server_lr, config.beta1, config.beta2, config.tau))
