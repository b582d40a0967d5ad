"""What one worker does with a run of cohort positions: their work, the checks, and the fold.

Inline, Ray and tests call the same function; it is where a client's failure gets its name.
"""

import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fedsim import block, tree
from fedsim.block import Guest, Work
from fedsim.data.dataset import Federation
from fedsim.fold import Node, leaves
from fedsim.types import Done, Payload, Reducer, Report

log = logging.getLogger("fedsim")


class Failure(NamedTuple):
    """A client whose work does not count, and why."""

    client: int
    reason: str


class Partial(NamedTuple):
    """A worker's answer: nodes of the fold, the clients' new memory (it stays on this side), and what went wrong."""

    nodes: list[Node[Any]]
    memory: dict[int, Payload]
    failures: tuple[Failure, ...]
    clients: int
    examples: int
    bytes_up: int


def run(
    work: Work,
    federation: Federation,
    guests: Sequence[Guest],
    start: int,
    cohort: int,
    reduce: Reducer[Any, Any],
    batched: bool,
) -> Partial:
    """Run the clients at positions ``start …`` of a cohort, and fold their reports."""
    values: list[Any] = []
    memory: dict[int, Payload] = {}
    failures: list[Failure] = []
    clients = examples = bytes_up = 0
    for guest, result in zip(guests, _results(work, federation, guests, batched), strict=True):
        report = result if isinstance(result, Failure) else _report(guest.client, *result)
        if isinstance(report, Failure) or isinstance(result, Failure):
            failures.append(report if isinstance(report, Failure) else Failure(guest.client, "no report"))
            values.append(None)
            continue
        done, _ = result
        try:
            values.append(reduce.take(work.shared, report))
        except ValueError as e:  # the server's screen
            failures.append(Failure(guest.client, str(e)))
            values.append(None)
            continue
        if done.memory:
            memory[guest.client] = done.memory
        clients, examples, bytes_up = clients + 1, examples + report.examples, bytes_up + tree.nbytes(report.value)
    nodes = leaves(values, start, reduce.merge, cohort)
    return Partial(nodes, memory, tuple(failures), clients, examples, bytes_up)


def _results(
    work: Work, federation: Federation, guests: Sequence[Guest], batched: bool
) -> list[tuple[Done, int] | Failure]:
    if batched and work.local.unbatchable is None and len(guests) > 1:
        try:
            return list(block.batched(work, federation, guests))
        except Exception as e:
            # A block fails as a whole; one by one, the client that is to blame gets its name.
            log.warning("block of %d clients failed (%s); running it one by one", len(guests), reason(e))
    results: list[tuple[Done, int] | Failure] = []
    for guest in guests:
        try:
            results.append(block.one(work, federation, guest))
        except Exception as e:
            log.debug("client %d", guest.client, exc_info=True)
            results.append(Failure(guest.client, reason(e)))
    return results


def _report(client: int, done: Done, examples: int) -> Report | Failure:
    """The report of a finished client, or what is wrong with it."""
    bad = wrong(done)
    if bad is not None:
        return Failure(client, bad)
    return Report(client, examples, done.value, {name: float(value) for name, value in done.metrics.items()})


def wrong(done: Done) -> str | None:
    """Why a client's work must not count: a number that is none, in what it sends, keeps or measures."""
    for whose, payload in (("its update", done.value), ("its memory", done.memory)):
        for channel, part in payload.items():
            if not tree.finite(part):
                name = next(name for name, x in part.items() if not x.isfinite().all())
                return f"NaN or Inf in {whose} ({channel}: {name})"
    for name, value in done.metrics.items():
        if not math.isfinite(float(value)):
            return f"{name} is {float(value)}"
    return None


class Unusable(Exception):
    """A client's work that must not count; its text is the reason."""


def reason(e: BaseException) -> str:
    """An exception in one line."""
    if isinstance(e, Unusable):
        return str(e)
    first = str(e).strip().split("\n")[0]
    return f"{type(e).__name__}: {first}" if first else type(e).__name__


def where(e: BaseException) -> str:
    """The file and line in which an exception was raised."""
    frame, last = e.__traceback__, "?"
    while frame is not None:
        last = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return last


@cache
def say_once(message: str) -> None:
    """Log a line the first time it is said in this process."""
    log.info(message)
