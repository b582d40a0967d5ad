"""One absolute number a strategy, worked out by hand on quadratics, and the equalities at the edge of each.

The world: client 0 holds the points 0 and 2 (mean 1, n = 2), client 1 the point 5 (n = 1); w starts at 3.
One full-batch step with η = ½ takes client k to w + ½(c_k − w): 2 and 4. The updates are −1 and 1.
"""

import math

import pytest
import torch
from worlds import naive_fedavg, points, quadratic, same, train

from fedsim.types import Strategy
from strategies import (
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    fedexp,
    fedprox,
    fedyogi,
    local,
    scaffold,
)

WORLD = points([[[0.0], [2.0]], [[5.0]]])
TASK = quadratic(WORLD, [3.0])
STEP = {"lr": 0.5, "batch_size": 8}


def w(strategy: Strategy, rounds: int = 1, **kwargs: object) -> float:
    return float(train(strategy, WORLD, rounds, **kwargs)[-1]["w"])


@pytest.mark.parametrize("execution", ["plain", "batched"])
def test_fedavg(execution: str) -> None:
    assert w(fedavg.build(fedavg.Config(**STEP), TASK), execution=execution) == pytest.approx(3 + (2 * -1 + 1 * 1) / 3)
    uniform = fedavg.Config(**STEP, weighting="uniform")
    assert w(fedavg.build(uniform, TASK), execution=execution) == 3.0
    half = fedavg.Config(**STEP, server_lr=0.5)
    assert w(fedavg.build(half, TASK), execution=execution) == pytest.approx(3 - 1 / 6)


def test_fedavg_is_its_readable_twin() -> None:
    fast = train(fedavg.build(fedavg.Config(**STEP), TASK), WORLD, 4)[-1]
    slow = naive_fedavg(WORLD, TASK, {"w": torch.tensor([3.0], dtype=torch.float64)}, 0.5, 4)
    torch.testing.assert_close(fast, slow, rtol=1e-14, atol=0)


def test_fedprox_by_hand() -> None:
    """Two steps from w: w₁ = w + ½(c − w) and w₂ = w₁ + ½(c − w₁ − μ(w₁ − w))."""
    two = {"lr": 0.5, "batch_size": 8, "epochs": 2, "mu": 1.0, "weighting": "uniform"}
    # client 0: w₁ = 2, w₂ = 2 + ½(1 − 2 + 1) = 2; client 1: w₁ = 4, w₂ = 4 + ½(5 − 4 − 1) = 4
    assert w(fedprox.build(fedprox.Config(**two), TASK)) == 3.0
    weighted = two | {"weighting": "examples"}
    assert w(fedprox.build(fedprox.Config(**weighted), TASK)) == pytest.approx((2 * 2 + 4) / 3)


def test_fedprox_converges_to_its_fixed_point() -> None:
    """A client minimises ½(w − c)² + μ/2 (w − w₀)², so with many steps it reaches (c + μ w₀)/(1 + μ)."""
    config = fedprox.Config(lr=0.2, batch_size=8, epochs=200, mu=3.0)
    assert w(fedprox.build(config, TASK), cohorts=[[1]]) == pytest.approx((5 + 3 * 3) / 4, abs=1e-12)


def test_fedprox_without_pull_is_fedavg() -> None:
    steps = {"lr": 0.3, "batch_size": 1, "epochs": 3}
    a = train(fedprox.build(fedprox.Config(**steps, mu=0.0), TASK), WORLD, 3)[-1]
    assert same(a, train(fedavg.build(fedavg.Config(**steps), TASK), WORLD, 3)[-1])


def test_scaffold_by_hand() -> None:
    """Round 1 has no correction. c_i⁺ = (x − y)/(Kη) = the mean gradient along the way.

    Client 0: y = 2, c_0 = (3 − 2)/½ = 2. Client 1: y = 4, c_1 = −2. x = 3, c = 0.
    Round 2: y_0 = 3 − ½(2 − 2 + 0) = 3 and y_1 = 3 − ½(−2 + 2) = 3: the drift is gone, and x = 3 stays.
    """
    strategy = scaffold.build(scaffold.Config(**STEP), TASK)
    assert [float(m["w"]) for m in train(strategy, WORLD, 2)] == [3.0, 3.0, 3.0]
    # Only client 0 in round 1: x = 2, c = |S|/N · 2 = 1. Round 2, only client 1 (c_1 = 0): y = 2 − ½((2 − 5) + 1) = 3.
    assert [float(m["w"]) for m in train(strategy, WORLD, 2, cohorts=[[0], [1]])] == [3.0, 2.0, 3.0]


def test_scaffold_with_one_client_is_sgd() -> None:
    world = points([[[0.0], [2.0], [7.0]]])
    task = quadratic(world, [3.0])
    steps = {"lr": 0.25, "batch_size": 3, "epochs": 1}
    a = train(scaffold.build(scaffold.Config(**steps), task), world, 4)
    b = train(fedavg.build(fedavg.Config(**steps), task), world, 4)
    assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_fedavgm_by_hand() -> None:
    """Δ₁ = −1/3 → w = 8/3. Then Δ₂ = Σ p(½(c − w)) = ½(7/3 − 8/3) = −1/6 and m = ½·(−1/3) − 1/6 = −1/3."""
    config = fedavgm.Config(**STEP, beta=0.5)
    assert w(fedavgm.build(config, TASK), 2) == pytest.approx(3 - 1 / 3 - 1 / 3)


def test_fedavgm_without_momentum_is_fedavg() -> None:
    a = train(fedavgm.build(fedavgm.Config(**STEP, beta=0.0), TASK), WORLD, 3)[-1]
    assert same(a, train(fedavg.build(fedavg.Config(**STEP), TASK), WORLD, 3)[-1])


@pytest.mark.parametrize(
    ("module", "v"),
    [
        (fedadam, 0.99 * 1e-6 + 0.01 / 9),
        (fedyogi, 1e-6 + 0.01 / 9),  # v − (1 − β₂) Δ² sign(τ² − Δ²), and τ² < Δ²
        (fedadagrad, 1e-6 + 1 / 9),
    ],
)
def test_adaptive_first_step_by_formula(module: object, v: float) -> None:
    """Δ = −1/3, m = (1 − β₁) Δ, w = 3 + η m / (√v + τ)."""
    config = module.Config(**STEP, server_lr=0.1, beta1=0.9, tau=1e-3)  # type: ignore[attr-defined]
    expected = 3 + 0.1 * (0.1 * -1 / 3) / (math.sqrt(v) + 1e-3)
    assert w(module.build(config, TASK)) == pytest.approx(expected, rel=1e-12)  # type: ignore[attr-defined]


def test_fedexp_by_hand() -> None:
    """η = max(1, Σ p‖Δ‖² / (2 ‖Δ̄‖²)): below 1 updates that agree take FedAvg's step, above it they are stretched."""
    world = points([[[1.0]], [[4.0]]])
    task = quadratic(world, [6.0])  # updates −5/2 and −1, Δ̄ = −7/4; Σp‖Δ‖² = 29/8; η = 29/8 / (2·49/16) = 29/49 → 1
    assert float(train(fedexp.build(fedexp.Config(**STEP, epsilon=0.0), task), world)[-1]["w"]) == 6 - 1.75
    task = quadratic(world, [3.0])  # updates −1 and ½, Δ̄ = −¼; Σp‖Δ‖² = 5/8; η = 5/8 / (2/16) = 5
    assert float(train(fedexp.build(fedexp.Config(**STEP, epsilon=0.0), task), world)[-1]["w"]) == 3 - 5 / 4


def test_fedexp_with_clients_of_unequal_size() -> None:
    """Clients of 2 and 1 examples, updates −1 and 1 (as above): Σ p‖Δ‖²/Σ p is 1 whatever the weights are."""
    config = fedexp.Config(**STEP, epsilon=0.0)  # by examples Δ̄ = −⅓: η = 1 / (2/9) = 4.5
    assert w(fedexp.build(config, TASK)) == pytest.approx(3 - 4.5 / 3)
    task = quadratic(WORLD, [1.0])  # updates 0 and 2; with equal weights Δ̄ = 1, Σp‖Δ‖² = 2: η = 1
    assert w(fedexp.build(fedexp.Config(**STEP, epsilon=0.0, weighting="uniform"), task)) == 2.0
    task = quadratic(WORLD, [2.5])  # updates −¾ and 1¼, Δ̄ = ¼; Σp‖Δ‖² = (9 + 25)/32 = 17/16: η = 17/16 / (2/16) = 8.5
    assert w(fedexp.build(fedexp.Config(**STEP, epsilon=0.0, weighting="uniform"), task)) == 2.5 + 8.5 / 4


def test_fedexp_with_equal_updates_is_fedavg() -> None:
    world = points([[[1.0], [2.0]], [[1.0], [2.0]], [[1.0], [2.0]]])
    task = quadratic(world, [0.3])
    a = train(fedexp.build(fedexp.Config(**STEP), task), world, 3)
    b = train(fedavg.build(fedavg.Config(**STEP), task), world, 3)
    assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_local_keeps_to_itself() -> None:
    """Each client walks to its own mean: 3 → ½(3 + c) → … ; the server learns nothing."""
    from worlds import grid

    from fedsim.rng import Key
    from server.loop import run_round

    executor = grid(WORLD)
    strategy = local.build(local.Config(**STEP), TASK)
    state = strategy.init(Key.root(0).torch())
    for r in (1, 2):
        state, trained = run_round(strategy, state, r, [0, 1], executor, Key.root(0))
        assert trained.bytes_up == trained.bytes_down == 0
    memories = [executor.memory.get(c) for c in (0, 1)]
    assert [float(m["params"]["w"]) for m in memories if m] == [1.5, 4.5]  # 3→2→1.5 and 3→4→4.5
