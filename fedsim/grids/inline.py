"""Clients in this process, a block at a time."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from flwr.app import Context, Message

from fedsim import replay, tree, worker
from fedsim.block import Guest, Work, lowered
from fedsim.config import EngineConfig
from fedsim.data.dataset import Federation, Split
from fedsim.errors import ClientError
from fedsim.fold import Fold
from fedsim.grids.flower import MessageGrid, error_reply, from_value, to_value
from fedsim.memory import Memory
from fedsim.types import Local, Reducer
from fedsim.worker import Failure, reason, say_once

log = logging.getLogger("fedsim")

App = Callable[[Message, Context], Message]
Order = Callable[[list[int]], Iterable[int]]


class Outcome(NamedTuple):
    """The folded reports of a phase, and what it took. Bytes are those of the tensors that travelled, channels all
    those that any client sent."""

    folded: Any
    clients: int
    examples: int
    bytes_down: int
    bytes_up: int
    failures: tuple[Failure, ...]
    channels: frozenset[str]


class Executor(Protocol):
    """Where a phase can be run."""

    def map(self, work: Work, cohort: Sequence[int], reduce: Reducer[Any, Any]) -> Outcome:
        """Run the work of every client of the cohort and fold their reports, in the order of ``canonical``."""
        ...


def canonical(cohort: Sequence[int], federation: Federation, split: str = "train") -> list[int]:
    """The order of the fold: the most examples first, then by number.

    Clients of like size share a block, so that little is padded, and the order in which a cohort was drawn is
    irrelevant.
    """
    return sorted(set(cohort), key=lambda client: (-federation.size(client, split), client))


class Way(NamedTuple):
    """How the clients of a phase run: in blocks of ``size``, stacked or one by one, by recorded steps or not; and
    whether work that raises is done once more."""

    size: int
    stacked: bool
    recorder: replay.Recorder | None = None
    retry: bool = False


def way(engine: EngineConfig, data: Split, local: Local) -> Way:
    """How clients run, by the config and the local update."""
    return _way(engine, data, local)._replace(retry=engine.on_error == "retry")


def _way(engine: EngineConfig, data: Split, local: Local) -> Way:
    """Says once what was chosen and why. It depends on the config alone, never on the workers.

    In auto, a GPU always takes blocks. A CPU takes them where every step is written out for a block (fedsim/lower.py),
    of as many clients as stay in its cache: that is measured to win (docs/benchmarks.md), while other stacked tensors
    lose to the plain step there.
    """
    # Of training alone: that evaluation may run otherwise is no news, and two lines would contradict each other.
    trains = any(each.schedule.split == "train" for each in local.passes)
    say: Callable[[str], None] = say_once if trains else lambda message: None
    device, one_by_one = data.x.device.type, Way(engine.block, False)
    if engine.execution == "plain":
        return one_by_one
    if local.unbatchable is not None:
        say(f"clients run one by one: {local.unbatchable}")
        return one_by_one
    if device != "cpu" or engine.execution == "batched":
        recorder = replay.Cuda() if engine.record and device == "cuda" else None
        say(f"clients run in blocks of {engine.block} on {device}{', by recorded steps' if recorder else ''}")
        return Way(engine.block, True, recorder)
    fused = [lowered(each) for each in local.passes]
    if not fused or None in fused or data.x.dtype == torch.float64:
        say("clients run one by one where a step is not written out for a block: on a CPU that is faster")
        return one_by_one
    size = min(engine.block, *(f.most for f in fused if f))
    say(f"clients run in blocks of {size} on {device}: their steps are written out for a block")
    return Way(size, True)


class Site(NamedTuple):
    """What it takes to run any phase: the clients, each phase's local update and reduction, the ClientApp."""

    federation: Federation
    local_of: Callable[[int], tuple[Local, Reducer[Any, Any]]]
    app: App


class Block(NamedTuple):
    """A run of positions of a cohort, and the clients there."""

    start: int
    clients: list[int]


class BlockGrid(MessageGrid):
    """Runs phases in blocks of clients. Where blocks run is a subclass's matter; what comes out is not."""

    def __init__(
        self,
        federation: Federation,
        engine: EngineConfig,
        memory: Memory,
        app: App | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(len(federation), run_config)
        self.federation, self.engine, self.memory, self.app = federation, engine, memory, app
        # Who is chosen in a round, where that is known beforehand.
        self.cohorts: Callable[[int], Sequence[int]] | None = None
        self._next: tuple[frozenset[int], str, list[int]] = frozenset(), "", []

    @abstractmethod
    def parts(
        self, work: Work, blocks: list[Block], cohort: int, reduce: Reducer[Any, Any], how: Way
    ) -> Iterator[worker.Partial]:
        """The answers to all blocks, in any order and grouping."""

    def here(self, work: Work, block: Block, cohort: int, reduce: Reducer[Any, Any], how: Way) -> worker.Partial:
        """Run a block in this process."""
        guests = [Guest(c, self.memory.get(c)) for c in block.clients]
        return worker.run(
            work, self.federation, guests, block.start, cohort, reduce, how.stacked, how.recorder, how.retry
        )

    def prepare(self, work: Work) -> None:
        """Order the clients of the next round: for a moment in which there is nothing to do but to wait."""
        if self.cohorts and work.phase >= 0:
            cohort, split = self.cohorts(work.round + 1), _split(work)
            self._next = frozenset(cohort), split, canonical(cohort, self.federation, split)

    def close(self) -> None:
        """Let go of whatever runs clients elsewhere."""

    def map(self, work: Work, cohort: Sequence[int], reduce: Reducer[Any, Any]) -> Outcome:
        known, of, clients = self._next
        if of != (split := _split(work)) or known != frozenset(cohort):
            clients = canonical(cohort, self.federation, split)
        how, n = way(self.engine, self.federation.dataset.train, work.local), len(clients)
        blocks = [Block(start, clients[start : start + how.size]) for start in range(0, n, how.size)]
        fold: Fold[Any] = Fold(n, reduce.merge)
        done: list[worker.Partial] = []
        with self.memory.together() as remember:  # a round that fails leaves no client with a memory of it
            for part in self.parts(work, blocks, n, reduce, how):
                check(part.failures, self.engine, work)
                for node in part.nodes:
                    fold.add(node)
                remember(part.memory)
                done.append(part._replace(nodes=[], memory={}))
        return Outcome(
            fold.result() if n else None,
            sum(part.clients for part in done),
            sum(part.examples for part in done),
            n * tree.nbytes(work.shared),
            sum(part.bytes_up for part in done),
            tuple(sorted(failure for part in done for failure in part.failures)),
            frozenset().union(*(part.channels for part in done)),
        )


def _split(work: Work) -> str:
    """The split by whose sizes clients are ordered."""
    return work.local.passes[0].schedule.split if work.local.passes else "train"


class InlineGrid(BlockGrid):
    """Every client in this process. ``order`` shuffles the order in which blocks run; results must not notice."""

    def __init__(
        self,
        federation: Federation,
        engine: EngineConfig,
        memory: Memory,
        app: App | None = None,
        order: Order | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(federation, engine, memory, app, run_config)
        self._order = order or (lambda starts: starts)

    def parts(
        self, work: Work, blocks: list[Block], cohort: int, reduce: Reducer[Any, Any], how: Way
    ) -> Iterator[worker.Partial]:
        by_start = {b.start: b for b in blocks}
        for start in self._order(list(by_start)):
            yield self.here(work, by_start[start], cohort, reduce, how)

    def execute(self, messages: list[Message]) -> list[Message]:
        replies = []
        for message in messages:
            client = self.client(message.metadata.dst_node_id)
            context = self.context(client, from_value(self.memory.get(client) or {}))
            reply = answer(self.app, message, context)
            if context.state and not reply.has_error():
                self.memory.update({client: to_value(context.state)})
            replies.append(reply)
        return replies


def answer(app: App | None, message: Message, context: Context) -> Message:
    """What a ClientApp replies; an exception of its becomes an error reply."""
    if app is None:
        raise ValueError("this grid has no ClientApp to give messages to")
    try:
        return app(message, context)
    except Exception as e:
        log.debug("node %d", message.metadata.dst_node_id, exc_info=True)
        return error_reply(message, reason(e))


def check(failures: Iterable[Failure], engine: EngineConfig, work: Work) -> None:
    """Apply the run's policy: stop at the first client that has failed, or name it and go on without it."""
    for failure in failures:
        if engine.on_error != "drop":
            raise ClientError(failure.client, work.round, work.key.seed, failure.reason)
        log.warning(
            "round %d: dropped client %d (seed %d): %s", work.round, failure.client, work.key.seed, failure.reason
        )
