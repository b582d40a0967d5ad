"""A strategy and a task that do nothing, so that what is left is the engine."""

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedsim.config import StrategyConfig, TaskConfig
from fedsim.data.dataset import Dataset
from fedsim.types import Batch, Done, Local, Mean, Metrics, Payload, Phase, Strategy, Task, Tree, Visit
from server.reduce import weighted_mean


class EchoConfig(StrategyConfig):
    """No options."""

    name: Literal["fedsim.benches.plugins:echo"] = "fedsim.benches.plugins:echo"


class State(NamedTuple):
    w: Tree


class echo:
    """Clients send back what they got; the server takes the mean."""

    Config = EchoConfig

    @staticmethod
    def build(config: EchoConfig, task: Task) -> Strategy[State]:
        def init(shared: Payload, memory: Payload, visit: Visit) -> Tree:
            return {name: x.clone() for name, x in shared["params"].items()}  # a client's model is its own

        def final(shared: Payload, carry: Tree) -> Done:
            return Done({"params": carry}, {}, {})

        def finish(state: State, mean: Mean) -> State:
            return State(mean.value["params"])

        phase = Phase(lambda state: {"params": state.w}, Local(init, (), final), weighted_mean(), finish)
        return Strategy(
            lambda generator: State(task.init(generator)), (phase,), lambda state: state.w, (frozenset({"params"}),)
        )


class SizedConfig(TaskConfig):
    model: Literal["fedsim.benches.plugins:sized"] = "fedsim.benches.plugins:sized"
    megabytes: float = Field(1.0, gt=0, description="of float32 parameters, in tensors of 4 MB at most")


class sized:
    """A model of a given size that nobody trains."""

    Config = SizedConfig

    @staticmethod
    def build(config: SizedConfig, dataset: Dataset, population: int) -> Task:
        numbers = round(config.megabytes * 1e6 / 4)

        def init(generator: torch.Generator) -> Tree:
            sizes = [min(1 << 20, numbers - begin) for begin in range(0, numbers, 1 << 20)]
            return {f"w{i}": torch.randn(n, generator=generator) for i, n in enumerate(sizes)}

        def predict(params: Tree, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), dataset.classes)

        def loss(params: Tree, batch: Batch) -> Tensor:
            return torch.stack([x.sum() for x in params.values()]).sum() * 0

        def score(params: Tree, batch: Batch) -> Metrics:
            zero = torch.zeros(())
            return {"count": zero + len(batch.y), "correct": zero, "loss": zero}

        return Task(init, predict, loss, score, dataset.classes, population)
