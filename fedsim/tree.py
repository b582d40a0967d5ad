"""Arithmetic on named tensors. Nothing here changes its arguments."""

from collections.abc import Callable
from hashlib import sha256

import torch
from torch import Tensor

from fedsim.types import Payload, Tree


def map(f: Callable[..., Tensor], *trees: Tree) -> Tree:
    """Apply ``f`` name by name. The trees must have the same names."""
    first, *rest = trees
    for other in rest:
        if other.keys() != first.keys():
            raise ValueError(f"trees differ in {sorted(first.keys() ^ other.keys())}")
    return {name: f(x, *(other[name] for other in rest)) for name, x in first.items()}


def add(a: Tree, b: Tree) -> Tree:
    return map(torch.add, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    return map(torch.sub, a, b)


def scale(c: float | Tensor, a: Tree) -> Tree:
    return map(lambda x: c * x, a)


def axpy(c: float | Tensor, x: Tree, y: Tree) -> Tree:
    """c x + y. Written as a product and a sum, so that a number and a 0-d tensor give the same bits."""
    return map(lambda xi, yi: yi + c * xi, x, y)


def zeros(a: Tree) -> Tree:
    return map(torch.zeros_like, a)


def dot(a: Tree, b: Tree) -> Tensor:
    """The inner product over all names, summed in the order of ``a``; shape ()."""
    return torch.stack([(x * b[name]).sum() for name, x in a.items()]).sum()


def norm(a: Tree) -> Tensor:
    """The Euclidean norm over all names; shape ()."""
    return dot(a, a).sqrt()


def cosine(a: Tree, b: Tree) -> Tensor:
    """The cosine of the angle between two trees, 0 where one of them is zero; shape ()."""
    lengths = norm(a) * norm(b)
    return torch.where(lengths > 0, dot(a, b) / lengths, torch.zeros_like(lengths))


def cast(a: Tree, like: Tree) -> Tree:
    """``a`` in the dtypes of ``like``."""
    return map(lambda x, y: x.to(y.dtype), a, like)


def nbytes(payload: Payload) -> int:
    """Bytes of the tensors of a payload, as they are encoded on the wire (headers not counted)."""
    return sum(x.numel() * x.element_size() for part in payload.values() for x in part.values())


def finite(a: Tree) -> bool:
    """Whether every element is a finite number."""
    # The sum of a tensor is finite almost always when its elements are, and costs one pass; only then look closer.
    return all(bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all()) for x in a.values())


def digest(a: Tree) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    h = sha256()
    for name in sorted(a):
        x = a[name].detach().cpu().contiguous()
        h.update(f"{name}|{x.dtype}|{tuple(x.shape)}|".encode())
        h.update(x.view(torch.uint8).numpy().tobytes() if x.ndim else x.reshape(1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
