"""The fold's shape depends on the cohort alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.fold import Fold, Node, leaves

Merged = tuple[int, ...]


def merge(a: Merged, b: Merged) -> Merged:
    return a + b


def tree_merge(a: object, b: object) -> object:
    return (a, b)


@given(st.integers(1, 70), st.integers(0, 3), st.randoms(use_true_random=False))
def test_any_order_and_block_size_give_the_same_tree(n: int, level: int, rng: random.Random) -> None:
    one = Fold[object](n, tree_merge)
    for i in range(n):
        one.add(Node(0, i, i))
    size = 1 << level
    nodes = [
        node
        for s in range(0, n, size)
        for node in leaves(range(s, min(s + size, n)), s, min(size, n - s), tree_merge, n)
    ]
    rng.shuffle(nodes)
    many = Fold[object](n, tree_merge)
    for node in nodes:
        many.add(node)
    assert many.result() == one.result()


@given(st.lists(st.one_of(st.none(), st.integers()), min_size=1, max_size=40))
def test_leaves_that_are_missing_are_left_out_in_order(values: list[int | None]) -> None:
    fold = Fold[Merged](len(values), merge)
    for i in reversed(range(len(values))):
        value = values[i]
        fold.add(Node(0, i, None if value is None else (value,)))
    expected = tuple(v for v in values if v is not None)
    assert fold.result() == (expected or None)


def test_a_block_is_one_node() -> None:
    assert [n[:2] for n in leaves([1, 2, 3, 4], 8, 4, tree_merge, 20)] == [(2, 2)]
    assert [n[:2] for n in leaves([1, 2, 3], 16, 3, tree_merge, 19)] == [(2, 4)]  # the cohort's last, short block


def test_a_result_counts_once() -> None:
    fold = Fold[Merged](3, merge)
    fold.add(Node(0, 1, (1,)))
    with pytest.raises(ValueError, match="already folded"):
        fold.add(Node(0, 1, (1,)))
    with pytest.raises(ValueError, match="missing"):
        fold.result()
    with pytest.raises(ValueError, match="outside"):
        fold.add(Node(0, 3, (3,)))


def test_sums_are_pairwise() -> None:
    """((a + b) + (c + d)) + e, which in floats is another number than the running sum."""
    values = [1e16, 1.0, -1e16, 1.0, 1.0]
    fold = Fold[float](5, lambda a, b: a + b)
    for i, v in enumerate(values):
        fold.add(Node(0, i, v))
    assert fold.result() == ((1e16 + 1.0) + (-1e16 + 1.0)) + 1.0
