"""`objective`: minimise the mean of clients' functions, which can only be queried. What every such task is made of.

A client's one example describes its function: f_i(u) = ``value(u, example)`` for u in [0, 1]^d. There is nothing to
classify, so the task has no classes; what is measured is F(u) = 1/N Σ_i f_i(u), under the name "loss".

A user's own function is ``function = "package.module:name"``, called as ``name(u, example)`` with tensors, u mapped to
[low, high]^d; with the data set `numbered`, ``example`` is the client's number. It may return a number or a tensor of
shape (). A function of torch operations alone may be called for many points at once (``batched = true``).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim import registry
from fedsim.config import TaskConfig
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.types import Batch, Metrics, Task, Tree

Value = Callable[[Tensor, Tensor], Any]
"""(u (d,), example (…)) -> the value of a client's function there, a tensor of shape () or a number."""


class Config(TaskConfig):
    model: Literal["objective"] = "objective"
    function: str = Field(description="package.module:name of the function, or file.py:name")
    dimension: int = Field(ge=1, description="d")
    low: float = Field(0.0, description="where the function's domain begins, in every coordinate")
    high: float = Field(1.0, description="where it ends")
    start: float | None = Field(
        None, ge=0, le=1, description="every coordinate of the first u; none: uniform in [0, 1]"
    )
    batched: bool = Field(False, description="torch operations alone: call it for many points at once")


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for a function that is not there, or bounds in the wrong order."""
    if not config.low < config.high:
        raise ConfigError(f"task.high: must be greater than low = {config.low} (got {config.high})")
    function, low, width = imported(config.function), config.low, config.high - config.low
    why = None if config.batched else "the objective is a function of the user's own (task.batched)"
    start = uniform if config.start is None else constant(config.start)
    return task(lambda u, example: function(low + width * u, example), config.dimension, start, config, population, why)


def imported(name: str) -> Value:
    """The function ``package.module:name``, or ``file.py:name``. Raises ``ConfigError``."""
    if not registry.is_own(name):
        raise ConfigError(f"task.function: must be package.module:name or file.py:name (got '{name}')")
    try:
        found = registry.own(name)
    except ConfigError as e:
        raise ConfigError(*(f"task.function: {problem}" for problem in e.problems)) from e
    if not callable(found):
        raise ConfigError(f"task.function: '{name}' is not a function")
    return found  # type: ignore[no-any-return]


def uniform(generator: torch.Generator, dimension: int) -> Tensor:
    """A first point, uniform in [0, 1]^d."""
    return torch.rand(dimension, generator=generator, dtype=torch.float64, device=generator.device)


def constant(value: float) -> Callable[[torch.Generator, int], Tensor]:
    """The same first point for everybody."""
    return lambda generator, dimension: torch.full((dimension,), value, dtype=torch.float64)


def task(
    value: Value,
    dimension: int,
    start: Callable[[torch.Generator, int], Tensor],
    config: TaskConfig,
    population: int,
    unbatchable: str | None = None,
    measure: Callable[[Tensor], Metrics] = lambda values: {},
) -> Task:
    """The task with parameter ``u`` (d,). ``loss`` raises ``ValueError`` where a function does not give a number.

    ``measure`` makes further numbers of all clients' values (N,), to be logged beside F.
    """
    dtype = torch.float64 if config.dtype == "float64" else torch.float32

    def each(params: Tree, x: Tensor) -> Tensor:
        u = params["u"].clamp(0, 1)
        return torch.stack([number(value(u, example), u) for example in x])

    def loss(params: Tree, batch: Batch) -> Tensor:
        values = each(params, batch.x)
        if batch.weight is None:
            return values.mean()
        return (batch.weight * values).sum() / batch.weight.sum().clamp(min=1)

    def score(params: Tree, batch: Batch) -> Metrics:
        values = each(params, batch.x)
        weight = torch.ones_like(values) if batch.weight is None else batch.weight
        sums = {"count": weight.sum(), "correct": 0 * weight.sum(), "loss": (weight * values).sum()}
        return sums | measure(values)

    return Task(
        lambda generator: {"u": start(generator, dimension).to(dtype)},
        lambda params, x: each(params, x)[:, None],
        loss,
        score,
        0,
        population,
        unbatchable,
    )


def number(value: Any, like: Tensor) -> Tensor:
    """A function's value as a tensor of shape (). Raises ``ValueError`` for anything else."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.shape:
        raise ValueError(f"the objective gave shape {tuple(value.shape)}, expected a single number")
    return value.detach().to(like.dtype)  # type: ignore[no-any-return]
