"""PPSGD (Bietti et al. 2022, arXiv:2202.05318): personalised private SGD, both parts of the model in one step.

    client i   base and personal layers ← one SGD step on the same batch                        (FedPer's pass)
    sends      the change of the base, protected by what [privacy] asks for; personal layers never leave
    server     base ← base + Σ p_k (base_k − base) / Σ p_k

mode "client", the paper's: the sum of clipped updates gets the noise, and a client's personal layers, which are made of
its own data alone, need none. mode "example": the gradient by both parts is noisy, for the reason that
``strategies.centaur`` gives. Without [privacy] this is FedPer.
"""

from fedsim import Strategy, Task
from strategies import fedper
from strategies.fedper import State


class Config(fedper.Config):
    name: str = "ppsgd"


def build(config: Config, task: Task) -> Strategy[State]:
    return fedper.build(config, task)
