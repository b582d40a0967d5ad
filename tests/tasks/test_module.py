"""Anybody's ``nn.Module`` as a task: what is refused, what is kept, where randomness comes from."""

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fedsim import tree
from fedsim.autodiff import value_and_grad
from fedsim.errors import ConfigError
from fedsim.lower import Lowered
from fedsim.tasks import mlp
from fedsim.tasks.module import from_module, seeded
from fedsim.types import Batch, Task

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def task(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Task:
    return from_module(make, 3, 1, dtype, (X, Y))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_products_in_bfloat16_and_everything_else_in_float32() -> None:
    """A product of numbers that need 9 bits: rounded to 8 before it is made, and summed exactly after."""
    made = from_module(lambda: nn.Linear(4, 3, bias=False), 3, 1, torch.float32, (X, Y), "bfloat16")
    params = {"weight": torch.zeros(3, 4)}
    params["weight"][0] = torch.tensor([1 + 2**-8, 1.0, 0.0, 0.0])  # a tie, which goes to the even 1
    x = torch.tensor([[1.0, 2**-7, 0.0, 0.0]])
    logits = made.predict(params, x)
    assert logits.dtype == torch.float32
    assert logits[0, 0] == 1 + 2**-7 and task(lambda: nn.Linear(4, 3, bias=False)).predict(params, x)[0, 0] > 1.011
    value, grads = value_and_grad(made.loss)(params, Batch(x, Y[:1]))
    assert value.dtype == grads["weight"].dtype == torch.float32


def test_bfloat16_is_close_and_runs_in_blocks() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))

    a, b = from_module(make, 3, 1, torch.float32, (X, Y), "bfloat16"), task(make)
    assert a.unbatchable is None and not isinstance(a.loss, Lowered) and isinstance(b.loss, Lowered)
    params, batch = a.init(generator()), Batch(X, Y)
    (_, g), (_, h) = value_and_grad(a.loss)(params, batch), value_and_grad(b.loss)(params, batch)
    for name in g:
        assert 0 < (g[name] - h[name]).norm() < 0.1 * h[name].norm()
    stacked = {name: torch.stack([x, x * 0.5]) for name, x in params.items()}
    two = torch.vmap(a.loss)(stacked, Batch(torch.stack([X, X]), torch.stack([Y, Y]), torch.ones(2, 6)))
    one = torch.stack([a.loss({name: x[k] for name, x in stacked.items()}, batch) for k in range(2)])
    torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-2)


def test_bfloat16_is_for_float32() -> None:
    with pytest.raises(ValueError, match=r"precision: bfloat16 is for parameters of float32 \(got dtype float64\)"):
        mlp.Config(model="mlp", precision="bfloat16", dtype="float64")


def frozen() -> nn.Module:
    features = nn.Linear(4, 5).requires_grad_(False)
    return nn.Sequential(features, nn.Tanh(), nn.Linear(5, 3))


def test_frozen_parameters_are_constants_of_the_task() -> None:
    a, b = task(frozen), task(frozen)  # two workers
    params = a.init(generator())
    assert list(params) == ["2.weight", "2.bias"]
    assert torch.equal(a.predict(params, X), b.predict(params, X))
    # The constants are no zeros, and no run's seed reaches them.
    assert a.predict({name: torch.ones_like(p) for name, p in params.items()}, X).std() > 0.01
    _, grads = value_and_grad(a.loss)(params, Batch(X, Y))
    assert list(grads) == list(params)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.arange(4.0))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x + self.shift)
        return logits


def test_buffers_are_constants_in_the_dtype_of_the_task() -> None:
    for dtype in (torch.float32, torch.float64):
        t = task(Shifted, dtype)
        p = t.init(generator())
        assert list(p) == ["fc.weight", "fc.bias"]
        x = X.to(dtype)
        expected = (x + torch.arange(4.0)) @ p["fc.weight"].T + p["fc.bias"]
        torch.testing.assert_close(t.predict(p, x), expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.second(self.first(x)))
        return logits


def test_tied_parameters_travel_once_and_stay_tied() -> None:
    t = task(Tied, torch.float64)
    p = t.init(generator())
    assert list(p) == ["first.weight", "out.weight", "out.bias"]
    x = X.double()
    square = p["first.weight"] @ p["first.weight"]
    torch.testing.assert_close(t.predict(p, x), x @ square.T @ p["out.weight"].T + p["out.bias"])

    def by_hand(p: dict[str, Tensor], batch: Batch) -> Tensor:
        w = p["first.weight"]
        return nn.functional.cross_entropy(batch.x @ (w @ w).T @ p["out.weight"].T + p["out.bias"], batch.y)

    found, expected = (value_and_grad(f)(p, Batch(x, Y)) for f in (t.loss, by_hand))
    torch.testing.assert_close(found, expected)


def test_parametrised_layers_work() -> None:
    t = task(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))))
    p = t.init(generator())
    v, g, bias = (
        p[name] for name in ("0.parametrizations.weight.original1", "0.parametrizations.weight.original0", "0.bias")
    )
    torch.testing.assert_close(t.predict(p, X), X @ (g * v / v.norm(dim=1, keepdim=True)).T + bias)


def test_the_parameters_given_are_the_ones_used() -> None:
    t = task(lambda: nn.Linear(4, 3))
    p, q = t.init(generator(1)), t.init(generator(2))
    assert torch.equal(t.predict(p, X), X @ p["weight"].T + p["bias"])
    t.predict(q, X)
    assert torch.equal(t.predict(p, X), X @ p["weight"].T + p["bias"])
    with pytest.raises(ValueError, match=r"parameters differ: \['more'\]"):
        t.predict(p | {"more": torch.ones(1)}, X)
    with pytest.raises(KeyError, match="weight"):
        t.predict({"wait": p["weight"], "bias": p["bias"]}, X)
    with pytest.raises(ValueError, match="parameters differ"):
        t.predict({}, X)


def test_init_does_not_share_memory() -> None:
    cached = torch.zeros(3, 4)

    def make() -> nn.Module:
        layer = nn.Linear(4, 3)
        layer.weight = nn.Parameter(cached)
        return layer

    t = task(make)
    t.init(generator())["weight"].add_(1)
    assert cached.eq(0).all() and t.init(generator())["weight"].eq(0).all()


def test_threads_do_not_disturb_each_other() -> None:
    t = task(lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)))
    wrong: list[int] = []

    trees = [t.init(generator(seed)) for seed in range(4)]

    def repeat(i: int) -> None:
        expected = t.predict(trees[i], X)
        wrong.extend(i for _ in range(200) if not torch.equal(t.predict(trees[i], X), expected))

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3))


def test_dropout_draws_from_a_named_stream() -> None:
    t = task(dropout)
    assert t.unbatchable == "draws random numbers while training (dropout)"
    p, batch, vg = t.init(generator()), Batch(X, Y), value_and_grad(t.loss)

    def visit(seed: int) -> list[float]:
        with seeded(generator(seed)):
            return [vg(p, batch)[0].item() for _ in range(3)]

    state = torch.get_rng_state()
    first = visit(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert visit(1) == first and len({*first}) == 3 and visit(2) != first
    # Evaluation is without dropout.
    assert torch.equal(t.predict(p, X), t.predict(p, X)) and t.score(p, batch) == t.score(p, batch)


def test_dropout_of_zero_is_no_reason() -> None:
    assert task(lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0))).unbatchable is None


def test_seeded_restores_after_an_error_and_seeds_all_three() -> None:
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())  # noqa: NPY002

    def fail() -> None:
        with seeded(generator()):
            seen.append(draws())
            raise ArithmeticError

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    seen: list[tuple[float, float, float]] = []
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            fail()
    assert seen[0] == seen[1]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits if logits.sum().item() > 0 else -logits


def test_a_model_that_looks_at_its_values_runs_one_by_one() -> None:
    reason = task(Branching).unbatchable
    assert reason is not None and ".item()" in reason and len(reason) <= 160


class Counting(nn.Module):
    """Has a state beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        logits: Tensor = self.fc(x)
        return logits


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("no such layer\nmore lines")


def changing() -> Callable[[], nn.Module]:
    calls = iter(range(100))
    return lambda: nn.Linear(4, 3, bias=next(calls) > 0)


norm = nn.BatchNorm1d
REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: nn.Sequential(nn.Linear(4, 3), norm(3)),
        r"layer '1' \(BatchNorm1d\) keeps statistics .* use nn.GroupNorm",
    ),
    (lambda: nn.Sequential(nn.Linear(4, 3), norm(3, track_running_stats=False)), "use nn.GroupNorm"),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.InstanceNorm1d(3, track_running_stats=True)), r"'1' \(InstanceNorm1d\)"),
    (lambda: nn.Sequential(nn.Flatten()), "has no trainable parameter"),
    (lambda: nn.Linear(4, 3).requires_grad_(False), "has no trainable parameter"),
    (lambda: nn.LazyLinear(3), r"\(LazyLinear\) has no shape yet"),
    (lambda: "a model", r"must return an nn.Module \(got str\)"),
    (lambda: nn.Linear(4, 5), r"gives \(1, 5\) for an input of shape \(1, 4\), expected \(1, 3\)"),
    (lambda: nn.Linear(9, 3), r"fails for an input of shape \(1, 4\): RuntimeError: mat1"),
    (lambda: Broken(4, 3), r"fails for an input of shape \(1, 4\): ArithmeticError: no such layer$"),
    (Counting, "changes its buffer 'calls' while training"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_a_task_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        task(make)
    assert str(e.value).startswith("task.model: ") and "\n" not in str(e.value)


def test_a_model_that_differs_at_each_call_is_refused() -> None:
    t = task(changing())
    with pytest.raises(ConfigError, match=r"other parameters at each call: \['bias'\]"):
        t.init(generator())


def test_a_user_model_learns_in_float64() -> None:
    t = task(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.float64)
    p, batch = t.init(generator()), Batch(X.double(), Y)
    before = t.loss(p, batch).item()
    for _ in range(50):
        p = tree.axpy(-0.5, value_and_grad(t.loss)(p, batch)[1], p)
    assert t.loss(p, batch).item() < 0.5 * before
