"""What follows from an update without any search.

A hypernetwork's output layers are θ_k = W_k a + b_k with one a, so of one gradient of φ

    ∂F/∂b_k = ∂F/∂θ_k,      ∂F/∂W_k = (∂F/∂θ_k) aᵀ      ⇒      a, and with the φ that was broadcast θ_k = W_k a + b_k

and whoever sees it has the client's θ and the gradient by θ, without its embedding. With low-rank and Kronecker heads
the same holds, since both keep b_k. Over several steps a changes on the way and the last identity becomes approximate,
the first does not: Δb_k is what momentum SGD did to θ_k along the way.

A linear layer on one example z has ∂F/∂W = δ zᵀ and ∂F/∂b = δ, so z is any row of the one over that entry of the other.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.types import Tree


class Generated(NamedTuple):
    """What was recovered of a generated network: θ, ∂F/∂θ, and a (H,), the trunk's output."""

    theta: Tree
    gradient: Tree
    a: Tensor


def gradient_of(delta: Tree, start: Tree, lr: float, steps: int, momentum: float, decay: float) -> Tree:
    """The mean gradient along an SGD update: −Δ/(η W) − λ w, with W = Σ over steps of the weight that its gradient has.

    For one step it is the gradient. Momentum starts at 0, as everywhere here.
    """
    weight = sum((1 - momentum ** (steps - t)) / (1 - momentum) for t in range(steps))
    return {n: -x / (lr * weight) - decay * start[n] for n, x in delta.items()}


def generated(gradient: Tree, phi: Tree, shapes: Mapping[str, torch.Size]) -> Generated:
    """θ and ∂F/∂θ of a gradient by φ (names as ``clients.hypernet`` gives them; ``shapes`` of what is generated).

    a is the least-squares solution over all output layers; exact for one gradient, up to rounding.
    """
    by_theta = {n: gradient[f"head.{n}.bias"] for n in shapes}
    num = den = None
    for n, shape in shapes.items():
        g = by_theta[n]
        if f"head.{n}.weight" in gradient:  # gᵀ (g aᵀ) = ‖g‖² aᵀ
            top, bottom = (
                g @ gradient[f"head.{n}.weight"],
                g.square().sum().expand(gradient[f"head.{n}.weight"].shape[1]),
            )
        elif f"head.{n}.right" in gradient:  # ∂F/∂V = (Uᵀ g) aᵀ
            left = phi[f"head.{n}.left"].T @ g
            top, bottom = (
                left @ gradient[f"head.{n}.right"],
                left.square().sum().expand(gradient[f"head.{n}.right"].shape[1]),
            )
        else:  # ∂F/∂A = (G B) diag(a), column by column
            product = g.view(shape[0], -1) @ phi[f"head.{n}.columns"]
            top, bottom = (product * gradient[f"head.{n}.rows"]).sum(0), product.square().sum(0)
        num, den = (top, bottom) if num is None or den is None else (num + top, den + bottom)
    assert num is not None and den is not None
    a = num / den.clamp(min=torch.finfo(den.dtype).tiny)
    theta = {n: (_output(phi, n, a) + phi[f"head.{n}.bias"]).view(shape) for n, shape in shapes.items()}
    return Generated(theta, {n: by_theta[n].view(shape) for n, shape in shapes.items()}, a)


def _output(phi: Tree, name: str, a: Tensor) -> Tensor:
    if f"head.{name}.weight" in phi:
        return phi[f"head.{name}.weight"] @ a
    if f"head.{name}.right" in phi:
        return phi[f"head.{name}.left"] @ (phi[f"head.{name}.right"] @ a)
    return ((phi[f"head.{name}.rows"] * a) @ phi[f"head.{name}.columns"].T).flatten()


def linear_input(weight: Tensor, bias: Tensor) -> Tensor:
    """The input (in,) of a linear layer of one example, from its gradients (out, in) and (out,): least squares."""
    return bias @ weight / bias.square().sum().clamp(min=torch.finfo(bias.dtype).tiny)


def labels(gradient: Tensor, count: int) -> Tensor:
    """The labels of ``count`` examples, (count,), from the gradient (classes,) of the logits' bias.

    That is the mean over examples of p − onehot(y): negative where there are labels. Counts are estimated with p = 1/C
    and given out one by one; for one example it is the smallest entry, which is exact.
    """
    left = count * (1 / len(gradient) - gradient)
    out = []
    for _ in range(count):
        out.append(int(left.argmax()))
        left[out[-1]] -= 1
    return torch.tensor(sorted(out))
