"""BlazeFL, with the handler and the trainer of its own FedAvg, in the loop that its documentation shows.

BlazeFL samples clients by itself: a handler that takes them from our schedule is the only thing that is changed here;
``bench.BACKPORT`` is what its package needs on our Python. Of its trainers this is the one without threads: they are
meant for a Python without a lock, and cost half as much again on this one.
"""

# mypy: ignore-errors
# Run as a script in an environment of its own, where fedsim is not installed.

import copy
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler, FedAvgPartitionType
from blazefl.core import FilteredDataset, ModelSelector, PartitionedDataset
from torch.utils.data import DataLoader
from world import World, argument, say

torch.set_num_threads(1)
world = World(argument())


class Selector(ModelSelector[str]):
    """Knows one model, with the initial parameters."""

    def __init__(self) -> None:
        self.model = world.model()

    def select_model(self, model_name: str) -> torch.nn.Module:
        return copy.deepcopy(self.model)


class Partition(PartitionedDataset[FedAvgPartitionType]):
    """Every client's examples, as BlazeFL holds them."""

    def __init__(self) -> None:
        y = world.y.tolist()
        self.train = [FilteredDataset(world.rows(client).tolist(), world.x, y) for client in range(world.clients)]

    def get_dataset(self, type_: FedAvgPartitionType, cid: int) -> FilteredDataset:
        return self.train[cid]

    def get_dataloader(
        self, type_: FedAvgPartitionType, cid: int, batch_size: int, generator: torch.Generator
    ) -> DataLoader:
        return DataLoader(self.get_dataset(type_, cid), batch_size, shuffle=True, generator=generator)


class Scheduled(FedAvgBaseServerHandler):
    """The server, with our cohorts."""

    def sample_clients(self) -> list[int]:
        return world.cohorts[self.round].tolist()


selector, dataset, seed = Selector(), Partition(), world.spec["experiment"]["seed"]
size = len(world.cohorts[0])
ratio = min(1.0, (size + 0.5) / world.clients)  # it multiplies this by the clients and cuts the fraction off
handler = Scheduled(selector, "", dataset, world.rounds, world.clients, ratio, "cpu", world.batch_size, seed)
trainer = FedAvgBaseClientTrainer(
    selector, "", dataset, "cpu", world.clients, world.epochs, world.batch_size, world.lr, seed
)
while not handler.is_stopped():
    cohort = handler.sample_clients()
    trainer.local_process(handler.downlink_package(), cohort)
    for upload in trainer.uplink_package():
        handler.load(upload)
    world.round(handler.round)
say({"event": "end", "accuracy": world.accuracy(handler.model)})
