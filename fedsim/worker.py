"""What one worker does with a run of cohort positions: their work, the checks, and the fold.

Inline, Ray and tests call the same function; it is where a client's failure gets its name.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim import block, tree
from fedsim.block import Guest, Work
from fedsim.data.dataset import Federation
from fedsim.errors import FedsimError, where
from fedsim.fold import Node, leaves, level
from fedsim.replay import Recorder
from fedsim.types import Done, Payload, Reducer, Report, Reports

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
    channels: frozenset[str] = frozenset()


def together(a: Partial, b: Partial) -> Partial:
    """Two answers as one."""
    return Partial(
        a.nodes + b.nodes,
        a.memory | b.memory,
        a.failures + b.failures,
        a.clients + b.clients,
        a.examples + b.examples,
        a.bytes_up + b.bytes_up,
        a.channels | b.channels,
    )


def run(
    work: Work,
    federation: Federation,
    guests: Sequence[Guest],
    start: int,
    cohort: int,
    reduce: Reducer[Any, Any],
    batched: bool,
    recorder: Recorder | None = None,
    retry: bool = False,
) -> Partial:
    """Run the clients at positions ``start …`` of a cohort, and fold their reports.

    They work and are reduced on the device of the data set; work comes from the host, and what is answered goes there.
    A block that does not fit a GPU's memory is run as two.
    """
    work = _there(work, federation)
    broadcast = [(name, x, x._version) for part in work.shared.values() for name, x in part.items()]
    full = False
    try:
        block_of = _stacked(work, federation, guests, recorder) if batched and work.local.unbatchable is None else None
    except torch.OutOfMemoryError:
        full = True  # and no more here: as long as the exception is handled, it holds the memory of what failed
    if full:
        torch.cuda.empty_cache()
        half = 1 << ((len(guests) - 1).bit_length() - 1)  # a node of the fold again
        say_once(
            f"blocks of {len(guests)} clients do not fit the GPU's memory: engine.block = {half} spares the attempt"
        )
        parts = ((guests[:half], start), (guests[half:], start + half))
        return together(
            *(run(work, federation, mine, at, cohort, reduce, batched, recorder, retry) for mine, at in parts)
        )
    if block_of is None:
        results: Iterator[tuple[Done, int] | Failure] = _one_by_one(work, federation, guests, retry)
    else:
        top = level(start, len(guests), cohort)
        if top is not None and reduce.stack is not None and reduce.screen is None and wrong(block_of.done) is None:
            _unchanged(broadcast)
            return _whole(block_of, guests, Node(top, start >> top, None), reduce.stack)
        results = iter(block_of.split())
    memory: dict[int, Payload] = {}
    failures: list[Failure] = []
    clients = examples = bytes_up = 0
    channels: set[str] = set()

    def lifted() -> Iterator[Any]:
        nonlocal clients, examples, bytes_up
        for guest, result in zip(guests, results, strict=True):
            try:
                if isinstance(result, Failure):
                    raise Unusable(result.reason)
                report = _report(guest.client, *result)
                value = reduce.take(work.shared, report)
            except (Unusable, ValueError) as e:  # ours, or the server's screen
                failures.append(Failure(guest.client, str(e)))
                yield None
                continue
            if result[0].memory:
                memory[guest.client] = result[0].memory
            clients, examples, bytes_up = clients + 1, examples + report.examples, bytes_up + tree.nbytes(report.value)
            channels.update(report.value)
            yield value

    nodes = leaves(lifted(), start, len(guests), reduce.merge, cohort)
    _unchanged(broadcast)
    host = tree.moved(nodes, tree.HOST)
    return Partial(host, memory, tuple(failures), clients, examples, bytes_up, frozenset(channels))


def _unchanged(broadcast: Iterable[tuple[str, Tensor, int]]) -> None:
    """Raises ``FedsimError`` where a client has changed what all are sent: the next one would start from that."""
    for name, x, version in broadcast:
        if x._version != version:
            raise FedsimError(f"clients change their broadcast in place ({name}); they must copy it first")


def _whole(of: block.Stack, guests: Sequence[Guest], node: Node[Any], stack: Callable[[Reports], Any]) -> Partial:
    """The answer of a block in which nothing is wrong, reduced at once into ``node``."""
    clients, done = [g.client for g in guests], of.done
    metrics = {name: x.to(torch.float64).tolist() for name, x in done.metrics.items()}
    value = tree.moved(stack(Reports(clients, of.examples, done.value, metrics)), tree.HOST)
    memory = {}
    if done.memory:
        memory = {g.client: mine.memory for g, (mine, _) in zip(guests, of.split(), strict=True)}
    size, channels = tree.nbytes(done.value), frozenset(done.value)
    return Partial([node._replace(value=value)], memory, (), len(clients), sum(of.examples), size, channels)


def _stacked(
    work: Work, federation: Federation, guests: Sequence[Guest], recorder: Recorder | None = None
) -> block.Stack | None:
    """The block's work at once, or None where it fails: it fails as a whole, and one by one the client to blame has a
    name."""
    if len(guests) < 2 and not all(block.lowered(each) for each in work.local.passes):
        return None
    try:
        return block.stacked(work, federation, guests, recorder)
    except Exception as e:
        if isinstance(e, torch.OutOfMemoryError) and len(guests) > 1:
            raise
        why = f"{reason(e)}, {where(e)}"
        log.warning("block of %d clients failed (%s); running it one by one", len(guests), why)
        return None


def _one_by_one(
    work: Work, federation: Federation, guests: Sequence[Guest], retry: bool
) -> Iterator[tuple[Done, int] | Failure]:
    for guest in guests:
        try:
            yield _one(work, federation, guest, retry)
        except Exception as e:
            log.debug("client %d", guest.client, exc_info=True)
            yield Failure(guest.client, reason(e) if isinstance(e, Unusable) else f"{reason(e)} ({where(e)})")


def _one(work: Work, federation: Federation, guest: Guest, retry: bool) -> tuple[Done, int]:
    """One client's work. Where it raises and may be done once more, this is it: its draws are named, not used up."""
    try:
        return block.one(work, federation, guest)
    except Exception as e:
        if not retry:
            raise
        log.warning("client %d failed in round %d, and tries again: %s", guest.client, work.round, reason(e))
    return block.one(work, federation, guest)


def alone(work: Work, federation: Federation, guest: Guest, batched: bool, retry: bool = False) -> tuple[Done, int]:
    """One client's work and its number of examples, with the numbers that ``run`` gives for a block of one."""
    work = _there(work, federation)
    if batched and work.local.unbatchable is None and (of := _stacked(work, federation, [guest])) is not None:
        return tree.moved(of.split()[0], tree.HOST)
    return tree.moved(_one(work, federation, guest, retry), tree.HOST)


def _there(work: Work, federation: Federation) -> Work:
    """The work with its broadcast where the data set is."""
    return work._replace(shared=tree.placed(work.shared, federation.dataset.train.x.device))


def _report(client: int, done: Done, examples: int) -> Report:
    """The report of a finished client. Raises ``Unusable`` for what must not count."""
    bad = wrong(done)
    if bad is not None:
        raise Unusable(bad)
    return Report(client, examples, done.value, {name: float(value) for name, value in done.metrics.items()})


def wrong(done: Done) -> str | None:
    """Why a client's work must not count: a number that is none, in what it sends, keeps or measures."""
    for whose, payload in (("its update", done.value), ("its memory", done.memory)):
        for channel, part in payload.items():
            if any(x.is_complex() for x in part.values()):
                return f"complex numbers in {whose} ({channel}), of which a mean is not defined here"
            if not tree.finite(part):
                name = next(name for name, x in part.items() if not x.isfinite().all())
                return f"NaN or Inf in {whose} ({channel}: {name})"
    for name, value in done.metrics.items():
        if not bool(torch.isfinite(value).all()):
            return f"{name} is {value.tolist()}"
    return None


class Unusable(Exception):
    """A client's work that must not count; its text is the reason."""


def reason(e: BaseException) -> str:
    """An exception in one line."""
    if isinstance(e, Unusable):
        return str(e)
    first = str(e).strip().split("\n")[0]
    return f"{type(e).__name__}: {first}" if first else type(e).__name__


@cache
def say_once(message: str) -> None:
    """Log a line the first time it is said in this process."""
    log.info(message)
