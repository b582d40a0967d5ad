"""A model generated from its own input, and the digits at many angles that it learns."""

import pytest
import torch

from clients import conditional
from fedsim.autodiff import value_and_grad
from fedsim.data import rotated_digits
from fedsim.data.dataset import Dataset, Split
from fedsim.rng import Key
from fedsim.types import Batch, Task

KEY = Key.root(8)


def world(parametrization: str) -> tuple[Task, Batch]:
    g = KEY.at("world").torch()
    x = torch.cat([torch.randn(6, 5, generator=g), torch.rand(6, 1, generator=g)], 1).double()
    y = torch.randint(3, (6,), generator=g)
    config = conditional.Config(widths=(4,), hidden=(5,), parametrization=parametrization, dtype="float64")  # type: ignore[arg-type]
    return conditional.build(config, Dataset("toy", Split(x, y), Split(x, y), 3), 1), Batch(x, y)


@pytest.mark.parametrize("parametrization", ["kaiming", "mip"])
def test_every_example_has_the_network_of_its_own_angle(parametrization: str) -> None:
    task, batch = world(parametrization)
    phi = task.init(KEY.torch())
    together = task.predict(phi, batch.x)
    for i in range(len(batch.x)):
        torch.testing.assert_close(together[i : i + 1], task.predict(phi, batch.x[i : i + 1]))
    other = batch.x.clone()
    other[:, -1] = 1 - other[:, -1]
    assert not torch.allclose(task.predict(phi, other), together)


def test_its_gradient_is_the_finite_difference() -> None:
    task, batch = world("mip")
    phi = task.init(KEY.torch())
    _, g = value_and_grad(task.loss)(phi, batch)
    for name, x in phi.items():
        step = torch.randn(x.shape, generator=KEY.at(name).torch(), dtype=torch.float64)
        up, down = (task.loss(phi | {name: x + h * step}, batch) for h in (1e-6, -1e-6))
        torch.testing.assert_close((up - down) / 2e-6, (g[name] * step).sum(), rtol=1e-5, atol=1e-8)


def test_angles() -> None:
    dataset = rotated_digits.build(rotated_digits.Config(angles=4))
    plain = len(dataset.train.y) // 4
    assert dataset.train.x.shape == (4 * plain, 65) and dataset.train.client is not None
    assert sorted(set(dataset.train.x[:, -1].tolist())) == [0.125, 0.375, 0.625, 0.875]
    assert dataset.train.client[0] == "angle-000" and dataset.train.client[-1] == "angle-003"
    test = len(dataset.test.y) // 9
    first, last = dataset.test.x[:test], dataset.test.x[-test:]
    assert first[0, -1] == 0 and last[0, -1] == 1
    # Half a turn is the image from its end to its beginning.
    torch.testing.assert_close(last[:, :64], first[:, :64].flip(1), rtol=0, atol=1e-5)


def test_a_quarter_turn() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8)
    torch.testing.assert_close(rotated_digits.rotated(x, 0.5)[0, 0], x[0, 0].rot90(1), rtol=0, atol=1e-4)
