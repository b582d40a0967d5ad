"""A GPU in this process's memory, for machines without one: tensors that torch takes for those of another device.

A ``Far`` tensor belongs to the device "pretend" and holds its numbers in a tensor of the CPU. Each operation on it is
done there, after the rules that CUDA has were applied: operands lie on one device (a CPU's tensor of no dimension may
take part), and a generator belongs to the device that it draws for. So results are those of a CPU, to the last bit,
and whatever would fail on a GPU because something was left on the other side fails here as well.

``Machine.strict`` is what a CUDA graph's capture forbids besides: to wait for a result (``float(x)``, ``if x``, a shape
that depends on numbers) and to copy between host and device.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fedsim.rng import Key

NAME = "pretend"
# Copies go from one device to the other, and CUDA takes positions from the host.
CROSS = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"}
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::_linalg_check_errors",
}


class Far(Tensor):
    """A tensor on the device "pretend"; ``near`` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        strides, offset = near.stride(), near.storage_offset()
        out: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.size(), strides=strides, storage_offset=offset, dtype=near.dtype, device=torch.device(NAME, 0)
        )
        out.near = near
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Far({self.near!r})"

    def tolist(self) -> Any:
        return self.near.tolist()

    def data_ptr(self) -> int:
        return self.near.data_ptr()


class FarGenerator(torch.Generator):
    """A generator of that device; it gives the numbers that the CPU's gives."""

    device = torch.device("cpu")  # set below, once there is such a device


def home(value: Any) -> Any:
    """``value`` with the numbers of every far tensor in it."""
    return pytree.tree_map_only(Far, lambda t: t.near, value)


def is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    far = [t for t in tensors if isinstance(t, Far)]
    near = [t for t in tensors if not isinstance(t, Far) and t.ndim]
    if far and near and name not in CROSS:
        shapes = [tuple(t.shape) for t in far], [tuple(t.shape) for t in near]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {shapes[0]} and {shapes[1]}")
    there = is_far(kwargs["device"]) if kwargs.get("device") is not None else bool(far)
    if Machine.strict and (far or there):
        crosses = name in CROSS and (bool(near) or there != bool(far))
        masks = name.startswith("aten::index") and any(t.dtype == torch.bool for t in tensors[1:])  # how many are set?
        if name in WAITS or crosses or masks:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
    given = dict(kwargs, device=torch.device("cpu")) if kwargs.get("device") is not None else kwargs
    out = func(*home(args), **home(given))
    first = func._schema.arguments[0].alias_info if func._schema.arguments else None
    if first is not None and first.is_write and len(func._schema.returns) == 1:
        if torch.Tag.inplace_view in func.tags:
            _reshape(func, args, kwargs)
        return args[0]  # in place: the object itself
    return pytree.tree_map_only(Tensor, Far, out) if there else out


def _reshape(func: Any, args: Any, kwargs: Any) -> None:
    """Give the far tensor itself the shape that an operation like ``unsqueeze_`` gave to its numbers."""
    with no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


class Machine(TorchDispatchMode):
    """Operations without a far operand: those that make one."""

    strict = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Numbers that become a far tensor: they are one of the host's first, as on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            target = kwargs.get("device") or next((t.device for t in args[:1] if isinstance(t, Tensor)), "cpu")
            if is_far(target) != isinstance(kwargs["generator"], FarGenerator):
                raise RuntimeError(f"{func}: expected a generator of the device that it draws for")
        if func in (torch.tensor, torch.as_tensor) and is_far(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@cache
def _plugged_in() -> torch.device:
    """Once a process: torch keeps a device that it was told of."""
    _setup_privateuseone_for_python_backend(NAME)
    FarGenerator.device = torch.device(NAME, 0)
    return torch.device(NAME, 0)


_plugged_in()  # now, before a first backward pass counts the devices


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """Inside, there is the device."""
    device, of_key = _plugged_in(), (Key.torch, Key.wide)

    def seeded(of: Callable[..., torch.Generator]) -> Callable[..., torch.Generator]:
        def stream(key: Key, device: torch.device | str = "cpu") -> torch.Generator:
            if not is_far(device):
                return of(key, device)
            far = FarGenerator()
            far.set_state(of(key).get_state())
            return far

        return stream

    with ExitStack() as stack:
        stack.callback(lambda: setattr(Key, "torch", of_key[0]))
        stack.callback(lambda: setattr(Key, "wide", of_key[1]))
        Key.torch, Key.wide = seeded(of_key[0]), seeded(of_key[1])  # type: ignore[method-assign]
        stack.enter_context(_Literals())
        stack.enter_context(Machine())
        yield device


def formed(W0: Tensor, parts: tuple[Tensor, ...], scale: float, clients: int) -> Tensor:
    """``fedsim.tasks.adapters._Sum.of``, as a matrix: a tensor cannot be of two subclasses."""
    if clients or not parts:
        raise ValueError("a far weight stands for one client")
    product = parts[0]
    for factor in parts[1:]:
        product = factor @ product
    return W0 + scale * product
