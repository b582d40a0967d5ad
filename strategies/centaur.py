"""CENTAUR (Shen et al. 2023, arXiv:2309.05505): a shared representation that is learned under differential privacy.

    client i   h_i ← SGD over the head alone, then φ_i ← SGD over the representation alone      (FedRep's two passes)
    sends      φ_i − φ, protected by what [privacy] asks for; the head never leaves
    server     φ ← φ + Σ p_k (φ_k − φ) / Σ p_k

mode "client": the sum of clipped updates gets the noise. mode "example": every gradient of both passes is noisy.

Deviation: the copy of it in HyperFL's experiments trains the head without noise and counts the representation's steps
alone. Each gradient of the representation then depends on all of a client's examples through the head, so that clipping
the gradient of one example bounds nothing, and the ε that is printed is not one. Without [privacy] this is FedRep.
"""

from fedsim import Strategy, Task
from strategies import fedrep
from strategies.fedrep import State


class Config(fedrep.Config):
    name: str = "centaur"


def build(config: Config, task: Task) -> Strategy[State]:
    return fedrep.build(config, task)
