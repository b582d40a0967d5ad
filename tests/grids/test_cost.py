"""A cost that is fitted to measurements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.grids.cost import Cost, examples
from fedsim.types import Local, Pass, Schedule


def local(*schedules: Schedule) -> Local:
    return Local(lambda *a: None, tuple(Pass(lambda *a: None, s) for s in schedules), lambda *a: None)  # type: ignore[arg-type,return-value]


def test_the_examples_that_steps_go_over() -> None:
    held = {"train": [30, 5], "holdout": [7, 1]}.__getitem__
    assert examples(local(Schedule(8, epochs=2)), held) == 60 + 10
    # No batch has more than all that a client holds.
    assert examples(local(Schedule(8, steps=5), Schedule(64, steps=2)), held) == 40 + 25 + 60 + 10
    assert examples(local(Schedule(8, split="holdout")), held) == 8
    assert examples(local(), held) == 0


def test_a_guess_before_anything_was_seen() -> None:
    assert Cost().of(50, 2) == 70


@given(st.floats(1e-6, 1e-2), st.floats(1e-5, 1.0), st.integers(0, 1000))
def test_rates_are_found(a: float, b: float, seed: int) -> None:
    """Messages of unlike shape: after dozens, what they cost is known within a quarter, whatever the guess was."""
    rng, cost = np.random.default_rng(seed), Cost()
    for _ in range(60):
        clients = int(rng.integers(1, 40))
        n = int(rng.integers(0, 500) * clients)
        cost.saw(n, clients, a * n + b * clients)
    for n, clients in ((0, 10), (1000, 1), (500, 20)):
        truth = a * n + b * clients
        assert cost.of(n, clients) == pytest.approx(truth, rel=0.25, abs=0.25 * (a * 1000 + b * 10))


def test_messages_that_are_all_alike_leave_the_guess_and_find_the_speed() -> None:
    cost = Cost()
    for _ in range(10):
        cost.saw(100, 10, 2.0)
    assert cost.of(100, 10) == pytest.approx(2.0)
    assert cost.rates[1] / cost.rates[0] == pytest.approx(10.0)


def test_a_model_that_becomes_slower_is_followed() -> None:
    cost = Cost()
    for seconds in [1.0] * 50 + [5.0] * 50:
        cost.saw(100, 10, seconds)
    assert cost.of(100, 10) == pytest.approx(5.0, rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 100), st.floats(0, 100)), max_size=20))
def test_a_cost_is_never_negative(seen: list[tuple[int, int, float]]) -> None:
    cost = Cost()
    for message in seen:
        cost.saw(*message)
        assert cost.rates.min() >= 0 and np.isfinite(cost.rates).all()
