"""Surrogates against their definitions, finite differences, and the tolerances at which they are known to work."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from clients import surrogate
from clients.surrogate import (
    Surrogate,
    covariance,
    doubt,
    features,
    learned,
    mapped,
    mean,
    nearest,
    no_history,
    noted,
    room,
    slope,
    surface,
    weights,
)
from fedsim.data import quadratic as data
from fedsim.rng import Key
from fedsim.tasks.quadratic import value

D = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    """Uniform in [−1, 1]."""
    return torch.rand(*shape, generator=Key.root(seed).torch(), dtype=D) * 2 - 1


def fitted(x: Tensor, y: Tensor, noise: float = 1e-6, length: float = 1.0) -> Surrogate:
    return surrogate.fit(x, y, torch.ones(len(y), dtype=D), length, noise)


def bowl(x: Tensor) -> Tensor:
    """A quadratic with gradient 2 (x − 1)."""
    return ((x - 1) ** 2).sum(-1)


def error(d: int, n: int, seed: int) -> float:
    """Relative error of ∇μ at the middle of a box of half-width 0.1 with n points."""
    x = 0.1 * draw(seed, n, d)
    true = torch.full((d,), -2.0, dtype=D)
    return float((slope(fitted(x, bowl(x)), torch.zeros(d, dtype=D), 1.0) - true).norm() / true.norm())


@pytest.mark.parametrize(("d", "ns"), [(5, (2, 5, 10, 20)), (20, (10, 20, 40, 80))])
def test_the_gradient_is_right_from_twice_as_many_points_as_dimensions(d: int, ns: tuple[int, ...]) -> None:
    errors = [sum(error(d, n, s) for s in range(10)) / 10 for n in ns]
    assert errors == sorted(errors, reverse=True)
    assert errors[ns.index(2 * d)] < 0.1
    assert errors[0] > 0.5  # fewer points than dimensions span a part of them only


def test_the_gradient_is_that_of_the_mean() -> None:
    x, u, h = 0.5 * draw(0, 30, 6), 0.3 * draw(1, 6), 1e-4
    gp = fitted(x, bowl(x), 1e-3)
    by_hand = torch.stack(
        [(mean(gp, u + h * e, 1.0) - mean(gp, u - h * e, 1.0)) / (2 * h) for e in torch.eye(6, dtype=D)]
    )
    torch.testing.assert_close(slope(gp, u, 1.0), by_hand, rtol=1e-5, atol=1e-5)


def test_the_covariance_is_one_and_shrinks() -> None:
    x, u = 0.2 * draw(0, 12, 5), 0.1 * draw(1, 5)
    matrices = [covariance(fitted(x[:n], bowl(x[:n]), length=0.7), u, 0.7) for n in range(1, 13)]
    for before, after in pairwise(matrices):
        assert torch.linalg.eigvalsh(after).min() > -1e-9
        assert torch.linalg.eigvalsh(before - after).min() > -1e-9
    far = covariance(fitted(x, bowl(x), length=0.7), torch.full((5,), 50.0, dtype=D), 0.7)
    torch.testing.assert_close(far, torch.eye(5, dtype=D) / 0.7**2)


def test_doubt_is_the_trace_of_the_covariance() -> None:
    x, candidates = 0.2 * draw(0, 25, 5), 0.3 * draw(1, 8, 5)
    gp = fitted(x, bowl(x), 1e-4, 0.7)
    traces = torch.stack([covariance(gp, c, 0.7).trace() for c in candidates])
    torch.testing.assert_close(doubt(gp, candidates, 0.7), traces, rtol=1e-7, atol=1e-7)


def test_points_that_arrive_give_the_surrogate_of_a_fit_from_the_start() -> None:
    x, u = 0.2 * draw(0, 30, 5), 0.1 * draw(1, 5)
    y = bowl(x)
    gp = room(fitted(x[:11], y[:11], 1e-4), 19)
    for first, last in ((11, 12), (12, 18), (18, 30)):
        gp = learned(gp, torch.tensor(first), x[first:last], y[first:last], 1.0, 1e-4)
    whole = fitted(x, y, 1e-4)
    for field in ("x", "y", "on", "square"):
        torch.testing.assert_close(getattr(gp, field), getattr(whole, field))
    torch.testing.assert_close(gp.factor, whole.factor, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(slope(gp, u, 1.0), slope(whole, u, 1.0), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(doubt(gp, x, 1.0), doubt(whole, x, 1.0), rtol=1e-5, atol=1e-6)


def test_room_that_is_left_over_does_not_count() -> None:
    x, u = 0.2 * draw(0, 10, 4), 0.1 * draw(1, 4)
    history = noted(no_history(40, u), x, bowl(x))
    some = surrogate.fit(*nearest(history, u, 25), 1.0, 1e-4)
    assert int(some.on.sum()) == 10
    torch.testing.assert_close(slope(some, u, 1.0), slope(fitted(x, bowl(x), 1e-4), u, 1.0))
    torch.testing.assert_close(doubt(some, x, 1.0), doubt(fitted(x, bowl(x), 1e-4), x, 1.0))


def test_the_history_forgets_the_oldest() -> None:
    history = no_history(5, torch.zeros(2, dtype=D))
    for k in range(4):
        history = noted(history, torch.full((3, 2), float(k), dtype=D), torch.full((3,), float(k), dtype=D))
    assert int(history.made) == 12 and sorted(history.y.tolist()) == [2.0, 2.0, 3.0, 3.0, 3.0]
    x, y, on = nearest(history, torch.full((2,), 2.9, dtype=D), 3)
    assert y.tolist() == [3.0, 3.0, 3.0] and on.tolist() == [1.0, 1.0, 1.0] and x.shape == (3, 2)


def test_a_constant_function_has_no_gradient() -> None:
    x = 0.2 * draw(0, 10, 4)
    assert torch.equal(slope(fitted(x, torch.full((10,), 3.0, dtype=D)), x[0], 1.0), torch.zeros(4, dtype=D))


@pytest.mark.parametrize(("m", "largest", "rms"), [(100, 0.45, 0.12), (1_000, 0.13, 0.038), (10_000, 0.045, 0.0125)])
def test_features_make_the_kernel(m: int, largest: float, rms: float) -> None:
    x = draw(0, 50, 10) / 2
    f = features(0, m, 10, 1.0, x)
    gap = mapped(f, x) @ mapped(f, x).T - torch.exp(torch.cdist(x, x) ** 2 / -2)
    assert gap.abs().max() < largest and float((gap**2).mean().sqrt()) < rms


@pytest.mark.parametrize(("m", "tolerance"), [(300, 0.06), (1_000, 0.035), (10_000, 0.012)])
def test_features_make_the_gradient(m: int, tolerance: float) -> None:
    x, u = 0.1 * draw(0, 80, 10), torch.zeros(10, dtype=D)
    f, on = features(1, m, 10, 1.0, u), torch.ones(80, dtype=D)
    exact = slope(fitted(x, bowl(x)), u, 1.0)
    assert float((surface(f, weights(f, x, bowl(x), on, 1e-6), u) - exact).norm() / exact.norm()) < tolerance


def test_the_gradient_of_features_is_that_of_their_sum() -> None:
    f, w, u, h = features(2, 50, 4, 1.0, torch.zeros(1, dtype=D)), draw(0, 50), draw(1, 4), 1e-5
    sides = [(mapped(f, (u + h * e)[None]) - mapped(f, (u - h * e)[None])) @ w / (2 * h) for e in torch.eye(4, dtype=D)]
    torch.testing.assert_close(surface(f, w, u), torch.cat(sides), rtol=1e-7, atol=1e-8)


def test_features_are_shared_and_weights_can_be_averaged() -> None:
    u = draw(0, 7)
    f = features(3, 200, 7, 1.0, u)
    surrogate._features.cache_clear()
    again = features(3, 200, 7, 1.0, u)
    assert torch.equal(f.v, again.v) and torch.equal(f.b, again.b)
    w = draw(1, 5, 200)
    torch.testing.assert_close(surface(f, w.mean(0), u), torch.stack([surface(f, row, u) for row in w]).mean(0))


def test_the_length_of_the_correction_that_is_best() -> None:
    """Ξ(γ) = ‖g + γ c − ∇F‖² is least at γ* = (∇F − g)·c/‖c‖², and 0 only for c = ∇F − g with γ = 1."""
    for s in range(5):
        g, c, true = draw(s, 9), draw(100 + s, 9), draw(200 + s, 9)
        best = (true - g) @ c / (c @ c)

        def xi(gamma: Tensor | float, g: Tensor = g, c: Tensor = c, true: Tensor = true) -> float:
            return float(((g + gamma * c - true) ** 2).sum())

        residual = float(((true - g) ** 2).sum() - ((true - g) @ c) ** 2 / (c @ c))
        assert xi(best) == pytest.approx(residual)
        assert all(xi(best) < xi(best + e) for e in (-0.1, 0.1, 1.0)) and xi(best) > 0
        assert float(((g + (true - g) - true) ** 2).sum()) < 1e-24


def drift(d: int, n: int, m: int, heterogeneity: float, seed: int) -> tuple[float, float]:
    """Σ_i ‖ĝ_i − ∇F‖² with and without the correction of γ = 1, at a point around which each client has n queries."""
    factors = data.build(data.Config(dimension=d, heterogeneity=heterogeneity, seed=seed)).train.x
    x = 0.5 + 0.2 * draw(seed, d)
    f, on = features(seed, m, d, 1.0, x), torch.ones(n, dtype=D)
    true = 20 * (2 * (20 * x - 10) + 1) / (10 * d)
    own, w = [], []
    for i, mine in enumerate(factors):
        points = x + 0.05 * draw(1000 * seed + i + 1, n, d)
        y = torch.stack([value(p, mine) for p in points])
        own.append(slope(fitted(points, y), x, 1.0))
        w.append(weights(f, points, y, on, 1e-6))
    shared = torch.stack(w).mean(0)
    corrected = [g + surface(f, shared - wi, x) for g, wi in zip(own, w, strict=True)]
    with_, without = (float(sum(((g - true) ** 2).sum() for g in gs)) for gs in (corrected, own))
    return with_, without


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_correction_kills_client_drift(seed: int) -> None:
    with_, without = drift(50, 200, 3000, 5.0, seed)
    assert with_ / without < 0.05


def test_where_all_functions_are_the_same_there_is_little_to_correct() -> None:
    """Different queries of one function: what the correction adds is small beside the gradient."""
    with_, without = drift(50, 200, 3000, 0.0, 1)
    assert with_ < 0.02 * 50 * (20 / 50) ** 2 and without < 0.02 * 50 * (20 / 50) ** 2


def test_a_block_of_clients_gives_the_same_numbers() -> None:
    """Under vmap, as everything here promises; fits amplify rounding, hence the tolerance."""
    x, u = 0.2 * draw(0, 3, 20, 5), 0.1 * draw(1, 3, 5)
    f = features(0, 100, 5, 1.0, u)

    def client(x: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        history = noted(no_history(30, u), x[:12], bowl(x[:12]))
        gp = room(surrogate.fit(*nearest(history, u, 10), 1.0, 1e-3), 8)
        gp = learned(gp, torch.tensor(10), x[12:], bowl(x[12:]), 1.0, 1e-3)
        w = weights(f, *nearest(history, u, 12), 1e-3)
        return slope(gp, u, 1.0), doubt(gp, x, 1.0), w, surface(f, w, u)

    stacked = torch.vmap(client)(x, u)
    alone = [torch.stack(parts) for parts in zip(*(client(a, b) for a, b in zip(x, u, strict=True)), strict=True)]
    for a, b in zip(stacked, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert math.isfinite(float(stacked[0].sum()))
