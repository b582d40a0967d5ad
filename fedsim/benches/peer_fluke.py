"""fluke, in one process: its FedAVG, with its own server, clients, channel and loaders.

fluke samples clients by itself: a server that takes them from our schedule is the only thing that is changed. Its
loaders stop before a last batch of one example unless told not to, as they are here. What needs torchvision, wandb or
clearml are its data sets, networks and loggers; they are not imported.
"""

# mypy: ignore-errors
# Run as a script in an environment of its own, where fedsim is not installed.

import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.server import Server
from fluke.utils import FederationObserver
from world import World, argument, say

torch.set_num_threads(1)
world = World(argument())


class Scheduled(Server):
    """The server, with our cohorts."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.cohorts = iter(world.cohorts.tolist())

    def get_eligible_clients(self, eligible_perc: float) -> Sequence[Client]:
        return [self.clients[client] for client in next(self.cohorts)]


class Averaging(FedAVG):
    def get_server_class(self) -> type[Server]:
        return Scheduled


class Clock(FederationObserver):
    def end_round(self, round: int) -> None:
        world.round(round)


def loader(client: int) -> FastDataLoader:
    """A client's examples."""
    rows = world.rows(client)
    return FastDataLoader(
        world.x[rows],
        world.y[rows],
        num_labels=10,
        batch_size=world.batch_size,
        shuffle=True,
        skip_singleton=False,
    )


env = FlukeENV()
env.set_seed(world.spec["experiment"]["seed"])
env.set_eval_cfg(server=False)
container = DummyDataContainer(
    [loader(client) for client in range(world.clients)], [None] * world.clients, None, num_classes=10
)
model = world.model()
settings = DDict(
    model=model,
    client=DDict(
        batch_size=world.batch_size,
        local_epochs=world.epochs,
        loss=torch.nn.CrossEntropyLoss,
        optimizer=DDict(name="SGD", lr=world.lr),
        scheduler=DDict(name="StepLR", step_size=1, gamma=1.0),
    ),
    server=DDict(weighted=True),
)
algorithm = Averaging(world.clients, DataSplitter(container), settings)
algorithm.set_callbacks([Clock()])
algorithm.run(world.rounds, len(world.cohorts[0]) / world.clients)
say({"event": "end", "accuracy": world.accuracy(algorithm.server.model)})
