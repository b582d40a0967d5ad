"""``fedsim new strategy NAME``: a strategy that works, to be changed, and an experiment that runs it."""

import importlib.util
import keyword
from pathlib import Path

from fedsim import files
from fedsim.errors import ConfigError

STRATEGY = '''"""{title}: what it does, in one line (authors year, arXiv:0000.00000), Algorithm 1.

    w_k ← local SGD from w on client k's data          for k in the cohort
    Δ   ← Σ p_k (w_k − w) / Σ p_k                      (p_k = n_k)
    m   ← β m + Δ
    w   ← w + η_s m

Everything here is a pure function of its arguments: the engine owns the loops, the randomness and the failures.
Try it with `fedsim check {name}.py` and `fedsim run {name}.toml`.
"""

from typing import NamedTuple

import torch
from pydantic import Field

from clients.sgd import SgdConfig, sgd
from fedsim import Mean, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(SgdConfig):
    """The table [strategy]: what SgdConfig has (lr, epochs, batch_size …), and settings of your own."""

    server_lr: float = Field(1.0, gt=0, description="η_s")
    beta: float = Field(0.5, ge=0, lt=1, description="β")


class State(NamedTuple):
    """What the server knows. It is a value: each round makes a new one, and a checkpoint holds it."""

    w: Tree
    m: Tree


def build(config: Config, task: Task) -> Strategy[State]:
    def init(generator: torch.Generator) -> State:
        w = task.init(generator)
        return State(w, tree.zeros(w))

    def finish(state: State, mean: Mean) -> State:
        m = tree.axpy(config.beta, state.m, mean.value["delta"])
        return State(tree.axpy(config.server_lr, m, state.w), m)

    # sgd takes a correction of the gradient, a final step that says what is sent, and what a client remembers.
    local = sgd(task, config)
    phase = Phase(lambda state: {{"params": state.w}}, local, weighted_mean(config.weighting), finish)
    return Strategy(init, (phase,), lambda state: state.w, sends=(frozenset({{"delta"}}),))
'''

EXPERIMENT = """name = "{name}"
seed = 1
rounds = 20

[data]
name = "digits"
partition = {{ name = "dirichlet", clients = 20, alpha = 0.5 }}

[task]
model = "mlp"
hidden = [64]

[strategy]
name = "{name}.py"
cohort = 5
lr = 0.1
epochs = 2
batch_size = 16
"""


def strategy(name: str, folder: Path) -> list[Path]:
    """Write ``NAME.py`` and ``NAME.toml`` into a folder and return their paths, or raise ``ConfigError``."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"'{name}' must be a Python identifier, such as 'my_fedavg'")
    made = {folder / f"{name}.py": STRATEGY, folder / f"{name}.toml": EXPERIMENT}
    for path in made:
        if path.exists():
            raise ConfigError(f"{path} exists already")
    if importlib.util.find_spec(name) is not None:
        raise ConfigError(f"'{name}' is the name of an installed module, which {name}.py would hide; choose another")
    title = name.replace("_", " ").capitalize()
    try:
        for path, template in made.items():
            files.write(path, template.format(name=name, title=title).encode())
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written: {e.strerror}") from None
    return list(made)
