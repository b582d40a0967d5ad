"""A FedAvg whose clients can end the process that they run in; for tests of the engine."""

import os
import signal
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from fedsim import Payload, Strategy, Task
from strategies import fedavg


class Config(fedavg.Config):
    name: Literal["deadly:deadly"] = "deadly:deadly"
    marker: str = Field("", description="a file: a worker that cannot create it lives; '' kills every time")
    client_examples: int = Field(0, description="the client with so many examples kills; 0: nobody")


class deadly:
    """The plugin."""

    Config = Config

    @staticmethod
    def build(config: Config, task: Task) -> Strategy[fedavg.State]:
        base = fedavg.build(config, task)
        phase = base.phases[0]
        local = phase.local

        def init(shared: Payload, memory: Payload, visit: object) -> object:
            # Known by its size; under vmap there is no number to look at, hence ``unbatchable`` below.
            if int(visit.examples) == config.client_examples:  # type: ignore[attr-defined]
                kill(config.marker)
            return local.init(shared, memory, visit)  # type: ignore[arg-type]

        return base._replace(phases=(phase._replace(local=local._replace(init=init, unbatchable="kills")),))


def kill(marker: str) -> None:
    """End this process, unless it was done before."""
    if marker:
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            return
    torch.set_num_threads(1)
    os.kill(os.getpid(), signal.SIGKILL)
