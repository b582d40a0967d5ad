"""Arithmetic on named tensors, and structures of any kind with tensors in them. Nothing here changes its arguments."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from fedsim.types import Payload, Tree

HOST = torch.device("cpu")
T = TypeVar("T")


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
    return all(abs(x.sum().item()) < math.inf or bool(torch.isfinite(x).all()) for x in a.values())


def digest(a: Tree) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    h = sha256()
    for name in sorted(a):
        x = a[name].detach().cpu().contiguous()
        h.update(f"{name}|{x.dtype}|{tuple(x.shape)}|".encode())
        h.update(x.view(torch.uint8).numpy().tobytes() if x.ndim else x.reshape(1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def payload_digest(payload: Payload) -> str:
    """The digest of all channels."""
    return digest({f"{channel}.{name}": x for channel, part in payload.items() for name, x in part.items()})


def each(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``f`` of each tensor in it. For usual structures a tenth of what pytree's general way takes."""
    if isinstance(value, Tensor):
        return f(value)
    kind = type(value)
    if kind is dict:
        return {name: each(f, x) for name, x in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(each(f, x) for x in value))
    if kind in (tuple, list):
        return kind(each(f, x) for x in value)
    return pytree.tree_map_only(Tensor, f, value)


def stack(values: Sequence[Any]) -> Any:
    """Equal structures, stacked leaf by leaf."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(list(values))
    if type(first) is dict and all(type(v) is dict and v.keys() == first.keys() for v in values):
        return {name: stack([v[name] for v in values]) for name in first}
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *values)


def moved(value: T, device: torch.device) -> T:
    """``value`` with every tensor in it on ``device``; those that are there already are the same objects."""
    out: T = each(lambda t: t.to(device), value)
    return out


def placed(value: T, device: torch.device) -> T:
    """As ``moved``, for what a client works with: whole numbers of no dimension (a seed, a count) stay on the host.

    They are read there without waiting for the device, and act on its tensors as numbers do.
    """
    out: T = each(lambda t: t if not t.ndim and not t.is_floating_point() else t.to(device), value)
    return out


def resident(held: Tree, device: torch.device) -> Tree:
    """Constants of the host on ``device``, where each is brought once and stays for as long as it lives here."""
    return {name: _resident(x, device) for name, x in held.items()}


_RESIDENT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _resident(x: Tensor, device: torch.device) -> Tensor:
    if x.device == device:
        return x
    copies: dict[torch.device, Tensor] | None = _RESIDENT.get(x)  # type: ignore[no-untyped-call]
    if copies is None:
        copies = _RESIDENT[x] = {}
    if device not in copies:
        with constants():
            copies[device] = x.to(device)
    return copies[device]


@contextmanager
def constants() -> Iterator[None]:
    """Inside, constants are made: a ``vmap``, in whose middle one may be asked for first, does not see it."""
    with torch._C._DisableFuncTorch(), torch.no_grad():
        yield


def device(*trees: Tree) -> torch.device:
    """Where these tensors are used together: a GPU where one of them is there, else the host."""
    found = {x.device for tree in trees for x in tree.values() if x.device != HOST}
    return next(iter(found), HOST)
