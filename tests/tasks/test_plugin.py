"""``task.model = "package.module:function"``: a user's own model."""

import pytest
import torch
from tasks.toys import dataset
from torch import nn

from fedsim.config import check
from fedsim.errors import ConfigError
from fedsim.tasks import plugin


def tiny(hidden: int, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, 10))


NAME = "mine.models:tiny"
MINE = plugin(NAME, tiny)


def test_arguments_reach_the_function() -> None:
    config = check(MINE.Config, {"model": NAME, "args": {"hidden": 3, "bias": False}, "dtype": "float64"}, "task")
    task = MINE.build(config, dataset(4, 4), 7)
    params = task.init(torch.Generator().manual_seed(0))
    assert {name: tuple(p.shape) for name, p in params.items()} == {
        "1.weight": (3, 16),
        "3.weight": (10, 3),
        "3.bias": (10,),
    }
    assert params["1.weight"].dtype == torch.float64 and task.population == 7 and task.unbatchable is None
    args = {"hidden": 3, "bias": False}
    assert config.model_dump() == {"model": NAME, "dtype": "float64", "precision": "float32", "args": args}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "task.args: mine.models:tiny missing a required argument: 'hidden'"),
        ({"args": {"hidden": 3, "width": 2}}, "task.args: mine.models:tiny got an unexpected keyword argument 'width'"),
        ({"args": {"hidden": 3}, "arg": 1}, "task.arg: unknown key; did you mean 'args'"),
    ],
)
def test_arguments_that_do_not_fit_are_config_errors(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(MINE.Config, {"model": NAME} | table, "task")


def test_a_class_will_do_and_a_number_will_not() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 10)

    own = plugin("mine:Own", Own)
    assert list(own.build(own.Config(model="mine:Own"), dataset(5), 1).init(torch.Generator())) == ["weight", "bias"]
    with pytest.raises(ConfigError, match=r"'mine:x' must be a function that returns an nn.Module \(got int\)"):
        plugin("mine:x", 3)  # type: ignore[arg-type]
