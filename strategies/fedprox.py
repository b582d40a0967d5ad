"""FedProx (Li et al. 2020, arXiv:1812.06127), Algorithm 2 with local SGD as the inexact solver.

    client k minimises   h_k(w; wᵗ) = F_k(w) + μ/2 ‖w − wᵗ‖²
    so each step has     g ← ∇F_k(w) + μ (w − wᵗ)
    server               wᵗ⁺¹ ← wᵗ + η_s Σ p_k (w_k − wᵗ) / Σ p_k

μ = 0 is FedAvg.
"""

from pydantic import Field

from clients.sgd import sgd
from fedsim import Payload, Strategy, Task, Tree, tree
from strategies import fedavg
from strategies.fedavg import State


class Config(fedavg.Config):
    name: str = "fedprox"
    mu: float = Field(0.01, ge=0, description="μ, the pull towards the global model")


def build(config: Config, task: Task) -> Strategy[State]:
    def pull(shared: Payload, memory: Payload, w: Tree) -> Tree:
        return tree.scale(config.mu, tree.sub(w, shared["params"]))

    base = fedavg.build(config, task)
    local = sgd(task, config, pull if config.mu else None)
    return base._replace(phases=(base.phases[0]._replace(local=local),))
