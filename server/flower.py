"""Our strategies as Flower's: a ``Strategy`` value runs wherever a ``flwr.serverapp.strategy.Strategy`` does.

On our own grids a phase is one call for the whole cohort; on any other Flower ``Grid`` it is a message a client.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim import tree
from fedsim.block import Work
from fedsim.fold import Fold, Node
from fedsim.grids.flower import dtype_name, to_record, to_records, to_tree
from fedsim.grids.inline import Outcome
from fedsim.rng import Key
from fedsim.types import Done, Payload, Phase, Reducer, Report, Strategy, Visit
from fedsim.worker import Failure
from server.loop import Native, rounds

log = logging.getLogger("fedsim")

EXAMPLES = "num-examples"
MOST_EXAMPLES = 1 << 31  # that a client can say it has
HEADER = 1024  # bytes that an array takes beside its elements, at most


class Messages:
    """Runs a phase over any Flower Grid. ``node`` gives the node of a client; by default nodes in order of their id."""

    def __init__(
        self,
        grid: Grid,
        node: Callable[[int], int] | None = None,
        timeout: float | None = None,
        canonical: Callable[[Sequence[int]], list[int]] = lambda cohort: sorted(set(cohort)),
        on_failure: Callable[[tuple[Failure, ...], Work], None] = lambda failures, work: None,
    ) -> None:
        self._grid, self._timeout = grid, timeout
        self._node = node
        self._canonical, self._on_failure = canonical, on_failure
        self._after: dict[int | None, Payload] = {}  # what clients remember after the phases of this round, by shape

    def map(self, work: Work, cohort: Sequence[int], reduce: Reducer[Any, Any]) -> Outcome:
        clients = self._canonical(cohort)
        node = self._node or sorted(self._grid.get_node_ids()).__getitem__
        nodes = {node(client): i for i, client in enumerate(clients)}
        content = to_records(work.shared)
        content["fedsim"] = ConfigRecord({"round": work.round, "phase": work.phase})
        kind = "evaluate" if work.phase < 0 else "train"
        out = [Message(content, number, kind, group_id=str(work.round)) for number in nodes]
        reports: list[Report | None] = [None] * len(clients)
        failures = {client: Failure(client, "no reply in time") for client in clients}
        if work.phase <= 0:
            self._after = {}
        template = self._template(work, None)
        for reply in self._grid.send_and_receive(out, timeout=self._timeout):
            position = nodes.get(reply.metadata.src_node_id)
            if position is None or reports[position] is not None:
                continue  # a node that was not asked, or a second answer: it counts once
            client = clients[position]
            result = _report(client, reply, self._template(work, client) if work.local.varies else template)
            if isinstance(result, Failure):
                failures[client] = result
            else:
                reports[position] = result
                del failures[client]
        lifted: list[Any] = [None] * len(clients)
        for i, report in enumerate(reports):
            if report is not None:
                try:
                    lifted[i] = reduce.take(work.shared, report)
                except ValueError as e:  # the server's screen
                    failures[clients[i]], reports[i] = Failure(clients[i], str(e)), None
        self._on_failure(tuple(failures.values()), work)
        fold: Fold[Any] = Fold(len(clients), reduce.merge)
        for i, value in enumerate(lifted):
            fold.add(Node(0, i, value))
        done = [r for r in reports if r is not None]
        return Outcome(
            fold.result() if clients else None,
            len(done),
            sum(r.examples for r in done),
            len(clients) * tree.nbytes(work.shared),
            sum(tree.nbytes(r.value) for r in done),
            tuple(sorted(failures.values())),
            frozenset().union(*(r.value for r in done)),
        )

    def _template(self, work: Work, client: int | None) -> Done:
        """What this client, or any, is expected to send. A later phase finds the memory that one before has left."""
        done = expected(work, client, self._after.get(client))
        self._after[client] = done.memory or self._after.get(client, {})
        return done


def expected(work: Work, client: int | None = None, memory: Payload | None = None) -> Done:
    """What a client sends, with the names, shapes and dtypes that are expected: from a visit without any data.

    Of this client, as it was on its first visit, where clients differ; else of any. ``memory``: what the
    phase before has left it with.
    """
    shared, local = work.shared, work.local
    device = next((x.device for part in shared.values() for x in part.values()), torch.device("cpu"))
    one = torch.ones((), device=device)
    with torch.no_grad():
        whose = work.key.at("template") if client is None else work.key.at("remember", client)
        if not memory:
            memory = local.remember(shared, whose.torch()) if local.remember else {}
        return local.final(shared, local.init(shared, memory, Visit(work.round, one.long(), one.long())))


def _report(client: int, reply: Message, like: Done) -> Report | Failure:
    """A client's report from its reply, or what is wrong with it. Nothing in a reply is believed."""
    if reply.has_error():
        return Failure(client, reply.error.reason or "no reason given")
    try:
        conform(reply.content, like.value)
        examples, metrics = _measured(reply.content, like.metrics)
        value = {channel: to_tree(reply.content.array_records[channel]) for channel in like.value}
    except (ValueError, TypeError, MemoryError, OverflowError) as e:
        return Failure(client, f"its reply is malformed: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    for channel, part in value.items():
        for name, x in part.items():
            want = like.value[channel][name]
            if x.shape != want.shape or x.dtype != want.dtype:
                return Failure(client, f"its reply is malformed: the data of {channel}: {name} is not what it says")
        if not tree.finite(part):
            return Failure(client, f"NaN or Inf in its update ({channel})")
    return Report(client, examples, value, metrics)


def conform(content: RecordDict, template: Payload) -> None:
    """Refuse (``ValueError``) a content whose arrays are not those of ``template`` by what they say of themselves, or
    have more bytes than such arrays can: before anything is unpacked."""
    if content.array_records.keys() != template.keys():
        raise ValueError(f"channels {sorted(content.array_records)} where {sorted(template)} are expected")
    for channel, part in template.items():
        record = content.array_records[channel]
        if record.keys() != part.keys():
            some = sorted(record.keys() ^ part.keys())[:3]
            raise ValueError(f"{channel} has other names than expected: {', '.join(some)}")
        for name, x in part.items():
            array, dtype = record[name], dtype_name(x.dtype)
            if tuple(array.shape) != tuple(x.shape):
                raise ValueError(f"{channel}: {name} has shape {tuple(array.shape)}, expected {tuple(x.shape)}")
            if array.dtype != dtype:
                raise ValueError(f"{channel}: {name} has dtype {array.dtype}, expected {dtype}")
            if len(array.data) > x.numel() * x.element_size() + HEADER:
                raise ValueError(f"{channel}: {name} has {len(array.data)} bytes")


def _measured(content: RecordDict, names: Iterable[str]) -> tuple[int, dict[str, float]]:
    """The number of examples and the metrics of these names in a reply. ``ValueError`` for any that cannot be."""
    metrics = dict(content.metric_records.get("metrics", {}))
    examples = metrics.pop(EXAMPLES, None)
    if isinstance(examples, bool) or not isinstance(examples, int) or not 0 <= examples <= MOST_EXAMPLES:
        raise ValueError(f"{EXAMPLES} is {examples!r}")
    for name in names:
        x = metrics.get(name)
        if not isinstance(x, int | float) or not math.isfinite(x):
            raise ValueError(f"{name} is {x!r}")
    return examples, {name: float(metrics[name]) for name in names}  # type: ignore[arg-type]


def _say(failures: tuple[Failure, ...], work: Work) -> None:
    for failure in failures:
        log.warning("round %d: node or client %d does not count: %s", work.round, failure.client, failure.reason)


class AsFlower(FlowerStrategy):
    """One of our strategies, for Flower.

    ``start`` runs every strategy on every grid. The four hooks of Flower's own loop (used by Flower's wrappers) exist
    for strategies of one phase; others raise ``NotImplementedError`` there.
    """

    def __init__(self, strategy: Strategy[Any], seed: int, cohort: int) -> None:
        self._strategy, self._key, self._cohort = strategy, Key.root(seed), cohort
        self._state: Any = strategy.init(self._key.at("init").torch())

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run ``num_rounds`` rounds. The seed decides where the model starts; ``initial_arrays`` is not used."""
        executor = grid if hasattr(grid, "map") else Messages(grid, timeout=timeout, on_failure=_say)
        population = len(list(grid.get_node_ids()))
        driver = Native(self._strategy, executor, self._key, population, self._cohort)
        result = Result()
        for done in rounds(driver, self._state, 1, num_rounds, lambda _: False):
            self._state = done.state
            result.arrays = to_record(self._strategy.params(done.state))
            result.train_metrics_clientapp[done.number] = MetricRecord(dict(done.trained.metrics))
            if evaluate_fn and (measured := evaluate_fn(done.number, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[done.number] = measured
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        phase = self._only_phase()
        nodes = sorted(grid.get_node_ids())
        chosen = self._key.at("cohort", server_round).numpy().choice(len(nodes), self._cohort, replace=False)
        content = to_records(phase.broadcast(self._state))
        content["fedsim"] = ConfigRecord({"round": server_round, "phase": 0})
        return [Message(content, nodes[i], "train", group_id=str(server_round)) for i in sorted(chosen.tolist())]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        phase = self._only_phase()
        answered = sorted(replies, key=lambda r: r.metadata.src_node_id)
        work = Work(server_round, 0, phase.local, phase.broadcast(self._state), self._key)
        template = expected(work)
        results = [_report(m.metadata.src_node_id, m, template) for m in answered]
        _say(tuple(r for r in results if isinstance(r, Failure)), work)
        reports = [r for r in results if isinstance(r, Report)]
        fold: Fold[Any] = Fold(len(reports), phase.reduce.merge)
        for i, report in enumerate(reports):
            fold.add(Node(0, i, phase.reduce.take(phase.broadcast(self._state), report)))
        result = phase.reduce.finish(fold.result() if reports else None)
        if result is None:
            return None, None
        self._state = phase.finish(self._state, result)
        return to_record(self._strategy.params(self._state)), MetricRecord(dict(result.metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        """Nothing: a run prints its resolved config."""

    def _only_phase(self) -> Phase[Any]:
        if len(self._strategy.phases) != 1:
            raise NotImplementedError("a round of several exchanges needs start(); Flower's hooks know one exchange")
        return self._strategy.phases[0]
