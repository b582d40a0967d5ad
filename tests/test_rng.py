"""Randomness by name: what is drawn depends on the name alone."""

import numpy as np
import pytest
import torch
from scipy import stats

from fedsim.rng import Key

KEY = Key.root(7)


def test_a_name_always_gives_the_same_numbers() -> None:
    """Also after other draws, and in other sessions: these digits must never change, or old runs cannot be repeated."""
    KEY.at("noise").numpy().normal(size=100)
    assert KEY.at("cohort", 3).numpy().integers(1 << 30, size=3).tolist() == FIXED_NUMPY
    assert torch.randint(1 << 30, (3,), generator=KEY.at("cohort", 3).torch()).tolist() == FIXED_TORCH


FIXED_NUMPY = [6098906, 258261657, 38197589]
FIXED_TORCH = [820929920, 736374972, 98542824]


def test_paths() -> None:
    assert KEY.at("a").at("b") == KEY.at("a", "b")
    assert KEY.at("client", 3) == KEY.at("client", np.int64(3))  # a number is a number, wherever it comes from
    names = [("a", "b"), ("ab",), ("b", "a"), ("a",), (1,), ("1",), (1, 2), (12,), ("a", 1), ("a1",), ()]
    assert len({KEY.at(*name).digest for name in names}) == len(names)
    assert Key.root(7) != Key.root(8) and KEY.at("x") != Key.root(8).at("x")


def test_streams_are_distinct() -> None:
    """A hundred thousand clients' streams, and no two alike."""
    digests = {KEY.at("round", r, "client", c).digest for r in range(100) for c in range(1000)}
    assert len(digests) == 100_000


@pytest.mark.parametrize("draw", ["numpy", "torch", "wide"])
def test_streams_look_independent(draw: str) -> None:
    """First numbers of 20,000 neighbouring streams: uniform (KS, p > 1e-4) and uncorrelated (|r| < 4/√n)."""
    n = 20_000
    if draw == "numpy":
        first = np.array([KEY.at("client", i).numpy().random() for i in range(n)])
    else:
        first = np.array([torch.rand((), generator=getattr(KEY.at("client", i), draw)()).item() for i in range(n)])
    assert stats.kstest(first, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / np.sqrt(n)


def test_each_call_begins_anew() -> None:
    assert torch.equal(torch.rand(4, generator=KEY.torch()), torch.rand(4, generator=KEY.torch()))
    assert KEY.numpy().random() == KEY.numpy().random()
