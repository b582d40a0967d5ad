"""Folding reports in a tree whose shape is fixed by the cohort alone.

Floating-point sums depend on the order of their terms. Here the terms are the positions 0..n-1 of the cohort, and they
are combined in a binary tree over those positions. Who computed a position, and when it arrived, has no influence; a
worker that runs an aligned run of 2^k positions sends back one node of the tree. Memory is O(log n) accumulators when
positions arrive about in order.
"""

from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

A = TypeVar("A")


class Node(NamedTuple, Generic[A]):
    """The combination of positions ``[place << level, (place + 1) << level)``; None where nobody reported."""

    level: int
    place: int
    value: A | None


class Fold(Generic[A]):
    """Combines nodes, in any order of arrival, into the root over positions 0..n-1."""

    def __init__(self, n: int, merge: Callable[[A, A], A]) -> None:
        self._n, self._merge = n, merge
        self._waiting: dict[tuple[int, int], A | None] = {}
        self._root: A | None = None
        self._seen = 0
        self._whole = n == 0

    def add(self, node: Node[A]) -> None:
        """Put in a node. A position may be covered once only; a second time is a ``ValueError``."""
        level, index, value = node
        covered = min((index + 1) << level, self._n) - (index << level)
        if (level, index) in self._waiting or covered <= 0 or self._seen + covered > self._n:
            raise ValueError(f"positions of node {level}/{index} were already folded, or are outside the cohort")
        self._seen += covered
        while 1 << level < self._n:
            sibling = index ^ 1
            if sibling << level < self._n:  # else the sibling lies outside the cohort, and the node moves up alone
                if (level, sibling) not in self._waiting:
                    self._waiting[level, index] = value
                    return
                other = self._waiting.pop((level, sibling))
                left, right = (other, value) if sibling < index else (value, other)
                value = left if right is None else right if left is None else self._merge(left, right)
            level, index = level + 1, index >> 1
        self._root, self._whole = value, True

    def nodes(self) -> list[Node[A]]:
        """What has been combined so far, as the fewest nodes: another fold over the same positions can take them up."""
        if self._whole:
            return [Node(max(self._n - 1, 0).bit_length(), 0, self._root)]
        return [Node(level, index, value) for (level, index), value in self._waiting.items()]

    def result(self) -> A | None:
        """The combination of all positions. ``ValueError`` where some are missing."""
        if not self._whole:
            raise ValueError(f"some of the {self._n} positions are missing")
        return self._root


def level(start: int, count: int, n: int) -> int | None:
    """The level of the one node that covers positions ``start … start + count`` of a cohort of n; None: there is none.

    There is one for an aligned block: ``start`` a multiple of a power of two that is at least ``count``.
    """
    level = max(count - 1, 0).bit_length()
    return None if start % (1 << level) or (count < 1 << level and start + count < n) else level


def leaves(values: Iterable[A | None], start: int, count: int, merge: Callable[[A, A], A], n: int) -> list[Node[A]]:
    """The fewest nodes that cover positions ``start … start + count`` of a cohort of n, one for an aligned block.

    Values are folded as they come, so that no more than O(log count) of them exist at a time.
    """
    top = level(start, count, n)
    if top is None:
        return [Node(0, start + i, value) for i, value in enumerate(values)]
    fold = Fold(count, merge)
    for i, value in enumerate(values):
        fold.add(Node(0, i, value))
    return [Node(top, start >> top, fold.result())]
