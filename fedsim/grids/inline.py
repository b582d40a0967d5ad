"""Clients in this process, a block at a time."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from flwr.app import Context, Message

from fedsim import tree, worker
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
    """The folded reports of a phase, and what it took. Bytes are those of the tensors that travelled."""

    folded: Any
    clients: int
    examples: int
    bytes_down: int
    bytes_up: int
    failures: tuple[Failure, ...]


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
    return sorted(set(cohort), key=lambda client: (-len(federation.indices(client, split)), client))


class Way(NamedTuple):
    """How the clients of a phase run: in blocks of ``size``, as stacked tensors or one by one."""

    size: int
    stacked: bool


def way(engine: EngineConfig, data: Split, local: Local) -> Way:
    """How clients run; says once what was chosen and why. It depends on the config alone, never on the workers.

    In auto, a GPU always takes blocks. A CPU takes them where every step is written out for a block (fedsim/lower.py),
    of as many clients as stay in its cache: that is measured to win (docs/benchmarks.md), while other stacked tensors
    lose to the plain step there.
    """
    device, one_by_one = data.x.device.type, Way(engine.block, False)
    if engine.execution == "plain":
        return one_by_one
    if local.unbatchable is not None:
        say_once(f"clients run one by one: {local.unbatchable}")
        return one_by_one
    if device != "cpu" or engine.execution == "batched":
        say_once(f"clients run in blocks of {engine.block} on {device}")
        return Way(engine.block, True)
    fused = [lowered(each) for each in local.passes]
    if not fused or None in fused or data.x.dtype == torch.float64:
        say_once("clients run one by one: on a CPU the plain step is faster than stacked tensors")
        return one_by_one
    size = min(engine.block, *(f.most for f in fused if f))
    say_once(f"clients run in blocks of {size} on {device}: their steps are written out for a block")
    return Way(size, True)


class InlineGrid(MessageGrid):
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
        super().__init__(len(federation), run_config)
        self._federation, self._engine, self.memory = federation, engine, memory
        self._app, self._order = app, order or (lambda starts: starts)

    def map(self, work: Work, cohort: Sequence[int], reduce: Reducer[Any, Any]) -> Outcome:
        schedule = work.local.passes[0].schedule if work.local.passes else None
        clients = canonical(cohort, self._federation, schedule.split if schedule else "train")
        (size, stacked), n = way(self._engine, self._federation.dataset.train, work.local), len(clients)
        fold: Fold[Any] = Fold(n, reduce.merge)
        done: list[worker.Partial] = []
        with self.memory.together() as remember:  # a round that fails leaves no client with a memory of it
            for start in self._order(list(range(0, n, size))):
                guests = [Guest(c, self.memory.get(c)) for c in clients[start : start + size]]
                part = worker.run(work, self._federation, guests, start, n, reduce, stacked)
                check(part.failures, self._engine, work)
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
        )

    def execute(self, messages: list[Message]) -> list[Message]:
        return [self._reply(message) for message in messages]

    def _reply(self, message: Message) -> Message:
        if self._app is None:
            raise ValueError("this grid has no ClientApp to give messages to")
        client = self.client(message.metadata.dst_node_id)
        context = self.context(client, from_value(self.memory.get(client) or {}))
        try:
            reply = self._app(message, context)
        except Exception as e:
            log.debug("client %d", client, exc_info=True)
            return error_reply(message, reason(e))
        if context.state:
            self.memory.update({client: to_value(context.state)})
        return reply


def check(failures: Iterable[Failure], engine: EngineConfig, work: Work) -> None:
    """Apply the run's policy: stop at the first failing client, or name it and go on without it."""
    for failure in failures:
        if engine.on_error == "raise":
            raise ClientError(failure.client, work.round, work.key.seed, failure.reason)
        log.warning(
            "round %d: dropped client %d (seed %d): %s", work.round, failure.client, work.key.seed, failure.reason
        )
