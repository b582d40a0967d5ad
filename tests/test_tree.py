"""Arithmetic on named tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import tree
from fedsim.types import Tree

A = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
B = {"w": torch.tensor([10.0, 20.0]), "b": torch.tensor(30.0)}


def values(t: Tree) -> dict[str, list[float] | float]:
    return {name: x.tolist() for name, x in t.items()}


def test_by_hand() -> None:
    assert values(tree.add(A, B)) == {"w": [11.0, 22.0], "b": 33.0}
    assert values(tree.sub(B, A)) == {"w": [9.0, 18.0], "b": 27.0}
    assert values(tree.scale(2.0, A)) == {"w": [2.0, 4.0], "b": 6.0}
    assert values(tree.axpy(-1.0, A, B)) == {"w": [9.0, 18.0], "b": 27.0}
    assert values(tree.zeros(A)) == {"w": [0.0, 0.0], "b": 0.0}
    assert float(tree.dot(A, B)) == 10 + 40 + 90
    assert float(tree.norm({"x": torch.tensor([3.0, 4.0])})) == 5.0
    assert tree.nbytes({"a": A, "b": {"x": torch.zeros(3, dtype=torch.int64)}}) == 12 + 24


def test_names_must_agree() -> None:
    with pytest.raises(ValueError, match="b"):
        tree.add(A, {"w": A["w"]})
    with pytest.raises(ValueError, match="c"):
        tree.sub(A, {**A, "c": A["b"]})


def test_arguments_are_kept() -> None:
    before = values(A), values(B)
    for f in (tree.add, tree.sub, lambda a, b: tree.axpy(2.0, a, b), lambda a, b: tree.cast(a, b), tree.dot):
        f(A, B)
    assert (values(A), values(B)) == before


def test_a_number_and_a_tensor_give_the_same_bits() -> None:
    x = {"w": torch.rand(1000, generator=torch.Generator().manual_seed(0))}
    for c in (0.1, -1 / 3, 7e-5):
        a, b = tree.axpy(c, x, x), tree.axpy(torch.tensor(c), x, x)
        assert torch.equal(a["w"], b["w"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite(bad: float) -> None:
    assert tree.finite(A)
    assert tree.finite({"x": torch.full((4,), 3e38)})  # their sum is not finite; they are
    assert tree.finite({"x": torch.zeros(0), "n": torch.tensor([1, 2])})
    assert not tree.finite({**A, "x": torch.tensor([1.0, bad, 2.0])})
    assert not tree.finite({"x": torch.tensor([float("inf"), -float("inf")])})


def test_digest_sees_everything() -> None:
    x = torch.tensor([1.0, 2.0])
    trees = [
        {"a": x},
        {"b": x},
        {"a": x.double()},
        {"a": x.reshape(1, 2)},
        {"a": x + 1e-7},
        {"a": x, "b": x},
        {"a": -0.0 * x},
        {"a": 0.0 * x},
        {"a": x[0]},
        {},
    ]
    assert len({tree.digest(t) for t in trees}) == len(trees)


def test_digest_is_of_the_content() -> None:
    """Not of the order of names, the layout in memory, or gradients."""
    x = torch.arange(6.0).reshape(2, 3)
    same = [{"a": x, "b": x[0]}, {"b": x[0], "a": x}, {"a": x.t().contiguous().t(), "b": x[0].clone().requires_grad_()}]
    assert len({tree.digest(t) for t in same}) == 1


trees = st.integers(0, 2**31).map(
    lambda seed: {
        n: torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed)).double()
        for n, shape in {"w": (2, 3), "b": ()}.items()
    }
)


@settings(max_examples=30, deadline=None, database=None)
@given(trees, trees, trees)
def test_laws(a: Tree, b: Tree, c: Tree) -> None:
    """Of a vector space with an inner product; on whole numbers they are exact."""
    assert values(tree.add(a, b)) == values(tree.add(b, a))
    assert values(tree.add(a, tree.add(b, c))) == values(tree.add(tree.add(a, b), c))
    assert values(tree.sub(tree.add(a, b), b)) == values(a)
    assert values(tree.axpy(2.0, a, b)) == values(tree.add(tree.scale(2.0, a), b))
    assert float(tree.dot(tree.add(a, b), c)) == float(tree.dot(a, c)) + float(tree.dot(b, c))
