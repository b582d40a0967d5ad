"""The seam between algorithms and fast formulations: the value and the gradient of a loss.

A local update is written for one client and calls ``value_and_grad(task.loss)``. How the gradient is computed depends
on how the engine runs that client, and an algorithm never knows:

    one client      ordinary autograd on detached leaves: the fastest plain step on a CPU
    a block         under ``torch.vmap`` all clients at once: by the loss's own lowered formulation where it has one
                    (``loss.block``), else by ``torch.func.grad_and_value``
    anything else   other ``torch.func`` transforms around or inside (per-example gradients, second derivatives):
                    composed by ``torch.func`` itself, slower and just as right
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transformed  # what autograd.Function.apply itself asks

from fedsim.types import Batch, Tree

__all__ = ["Block", "Loss", "transformed", "value_and_grad"]

Loss = Callable[[Tree, Batch], Tensor]


class Block(Protocol):
    """A loss's own formulation for K clients at once, found as its attribute ``block``.

    ``params`` [K, …], ``batch`` [K, B, …] (``weight`` [K, B] or None) -> values [K] and gradients [K, …]. It must not
    change its arguments, and client k's results must depend on client k's slices alone.
    """

    def __call__(self, params: Tree, batch: Batch) -> tuple[Tensor, Tree]: ...


def value_and_grad(loss: Loss) -> Callable[[Tree, Batch], tuple[Tensor, Tree]]:
    """The function (params, batch) -> (value of shape (), gradient with the names of ``params``).

    A parameter that the loss does not use has gradient 0. Nothing is changed, and the results are detached unless a
    ``torch.func`` transform asks for derivatives of them, or a parameter, input or weight that requires grad.
    """

    def compute(params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        if not transformed() and not _differentiated((*params.values(), *batch)):
            return _backward(loss, params, batch)
        if getattr(loss, "block", None) is None:
            grads, value = torch.func.grad_and_value(loss)(params, batch)
            return value, grads
        value, *leaves = _Lowered.apply(_Call(loss, tuple(params)), *batch, *params.values())  # type: ignore[no-untyped-call]
        return value, dict(zip(params, leaves, strict=True))

    return compute


def _backward(loss: Loss, params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
    """One ordinary backward pass on detached leaves, which share the parameters' memory."""
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        value = loss(leaves, batch)
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return value.detach(), dict(zip(params, grads, strict=True))


def _differentiated(tensors: Any) -> bool:
    """Whether ordinary autograd is recording what is done with these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)


class _Call:
    """A loss and the names of its parameters, as one leaf: ``torch.func`` takes tuples apart at every turn."""

    def __init__(self, loss: Loss, names: tuple[str, ...]) -> None:
        self.loss, self.names = loss, names

    def plain(self, x: Tensor, y: Tensor, weight: Tensor | None, *params: Tensor) -> tuple[Tensor, ...]:
        """One ordinary backward pass."""
        value, grads = _backward(self.loss, dict(zip(self.names, params, strict=True)), Batch(x, y, weight))
        return value, *grads.values()

    def generic(self, x: Tensor, y: Tensor, weight: Tensor | None, *params: Tensor) -> tuple[Tensor, ...]:
        """``torch.func``'s own formulation, which composes with every transform and with autograd."""
        named = dict(zip(self.names, params, strict=True))
        grads, value = torch.func.grad_and_value(self.loss)(named, Batch(x, y, weight))
        return value, *(grads[name] for name in self.names)


class _Lowered(torch.autograd.Function):
    """(call, x, y, weight, *params) -> (value, *grads), as one operation that has a batching rule of its own."""

    @staticmethod
    def forward(call: _Call, *tensors: Any) -> Any:
        return call.plain(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Second derivatives: the pull-back of (value, gradient) by the parameters, the inputs and the weights."""
        tensors = ctx.saved_tensors
        active = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

        def recompute(*variables: Tensor) -> tuple[Tensor, ...]:
            new = dict(zip(active, variables, strict=True))
            return cast(tuple[Tensor, ...], ctx.call.generic(*(new.get(i, t) for i, t in enumerate(tensors))))

        pull = torch.func.vjp(recompute, *(tensors[i] for i in active))[1]
        by = dict(zip(active, pull(cotangents), strict=True))
        return None, *(by.get(i) for i in range(len(tensors)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Any) -> Any:
        size, dims, out_dims = info.batch_size, in_dims[1:], (0,) * (1 + len(call.names))
        if transformed() or _differentiated(tensors):
            # The transforms that are still active lie around this one, and a lowered formulation need not know them.
            return torch.vmap(call.generic, in_dims=dims, randomness=info.randomness)(*tensors), out_dims

        def stack(t: Tensor | None, dim: int | None) -> Any:
            if t is None or dim == 0:
                return t
            return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)

        x, y, weight, *params = (stack(t, d) for t, d in zip(tensors, dims, strict=True))
        block: Block = call.loss.block  # type: ignore[attr-defined]
        values, grads = block(dict(zip(call.names, params, strict=True)), Batch(x, y, weight))
        return (values, *(grads[name] for name in call.names)), out_dims
