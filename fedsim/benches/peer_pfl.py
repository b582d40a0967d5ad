"""pfl-research (the package is named pfl), in one process: its SimulatedBackend and FederatedAveraging."""

# mypy: ignore-errors
# Run as a script in an environment of its own, where fedsim is not installed.

import itertools
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PFL_PYTORCH_DEVICE"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from world import World, argument, say

torch.set_num_threads(1)
world = World(argument())


class Net(nn.Module):
    """The network with the two functions that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = world.model()

    def loss(self, x: torch.Tensor, y: torch.Tensor, is_eval: bool = False) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        world.round(central_iteration + 1)
        return False, Metrics()


order = itertools.chain.from_iterable(world.cohorts.tolist())
visits = itertools.count()


def dataset(client: int) -> Dataset:
    """pfl does not shuffle, so it is done here, as the other arms do."""
    rows = world.rows(client)
    generator = torch.Generator().manual_seed(next(visits))
    mine = rows[torch.randperm(len(rows), generator=generator)]
    return Dataset((world.x[mine], world.y[mine]), user_id=str(client))


data = FederatedDataset(dataset, lambda: next(order))
net = Net()
model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
backend = SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])
hyper = NNTrainHyperParams(
    local_num_epochs=world.epochs, local_learning_rate=world.lr, local_batch_size=world.batch_size
)
params = NNAlgorithmParams(
    central_num_iterations=world.rounds,
    evaluation_frequency=10**9,
    train_cohort_size=len(world.cohorts[0]),
    val_cohort_size=0,
)
FederatedAveraging().run(params, backend, model, hyper, None, [Clock()])
say({"event": "end", "accuracy": world.accuracy(net.net)})
