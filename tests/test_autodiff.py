"""value_and_grad: one by one, for a block, inside other transforms; all against ordinary autograd or by hand."""

import pytest
import torch
from torch import Tensor

from fedsim.autodiff import Loss, value_and_grad
from fedsim.types import Batch, Tree

DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
K, B, D, C = 3, 4, 5, 2


def loss(params: Tree, batch: Batch) -> Tensor:
    """A small network with a curved loss; ``unused`` has gradient 0."""
    z = torch.tanh(batch.x @ params["a"]) @ params["b"]
    each = (torch.logsumexp(z, -1) - z.gather(-1, batch.y[..., None])[..., 0]) ** 2
    return each.mean() if batch.weight is None else (batch.weight * each).sum() / batch.weight.sum()


def world(dtype: torch.dtype) -> tuple[Tree, Batch]:
    """Parameters [K, …] and batches [K, B, …]."""
    g = torch.Generator().manual_seed(7)
    params = {"a": torch.randn(K, D, 6, generator=g, dtype=dtype), "unused": torch.ones(K, 2, dtype=dtype)}
    params["b"] = torch.randn(K, 6, C, generator=g, dtype=dtype)
    x, y = torch.randn(K, B, D, generator=g, dtype=dtype), torch.randint(C, (K, B), generator=g)
    return params, Batch(x, y, torch.rand(K, B, generator=g, dtype=dtype))


def at(tree: Tree, k: int) -> Tree:
    return {name: x[k] for name, x in tree.items()}


def reference(params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    value = loss(leaves, batch)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves.values(), strict=True)]
    return value.detach(), dict(zip(leaves, grads, strict=True))


def close(a: Tree, b: Tree, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_logistic_gradient_by_hand() -> None:
    # Two examples, two classes, W = 0: p = (1/2, 1/2), so ∇W = (1/n) Σ (p − onehot(y)) xᵀ.
    x, y = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([0, 1])

    def logistic(params: Tree, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(batch.x @ params["w"].T, batch.y)

    value, grads = value_and_grad(logistic)({"w": torch.zeros(2, 2)}, Batch(x, y))
    assert value.item() == pytest.approx(0.6931472, abs=1e-6)
    # (−½·(1,2) + ½·(3,−4)) / 2 = (0.5, −1.5), and its negative for the other class
    torch.testing.assert_close(grads["w"], torch.tensor([[0.5, -1.5], [-0.5, 1.5]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ambient", [torch.enable_grad, torch.no_grad])
def test_plain_is_ordinary_autograd_and_changes_nothing(dtype: torch.dtype, ambient: type) -> None:
    params, batch = world(dtype)
    mine, b = at(params, 0), Batch(*(t[0] for t in batch))
    before = [t.clone() for t in (*mine.values(), *b)]
    with ambient():
        value, grads = value_and_grad(loss)(mine, b)
    expected, gradient = reference(mine, b)
    close({"value": value, **grads}, {"value": expected, **gradient}, 0)
    assert grads["unused"].eq(0).all() and value.dtype == grads["a"].dtype == dtype
    assert all(torch.equal(t, old) for t, old in zip((*mine.values(), *b), before, strict=True))
    assert not any(t.requires_grad or t.grad is not None for t in (*mine.values(), value, *grads.values()))


SHARED = [(), ("a",), ("a", "b", "unused"), ("x",), ("y", "weight"), ("no weight",), ("a", "no weight")]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shared", SHARED, ids=lambda s: "+".join(s) or "none")
def test_a_block_agrees_with_one_by_one(dtype: torch.dtype, tolerance: float, shared: tuple[str, ...]) -> None:
    params, batch = world(dtype)
    fields = batch._asdict() | ({"weight": None} if "no weight" in shared else {})
    params = {name: p[0] if name in shared else p for name, p in params.items()}
    fields = {name: t[0] if t is not None and name in shared else t for name, t in fields.items()}
    dims = (
        {name: None if name in shared else 0 for name in params},
        Batch(*(None if t is None or name in shared else 0 for name, t in fields.items())),
    )
    values, grads = torch.vmap(value_and_grad(loss), in_dims=dims)(params, Batch(**fields))
    assert values.shape == (K,) and not values.requires_grad
    for k in range(K):
        one = {name: p if name in shared else p[k] for name, p in params.items()}
        b = Batch(*(t if t is None or name in shared else t[k] for name, t in fields.items()))
        value, grad = reference(one, b)
        close({"value": values[k], **at(grads, k)}, {"value": value, **grad}, tolerance)


def test_any_dimension_can_be_the_block() -> None:
    params, batch = world(torch.float64)
    moved = {name: p.movedim(0, -1) for name, p in params.items()}
    x = batch.x.movedim(0, 1)
    _, grads = torch.vmap(value_and_grad(loss), in_dims=(dict.fromkeys(moved, -1), Batch(1, 0, 0)))(
        moved, Batch(x, batch.y, batch.weight)
    )
    _, expected = torch.vmap(value_and_grad(loss))(params, batch)
    close(grads, expected, 1e-12)


class Lowered:
    """A loss with its own formulation for a block; it notes what it was given, and answers recognisably."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tree, Batch]] = []

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        return loss(params, batch)

    def block(self, params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        self.seen.append((params, batch))
        return torch.arange(len(batch.x)), {name: torch.full_like(p, 3.0) for name, p in params.items()}


def test_a_lowered_formulation_gets_the_block_and_nothing_else() -> None:
    params, batch = world(torch.float64)
    lowered = Lowered()
    shared = params | {"a": params["a"][0]}
    dims = ({"a": None, "unused": 0, "b": 0}, Batch(1, None, None))
    given_x = batch.x.movedim(0, 1)
    values, grads = torch.vmap(value_and_grad(lowered), in_dims=dims)(shared, Batch(given_x, batch.y[0], None))
    [(given, b)] = lowered.seen
    assert values.tolist() == [0, 1, 2] and all(g.eq(3).all() and len(g) == K for g in grads.values())
    assert {name: p.shape for name, p in given.items()} == {name: p.shape for name, p in params.items()}
    assert torch.equal(b.x, batch.x) and b.y.shape == (K, B) and b.weight is None
    assert torch.equal(given["a"][2], params["a"][0]) and torch.equal(given["b"], params["b"])

    value_and_grad(lowered)(at(params, 0), Batch(*(t[0] for t in batch)))
    assert len(lowered.seen) == 1  # one client is a plain step


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("fn", [loss, Lowered()], ids=["generic", "lowered"])
def test_per_example_gradients_inside_a_block(dtype: torch.dtype, tolerance: float, fn: Loss) -> None:
    params, batch = world(dtype)
    per_example = torch.vmap(value_and_grad(fn), in_dims=(dict.fromkeys(params), Batch(0, 0, None)))
    over_clients = torch.vmap(per_example, in_dims=(dict.fromkeys(params, 0), Batch(0, 0, None)))
    values, grads = over_clients(params, Batch(batch.x[:, :, None], batch.y[:, :, None]))
    assert values.shape == (K, B) and grads["a"].shape == (K, B, D, 6)
    for k in range(K):
        for i in range(B):
            value, grad = reference(at(params, k), Batch(batch.x[k, i : i + 1], batch.y[k, i : i + 1]))
            close({"value": values[k, i], **at(at(grads, k), i)}, {"value": value, **grad}, tolerance)


def curvature(params: Tree, batch: Batch) -> Tensor:
    """A function of the value and of the gradient, so that its gradient needs second derivatives."""
    value, grads = value_and_grad(loss)(params, batch)
    return value**2 + sum((g**2).sum() for g in grads.values())


def curvature_reference(params: Tree, batch: Batch) -> list[Tensor]:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    x = batch.x.clone().requires_grad_()
    value = loss(leaves, batch._replace(x=x))
    grads = torch.autograd.grad(value, [leaves["a"], leaves["b"]], create_graph=True)
    return list(torch.autograd.grad(value**2 + sum((g**2).sum() for g in grads), [leaves["a"], leaves["b"], x]))


def test_second_derivatives() -> None:
    params, batch = world(torch.float64)
    one, b = at(params, 1), Batch(*(t[1] for t in batch))
    expected = curvature_reference(one, b)

    by_func = torch.func.grad(curvature)(one, b)
    leaves = {name: p.clone().requires_grad_() for name, p in one.items()}
    x = b.x.clone().requires_grad_()
    by_autograd = torch.autograd.grad(curvature(leaves, b._replace(x=x)), [leaves["a"], leaves["b"], x])
    by_inputs = torch.autograd.grad(curvature(one, b._replace(x=x)), [x])
    for found in ([by_func["a"], by_func["b"]], by_autograd):
        for f, e in zip(found, expected, strict=False):
            torch.testing.assert_close(f, e, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(by_inputs[0], expected[2], atol=1e-10, rtol=1e-10)


class Detached(Lowered):
    """A right formulation whose results autograd cannot follow, as those of a native kernel."""

    def block(self, params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        ones = [reference(at(params, k), Batch(*(t[k] for t in batch))) for k in range(len(batch.x))]
        return torch.stack([v for v, _ in ones]), {name: torch.stack([g[name] for _, g in ones]) for name in params}


@pytest.mark.parametrize("fn", [loss, Detached()], ids=["generic", "lowered"])
def test_second_derivatives_of_a_block(fn: Loss) -> None:
    params, batch = world(torch.float64)

    def f(params: Tree, batch: Batch) -> Tensor:
        value, grads = value_and_grad(fn)(params, batch)
        return value**2 + sum((g**2).sum() for g in grads.values())

    inside = torch.vmap(torch.func.grad(f))(params, batch)  # grad inside vmap
    around = torch.func.grad(lambda p: torch.vmap(f)(p, batch).sum())(params)  # vmap inside grad
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    torch.vmap(f)(leaves, batch).sum().backward()  # vmap under ordinary autograd
    for k in range(K):
        expected = curvature_reference(at(params, k), Batch(*(t[k] for t in batch)))
        for found in (inside, around, {name: p.grad for name, p in leaves.items()}):
            torch.testing.assert_close(found["a"][k], expected[0], atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(found["b"][k], expected[1], atol=1e-10, rtol=1e-10)


def test_a_broken_loss_is_heard() -> None:
    def broken(params: Tree, batch: Batch) -> Tensor:
        raise ArithmeticError("no such loss")

    params, batch = world(torch.float64)
    with pytest.raises(ArithmeticError, match="no such loss"):
        value_and_grad(broken)(params, batch)
    with pytest.raises(ArithmeticError, match="no such loss"):
        torch.vmap(value_and_grad(broken))(params, batch)
    with pytest.raises(RuntimeError, match="does not require grad"):
        value_and_grad(lambda p, b: b.x.sum())(params, batch)  # a loss without parameters
