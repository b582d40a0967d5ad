"""FedProx (Li et al. 2020, arXiv:1812.06127) on FedZO's estimates, as arXiv:2308.04077 compares with it.

    each step has     g ← Δ_i(u) + μ (u − x)

Their coefficient is 1, beside which the estimate of a function on [0, 1]^d is small: the pull decides. μ = 0 is FedZO.
"""

from pydantic import Field
from torch import Tensor

from clients.zeroth_order import by_differences, flat
from fedsim import Payload, Strategy, Task
from strategies import fedzo
from strategies.fedzo import State


class Config(fedzo.Config):
    name: str = "fedprox_zo"
    mu: float = Field(1.0, ge=0, description="μ, the pull towards the global point")


def build(config: Config, task: Task) -> Strategy[State]:
    def pull(shared: Payload, memory: Payload, u: Tensor) -> Tensor:
        return config.mu * (u - flat(shared["params"]))

    base = fedzo.build(config, task)
    local = by_differences(task, config, pull if config.mu else None)
    return base._replace(phases=(base.phases[0]._replace(local=local), *base.phases[1:]))
