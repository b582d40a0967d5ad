"""Local SGD and Adam against torch.optim, and by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import worlds

from clients.sgd import Exponential, SgdConfig, sgd
from fedsim import block
from fedsim.block import Guest, Work
from fedsim.rng import Key
from fedsim.tasks.module import from_module
from fedsim.types import Batch, Task

KEY = Key.root(5)
N, D, CLASSES = 23, 6, 4


def world(dtype: torch.dtype) -> tuple[Any, Task]:
    g = torch.Generator().manual_seed(3)
    federation = worlds.points(
        torch.randn(N, D, generator=g).tolist() and [torch.randn(N, D, generator=g).tolist()], dtype
    )
    labels = torch.randint(CLASSES, (N,), generator=g)
    split = federation.dataset.train._replace(y=labels)
    dataset = federation.dataset._replace(train=split, test=split, classes=CLASSES)
    federation = replace(federation, dataset=dataset)

    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, CLASSES))

    return federation, from_module(model, CLASSES, 1, dtype, (split.x[:1], split.y[:1]))


def by_torch(federation: Any, task: Task, config: SgdConfig, round: int, start: dict[str, torch.Tensor]) -> Any:
    """The same visit with torch.optim, on the batches that the engine takes."""
    w = {name: x.clone().requires_grad_() for name, x in start.items()}
    lr = config.rate(round)
    if config.optimizer == "adam":
        optimizer: Any = torch.optim.Adam(w.values(), lr=lr, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(w.values(), lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)
    data = federation.dataset.train
    work = Work(round, 0, sgd(task, config), {"params": start}, KEY)
    for positions in block.batches(config.schedule(), N, work.stream(0).at("batches", 0)):
        optimizer.zero_grad()
        task.loss(w, Batch(data.x[positions], data.y[positions])).backward()
        optimizer.step()
    return {name: x.detach() for name, x in w.items()}


CONFIGS = [
    {"lr": 0.3, "batch_size": 5, "epochs": 3},
    {"lr": 0.1, "batch_size": 5, "epochs": 3, "momentum": 0.9},
    {"lr": 0.1, "batch_size": 4, "steps": 13, "momentum": 0.5, "weight_decay": 0.05},
    {"lr": 0.01, "batch_size": 7, "epochs": 4, "optimizer": "adam"},
    {"lr": 0.01, "batch_size": 7, "epochs": 4, "optimizer": "adam", "weight_decay": 0.1},
    {"lr": 0.2, "batch_size": 64, "lr_schedule": Exponential(name="exponential", factor=0.5)},
]


@pytest.mark.parametrize("execution", ["plain", "batched"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("settings", CONFIGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items())[:60])
def test_as_torch_does_it(settings: dict[str, Any], dtype: torch.dtype, tolerance: float, execution: str) -> None:
    federation, task = world(dtype)
    config = SgdConfig(name="x", **settings)
    start = task.init(KEY.at("init").torch())
    work = Work(3, 0, sgd(task, config), {"params": start}, KEY)
    guest = Guest(0, None)
    done = (
        block.one(work, federation, guest)[0]
        if execution == "plain"
        else block.batched(work, federation, [guest])[0][0]
    )
    mine = {name: start[name] + x for name, x in done.value["delta"].items()}
    torch.testing.assert_close(mine, by_torch(federation, task, config, 3, start), rtol=0, atol=tolerance)


def test_schedules_by_hand() -> None:
    def rates(**schedule: Any) -> list[float]:
        config = SgdConfig.model_validate({"name": "x", "lr": 0.8, "lr_schedule": schedule})
        return [config.rate(r) for r in range(1, 6)]

    assert SgdConfig(name="x", lr=0.8).rate(99) == 0.8
    assert rates(name="exponential", factor=0.5) == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.05])
    assert rates(name="step", every=2, factor=0.1) == pytest.approx([0.8, 0.8, 0.08, 0.08, 0.008])
    assert rates(name="cosine", rounds=4) == pytest.approx([0.8, 0.8 * 0.853553, 0.4, 0.8 * 0.146447, 0.0], abs=1e-6)


def test_train_loss_is_the_mean_over_examples_as_they_were_seen() -> None:
    """With η so small that nothing moves it is the loss of the start, whatever the batches: a short one counts less."""
    federation, task = world(torch.float64)
    start = task.init(KEY.at("init").torch())
    data = federation.dataset.train
    expected = float(task.loss(start, Batch(data.x, data.y)))
    for size in (1, 4, 23, 100):
        config = SgdConfig(name="x", lr=1e-12, batch_size=size, epochs=2)
        work = Work(1, 0, sgd(task, config), {"params": start}, KEY)
        for done, _ in (
            [block.one(work, federation, Guest(0, None))],
            block.batched(work, federation, [Guest(0, None)]),
        )[0]:
            assert float(done.metrics["train_loss"]) == pytest.approx(expected, rel=1e-9)


def test_correction_and_start() -> None:
    """``correction`` is added to each gradient: with −∇F it holds the client still; ``start`` says where it begins."""
    federation = worlds.points([[[1.0], [3.0]]])
    task = worlds.quadratic(federation, [5.0])
    config = SgdConfig(name="x", lr=0.5, batch_size=8, epochs=3)
    shared = {"params": {"w": torch.tensor([5.0], dtype=torch.float64)}}

    def still(shared: Any, memory: Any, w: Any) -> Any:
        return {"w": -(w["w"] - 2.0)}  # the points' mean is 2

    done, n = block.one(Work(1, 0, sgd(task, config, still), shared, KEY), federation, Guest(0, None))
    assert float(done.value["delta"]["w"]) == 0.0 and n == 2

    half = sgd(task, config, start=lambda shared, memory: {"w": shared["params"]["w"] / 2})
    done, _ = block.one(Work(1, 0, half, shared, KEY), federation, Guest(0, None))
    assert float(done.value["delta"]["w"]) == pytest.approx(2 + 0.5 / 8 - 5)  # 2.5 → 2.25 → 2.125 → 2.0625
