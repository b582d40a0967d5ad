"""What a peer is given: the same data, partition, cohorts, initial model and network. Needs numpy and torch alone."""

# mypy: ignore-errors
# Run as a script in an environment of its own, where fedsim is not installed.

import json
import os
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import proc  # this folder is where a peer's script starts
import torch
from torch import nn


class World:
    """The arrays that ``arms.export`` wrote, mapped into memory."""

    def __init__(self, path: str) -> None:
        self.spec: dict[str, Any] = json.loads(Path(path).read_text())
        self._folder = Path(self.spec["world"])
        self.task: dict[str, Any] = self.spec["experiment"]["task"]
        self.rounds = int(self.spec["experiment"]["rounds"])
        strategy = self.spec["experiment"]["strategy"]
        self.lr, self.batch_size = strategy.get("lr", 0.0), strategy.get("batch_size", 1)  # a no-op has neither
        self.epochs = strategy.get("epochs", 1)
        self.x, self.y = (torch.from_numpy(self.array(f"train_{n}")) for n in "xy")
        self.cohorts = self.array("cohorts")
        self._order, self._bounds = self.array("order"), self.array("bounds")
        self.clients = len(self._bounds) - 1

    def array(self, name: str) -> Any:
        return np.load(self._folder / f"{name}.npy", mmap_mode="c")

    def rows(self, client: int) -> torch.Tensor:
        """The examples of a client."""
        return torch.from_numpy(np.asarray(self._order[self._bounds[client] : self._bounds[client + 1]]))

    def model(self) -> nn.Module:
        """The network with the initial parameters."""
        model = network(self.task)
        w = {name: torch.from_numpy(np.array(self.array(f"w.{name}"))) for name in model.state_dict()}
        model.load_state_dict(w)
        return model

    def accuracy(self, model: nn.Module) -> float:
        x, y = torch.from_numpy(self.array("test_x")), torch.from_numpy(self.array("test_y"))
        with torch.no_grad():
            right = sum(int((model(x[i : i + 512]).argmax(1) == y[i : i + 512]).sum()) for i in range(0, len(x), 512))
        return right / len(x)

    def round(self, number: int) -> None:
        """Tell the parent that a round has ended."""
        cpu = proc.cpu(os.getpid()) if number in (1, self.rounds) else None
        say({"event": "round", "round": number, "cpu": cpu, "time": time.monotonic()})


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def network(task: dict[str, Any]) -> nn.Module:
    """The benchmark's networks, with the parameter names of fedsim's tasks."""
    if task["model"] == "mlp":
        (hidden,) = task["hidden"]
        layers = [("flat", nn.Flatten()), ("fc1", nn.Linear(784, hidden)), ("relu", nn.ReLU())]
        return nn.Sequential(OrderedDict([*layers, ("fc2", nn.Linear(hidden, 10))]))
    first, second = task["channels"]
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, first, 5),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, 5),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            fc1=nn.Linear(16 * second, task["hidden"]),
            relu3=nn.ReLU(),
            fc2=nn.Linear(task["hidden"], 10),
        )
    )


def train(world: World, model: nn.Module, client: int, generator: torch.Generator) -> int:
    """Local SGD as anybody writes it, and the number of examples."""
    rows = world.rows(client)
    optimizer = torch.optim.SGD(model.parameters(), lr=world.lr)
    for _ in range(world.epochs):
        mine = rows[torch.randperm(len(rows), generator=generator)]
        x, y = world.x[mine], world.y[mine]
        for i in range(0, len(mine), world.batch_size):
            optimizer.zero_grad()
            logits = model(x[i : i + world.batch_size])
            nn.functional.cross_entropy(logits, y[i : i + world.batch_size]).backward()
            optimizer.step()
    return len(rows)


def argument() -> str:
    return sys.argv[1]
