"""Weights that say W₀ + s B A, and blocks of clients through one pass."""

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.autodiff import value_and_grad
from fedsim.rng import Key
from fedsim.tasks import adapters
from fedsim.tasks.adapters import Layer, adapted
from fedsim.tasks.module import from_module
from fedsim.types import Batch, Task, Tree

WIDTH = 6


def draws(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=Key.root(2).at(name).torch(), dtype=torch.float64)


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    adapters._FOLDS.clear()
    yield
    adapters._FOLDS.clear()


class Apart(nn.Module):
    """A model that keeps the examples of a batch along the first dimension, (N, T, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x)).mean(1))
        return out


class TimeFirst(Apart):
    """The same function, with the examples along the second dimension in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x.transpose(0, 1))).mean(0))
        return out


class ByHand(Apart):
    """The same function, without a linear layer being called."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(x @ self.body.weight.t() + self.body.bias).mean(1))
        return out


class Whispering(Apart):
    """A model in which an example has a small part in the others' logits."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h + 0.001 * h.sum(0)


def made(kind: type[Apart]) -> Task:
    return from_module(kind, 3, 4, torch.float64, (draws("x", 1, 5, WIDTH), torch.zeros(1, dtype=torch.int64)))


LAYER = Layer("body", WIDTH, WIDTH)
A, B = draws("A", 2, WIDTH), draws("B", WIDTH, 2)
X, Y = draws("x", 3, 4, 5, WIDTH), torch.arange(12).view(3, 4) % 3  # of 3 clients
WEIGHT = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)


def lora(kind: type[Apart], start: Tree, fixed: Tree) -> Task:
    task = made(kind)
    return adapted(task, [LAYER], 3.0, task.init(Key.root(0).torch()), fixed, start)


@pytest.mark.parametrize("kind", [Apart, TimeFirst, ByHand])
def test_it_is_the_model_with_the_sum_for_a_weight(kind: type[Apart]) -> None:
    task = lora(kind, {LAYER.B: B}, {LAYER.A: A})
    base = made(kind).init(Key.root(0).torch())
    whole = base | {"body.weight": base["body.weight"] + 1.5 * B @ A}
    expected = made(kind).predict(whole, X[0])
    torch.testing.assert_close(task.predict({LAYER.B: B}, X[0]), expected, rtol=1e-12, atol=0)
    merged = adapters.merged([LAYER], 3.0, base, {LAYER.A: A, LAYER.B: B})
    torch.testing.assert_close(made(kind).predict(merged, X[0]), expected, rtol=1e-14, atol=0)


def test_a_sum_is_a_tensor_wherever_one_is_wanted() -> None:
    W0 = draws("W", 4, WIDTH)
    w = adapters._Sum.of(W0, (A, draws("b", 4, 2)), 0.5, 0)
    full = W0 + 0.5 * draws("b", 4, 2) @ A
    for f in (lambda w: w.t(), lambda w: w @ draws("v", WIDTH), lambda w: w[1:], lambda w: 2 * w, torch.linalg.norm):
        assert type(f(w)) is Tensor
        torch.testing.assert_close(f(w), f(full))
    assert w.shape == (4, WIDTH) and w.dtype == torch.float64 and w.size(0) == 4
    assert torch.equal(W0, draws("W", 4, WIDTH))
    x = draws("x", 7, WIDTH)
    torch.testing.assert_close(F.linear(x, w, draws("c", 4)), F.linear(x, full, draws("c", 4)))


def one_by_one(task: Task, params: Tree) -> tuple[Tensor, Tree]:
    """Client by client, by plain autograd on the examples that count."""
    values, grads = [], []
    for k in range(3):
        n = int(WEIGHT[k].sum())
        v, g = value_and_grad(task.loss)({name: p[k] for name, p in params.items()}, Batch(X[k, :n], Y[k, :n]))
        values.append(v)
        grads.append(g)
    return torch.stack(values), {name: torch.stack([g[name] for g in grads]) for name in params}


@pytest.mark.parametrize("trained", ["B", "A and B", "R", "B and head"])
@pytest.mark.parametrize("kind", [Apart, TimeFirst, ByHand])
def test_a_block_is_its_clients(kind: type[Apart], trained: str, caplog: pytest.LogCaptureFixture) -> None:
    own = {
        "B": {LAYER.B: draws("Bk", 3, WIDTH, 2)},
        "A and B": {LAYER.A: draws("Ak", 3, 2, WIDTH), LAYER.B: draws("Bk", 3, WIDTH, 2)},
        "R": {LAYER.R: draws("Rk", 3, 2, 2)},
        "B and head": {
            LAYER.B: draws("Bk", 3, WIDTH, 2), "head.weight": draws("h", 3, 3, WIDTH), "head.bias": draws("hb", 3, 3),
        },
    }[trained]  # fmt: skip
    fixed = {LAYER.A: A, LAYER.B: B}
    task = lora(kind, {n: p[0] for n, p in own.items()}, {n: p for n, p in fixed.items() if n not in own})
    run = torch.vmap(value_and_grad(task.loss), in_dims=(0, 0))
    expected = one_by_one(task, own)
    with caplog.at_level(logging.WARNING, "fedsim"):
        for _ in range(2):  # tried, and then trusted
            values, grads = run(own, Batch(X, Y, WEIGHT))
            torch.testing.assert_close(values, expected[0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(grads, expected[1], rtol=1e-10, atol=1e-14)
    assert ("does not keep the examples" in caplog.text) == (kind is not Apart)


def test_gradients_of_single_examples() -> None:
    """A block of one client's examples, each with the same B: what clipping needs, without one graph an example."""
    task = lora(Apart, {LAYER.B: B}, {LAYER.A: A})
    f = value_and_grad(task.loss)
    got = torch.vmap(lambda x, y: f({LAYER.B: B}, Batch(x[None], y[None]))[1])(X[0], Y[0])[LAYER.B]
    for j in range(4):
        expected = f({LAYER.B: B}, Batch(X[0, j : j + 1], Y[0, j : j + 1]))[1][LAYER.B]
        torch.testing.assert_close(got[j], expected, rtol=1e-12, atol=1e-15)
    assert [fine for _, fine in adapters._FOLDS.values()] == [True]


def test_a_small_part_in_anothers_gradient_is_too_much(caplog: pytest.LogCaptureFixture) -> None:
    """Clipped alone, an example would move the sum of a private batch by more than the norm it was clipped to."""
    task = lora(Whispering, {LAYER.B: B}, {LAYER.A: A})
    own = {LAYER.B: draws("Bk", 3, WIDTH, 2)}
    with caplog.at_level(logging.WARNING, "fedsim"):
        values, grads = torch.vmap(value_and_grad(task.loss))(own, Batch(X, Y, torch.ones(3, 4)))
    assert "does not keep the examples" in caplog.text
    for k in range(3):
        value, grad = value_and_grad(task.loss)({LAYER.B: own[LAYER.B][k]}, Batch(X[k], Y[k]))
        torch.testing.assert_close(values[k], value, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(grads[LAYER.B][k], grad[LAYER.B], rtol=1e-10, atol=1e-15)


def test_nothing_is_learned_from_a_client_that_fails() -> None:
    def trapped(params: Tree, batch: Batch) -> Tensor:
        if bool((batch.x == 7).any()):
            raise RuntimeError("out of luck")
        return plain.loss(params, batch)

    plain = made(Apart)
    task = adapted(
        plain._replace(loss=trapped), [LAYER], 3.0, plain.init(Key.root(0).torch()), {LAYER.A: A}, {LAYER.B: B}
    )
    run = torch.vmap(value_and_grad(task.loss), in_dims=(0, 0))
    bad = X.clone()
    bad[1] = 7
    with pytest.raises(RuntimeError, match="out of luck"):
        run({LAYER.B: draws("Bk", 3, WIDTH, 2)}, Batch(bad, Y, WEIGHT))
    assert not adapters._FOLDS
    run({LAYER.B: draws("Bk", 3, WIDTH, 2)}, Batch(X, Y, WEIGHT))
    assert [fine for _, fine in adapters._FOLDS.values()] == [True]


def test_a_client_of_padding_alone_has_no_gradient() -> None:
    task = lora(Apart, {LAYER.B: B}, {LAYER.A: A})
    weight = torch.stack([torch.ones(4), torch.zeros(4), torch.ones(4)]).double()
    run = torch.vmap(value_and_grad(task.loss), in_dims=(0, 0))
    values, grads = run({LAYER.B: draws("Bk", 3, WIDTH, 2)}, Batch(X, Y, weight))
    assert values[1] == 0 and not grads[LAYER.B][1].any() and grads[LAYER.B][0].any() and values.isfinite().all()
