"""Dropout draws from PyTorch's global generator; the engine lends it each client's own stream."""

import torch
from torch import nn
from worlds import KEY, grid, points

from fedsim.tasks.module import from_module
from server.loop import run_round
from strategies import fedavg

WORLD = points([[[0.1], [2.0]], [[5.0], [1.0]], [[3.0]]], torch.float32)


def final(salt: int) -> torch.Tensor:
    torch.manual_seed(salt)
    data = WORLD.dataset.train
    task = from_module(
        lambda: nn.Sequential(nn.Linear(1, 32), nn.Dropout(0.5), nn.Linear(32, 2)),
        2,
        3,
        torch.float32,
        (data.x, data.y),
    )
    assert task.unbatchable and "dropout" in task.unbatchable.lower()
    strategy = fedavg.build(fedavg.Config(lr=0.1, batch_size=2), task)
    executor, state = grid(WORLD, execution="batched"), strategy.init(KEY.torch())
    for r in (1, 2):
        state, _ = run_round(strategy, state, r, [0, 1, 2], executor, KEY)
    return torch.cat([x.flatten() for x in strategy.params(state).values()])


def test_a_model_with_dropout_gives_the_same_bits_whatever_the_global_generator_holds() -> None:
    assert torch.equal(final(1), final(2))


def test_clients_and_rounds_drop_differently() -> None:
    """With every mask equal, two clients with the same example would send the same update; here they must not."""
    world = points([[[1.0]], [[1.0]]], torch.float32)
    data = world.dataset.train
    task = from_module(
        lambda: nn.Sequential(nn.Linear(1, 32), nn.Dropout(0.5), nn.Linear(32, 2)),
        2,
        2,
        torch.float32,
        (data.x, data.y),
    )
    strategy = fedavg.build(fedavg.Config(lr=0.1), task)
    state = strategy.init(KEY.torch())
    alone = [run_round(strategy, state, r, [c], grid(world), KEY)[0].w["0.weight"] for r, c in ((1, 0), (1, 1), (2, 0))]
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], alone[2])
