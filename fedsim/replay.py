"""A block's step, recorded once and played again: CUDA graphs.

On a GPU a step of small models is a hundred kernels of a few microseconds, and starting them from Python takes longer
than running them. A recording starts them all at once. It reads and writes fixed places in memory, so everything that
a step needs is copied there: the broadcast once a block, the carries once a pass, positions, weights and draws each
step. Every client of the block takes every step; of those that are done the result is thrown away, so that one
recording serves from the first step to the last.

The recording itself is a ``Recorder``'s: ``Cuda``, or ``Again``, which calls the function each time and is what tests
have in the place of a GPU. The former has not met one yet.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

log = logging.getLogger("fedsim")

WARM = 3  # runs before a recording, in which libraries choose their kernels and take their memory
KEPT = 8  # recordings of a process


class Recorder(Protocol):
    """Makes a function that does again, at the same places in memory, what ``run`` does."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]: ...


class Cuda:
    """On the current GPU."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        play: Callable[[], None] = graph.replay
        return play


class Again:
    """The function itself, anywhere."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        for _ in range(WARM):
            run()
        return run


class Recording:
    """``advance(*inputs) -> carry`` at fixed places: the first input is the carry, and takes what comes out."""

    def __init__(self, recorder: Recorder, advance: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        fixed = pytree.tree_map_only(Tensor, torch.clone, inputs)
        self._places = [_tensors(part) for part in fixed]
        self.carry = fixed[0]

        def run() -> None:
            for place, x in zip(self._places[0], _tensors(advance(*fixed)), strict=True):
                place.copy_(x)

        self._play = recorder.record(run)

    def put(self, *inputs: Any, first: int = 0) -> None:
        """Set inputs, from the one with this number on."""
        for places, value in zip(self._places[first:], inputs, strict=False):
            for place, x in zip(places, _tensors(value), strict=True):
                place.copy_(x)

    def play(self) -> None:
        """Take a step."""
        self._play()


_KEPT: OrderedDict[Any, Recording | None] = OrderedDict()


def recording(
    recorder: Recorder, of: Any, advance: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device
) -> Recording | None:
    """The recording of ``of``, whatever ``advance`` is known by, for inputs of these shapes: an earlier one, or a new.

    None where it cannot be recorded; that is said once, and not tried again.
    """
    key = of, type(recorder), described(inputs, device)
    if key in _KEPT:
        _KEPT.move_to_end(key)
        return _KEPT[key]
    try:
        made = Recording(recorder, advance, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        log.warning("steps cannot be recorded, and are taken from Python: %s: %s", type(e).__name__, e)
        made = None
    _KEPT[key] = made
    while len(_KEPT) > KEPT:
        _KEPT.popitem(last=False)
    return made


def described(inputs: tuple[Any, ...], device: torch.device) -> Any:
    """What a recording on this device depends on: structure and shapes of its inputs, and the values of those that lie
    elsewhere. A step may look into these and act upon them (a round's number, a seed), which no recording repeats."""
    tensors = _tensors(inputs)
    shapes = tuple((tuple(t.shape), t.dtype, t.device.type) for t in tensors)
    elsewhere = tuple(t.numpy().tobytes() for t in tensors if t.device.type == "cpu" != device.type)
    return pytree.tree_structure(inputs), shapes, elsewhere


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
