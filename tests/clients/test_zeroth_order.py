"""Finite differences against what can be worked out, and steps that stay in the domain."""

import pytest
import torch
from torch import Tensor

from clients.zeroth_order import QueryConfig, advance, begin, difference, flat, orthonormal, querying, shaped
from fedsim.rng import Key
from fedsim.types import Batch, Task

NO_BATCH = Batch(torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def generator(seed: int = 0) -> torch.Generator:
    return Key.root(seed).torch()


def free(u: Tensor) -> Tensor:
    return u


def test_directions_are_orthonormal_and_uniform() -> None:
    u = orthonormal(generator(), 20, 50, torch.float64)
    torch.testing.assert_close(u @ u.T, torch.eye(20, dtype=torch.float64), atol=1e-13, rtol=0)
    # A uniform direction has mean 0 in every coordinate; the QR's own signs would make the first one negative.
    firsts = torch.stack([orthonormal(generator(s), 1, 3, torch.float64)[0] for s in range(2000)])
    assert firsts.mean(0).abs().max() < 4 / (3 * 2000) ** 0.5


def test_difference_on_a_linear_function_by_hand() -> None:
    """With Q = d orthonormal directions, Σ_q (∇f·u_q) u_q = ∇f, and Δ divides by Q: Δ = ∇f / d."""
    slope = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0], dtype=torch.float64)
    u = torch.full((5,), 0.5, dtype=torch.float64)
    directions = orthonormal(generator(), 5, 5, torch.float64)
    value, delta = difference(lambda p, b: p @ slope + 2, u, directions, 0.01, NO_BATCH, free)
    assert float(value) == pytest.approx(3.0)  # ½ (3 − 1 + 4 + 1 − 5) + 2
    torch.testing.assert_close(delta, slope / 5, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("q", [5, 20, 50, 100])
def test_cosine_of_an_estimate_is_root_q_over_d(q: int) -> None:
    """On linear functions in R^100, the mean over 20 draws lies within 4 standard errors (they are below 0.02)."""
    cosines = []
    for s in range(20):
        slope = torch.randn(100, generator=generator(s), dtype=torch.float64)
        directions = orthonormal(generator(1000 + s), q, 100, torch.float64)
        _, delta = difference(lambda p, b, a=slope: p @ a, torch.zeros(100).double(), directions, 1.0, NO_BATCH, free)
        cosines.append(torch.cosine_similarity(delta, slope, dim=0))
    assert float(torch.stack(cosines).mean()) == pytest.approx((q / 100) ** 0.5, abs=0.06)


def test_queries_stay_in_the_domain() -> None:
    asked: list[Tensor] = []

    def query(points: Tensor, batch: Batch) -> Tensor:
        asked.append(points)
        return points.sum(1)

    u = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    difference(query, u, orthonormal(generator(), 3, 3, torch.float64), 0.9, NO_BATCH, lambda p: p.clamp(0, 1))
    assert asked[0].shape == (4, 3)
    assert asked[0].min() >= 0 and asked[0].max() <= 1


def test_adam_is_that_of_torch_and_is_clipped() -> None:
    config = QueryConfig(name="x", lr=0.3)
    p = torch.nn.Parameter(torch.tensor([0.5, 0.2], dtype=torch.float64))
    adam, walk = torch.optim.Adam([p], lr=0.3), begin(p.detach().clone())
    for g in torch.tensor([[1.0, -2.0], [0.5, 0.1], [-3.0, 0.0]], dtype=torch.float64):
        p.grad = g.clone()
        adam.step()
        walk = advance(config, walk, g, g.sum(), free)
        torch.testing.assert_close(walk.u, p.detach(), rtol=1e-12, atol=1e-12)
    assert float(walk.start) == -1.0  # the first value, and no later one
    clipped = advance(config, begin(walk.u), torch.tensor([-9.0, 9.0]).double(), walk.start, lambda u: u.clamp(0, 1))
    assert clipped.u.min() >= 0 and clipped.u.max() <= 1


def test_flat_and_shaped_are_inverse() -> None:
    tree = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([7.0])}
    back = shaped(flat(tree), tree)
    assert list(back) == ["b", "a"] and all(torch.equal(back[n], tree[n]) for n in tree)


@pytest.mark.parametrize("why", [None, "one by one"])
def test_a_loss_that_is_no_number_is_named(why: str | None) -> None:
    def loss(params: object, batch: Batch) -> Tensor:
        return torch.zeros(3)

    task = Task(lambda g: {"u": torch.zeros(2)}, None, loss, None, 0, 1, why)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(3,\), expected a single number"):
        querying(task, {"u": torch.zeros(2)})(torch.zeros(4, 2), NO_BATCH)
