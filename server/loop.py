"""The loop over rounds. Every run goes through it: our strategies and strangers', in one process or many."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from fedsim import tree
from fedsim.block import Work, asked
from fedsim.errors import FedsimError
from fedsim.grids.inline import Executor
from fedsim.rng import Key
from fedsim.types import Local, Strategy, Tree
from fedsim.worker import Failure
from server import sampling
from server.reduce import collect

S = TypeVar("S")
Note = Callable[[int, int, Any], None]  # of a round, a phase, and the state that came of it


class Trained(NamedTuple):
    """What a round of training took: mean client metrics, counts summed over its phases, what failed, and whether
    anything came of it."""

    metrics: dict[str, float]
    clients: int
    examples: int
    bytes_down: int
    bytes_up: int
    failures: tuple[Failure, ...]
    learned: bool = True


class ClientScore(NamedTuple):
    """A client's own evaluation: its number, its held-out examples, and its metrics."""

    client: int
    examples: int
    metrics: dict[str, float]


class Round(NamedTuple, Generic[S]):
    """A finished round, numbered from 1. ``scores`` are None where clients were not evaluated."""

    number: int
    state: S
    trained: Trained
    scores: tuple[ClientScore, ...] | None
    seconds: float


class Driver(Protocol[S]):
    """What the loop needs of a server: ours (``Native``) or one around a Flower strategy (``server.foreign``)."""

    @property
    def is_global(self) -> bool: ...
    def begin(self) -> S: ...
    def train(self, state: S, round: int) -> tuple[S, Trained]: ...
    def evaluate(self, state: S, round: int) -> tuple[ClientScore, ...] | None: ...
    def conclude(self, state: S) -> None: ...
    def params(self, state: S) -> Tree: ...
    def gauges(self, state: S) -> dict[str, float]: ...
    def export(self, state: S) -> dict[str, bytes]: ...


def rounds(driver: Driver[S], state: S, first: int, last: int, evaluate: Callable[[int], bool]) -> Iterator[Round[S]]:
    """Train and evaluate rounds ``first … last``, from ``state``. The caller records, saves, and may stop.

    Raises ``FedsimError`` for a round of which nothing came since all its clients failed, and for one that breaks the
    model, before any client is asked to evaluate it.
    """
    for number in range(first, last + 1):
        began, before = time.perf_counter(), state
        state, trained = driver.train(state, number)
        if trained.failures and not trained.clients and not trained.learned:
            client, why = trained.failures[0]
            raise FedsimError(f"all clients of round {number} failed; the first of them, client {client}: {why}")
        sound(driver.params(before), driver.params(state), number)
        scores = driver.evaluate(state, number) if evaluate(number) else None
        yield Round(number, state, trained, scores, time.perf_counter() - began)


def sound(before: Tree, after: Tree, round: int) -> None:
    """Refuse a model that is none: raises ``FedsimError`` for other shapes or types, and for NaN or Inf."""
    shapes = [{name: (x.shape, x.dtype) for name, x in params.items()} for params in (before, after)]
    if shapes[0] != shapes[1]:
        changed = sorted(n for n in before.keys() | after.keys() if shapes[0].get(n) != shapes[1].get(n))
        raise FedsimError(f"the strategy changed the shape or type of {', '.join(changed)} in round {round}")
    if not tree.finite(after):
        bad = next(name for name, x in after.items() if not x.isfinite().all())
        raise FedsimError(
            f"the strategy made a model with NaN or Inf in round {round} ({bad}); try a smaller learning rate"
        )


class Panel(NamedTuple):
    """Who is evaluated on its own examples, and how."""

    local: Local
    clients: int


class Native(Generic[S]):
    """The server of one of our strategies."""

    def __init__(
        self,
        strategy: Strategy[S],
        executor: Executor,
        key: Key,
        population: int,
        cohort: int,
        panel: Panel | None = None,
        streams: Key | None = None,
        choose: Callable[[int], list[int]] | None = None,
    ) -> None:
        """``streams``: the clients' draws, where ``key`` (a public one) must not be; ``choose``: a round's cohort."""
        self._strategy, self._executor, self._key = strategy, executor, key
        self._population, self._cohort, self._panel = population, cohort, panel
        self._streams = streams or key
        self._note: Note | None = None
        self._choose = choose or (lambda round: sampling.uniform(key.at("cohort", round), population, cohort))

    def over(self, executor: Executor, choose: Callable[[int], list[int]] | None) -> "Native[S]":
        """The same server with its clients elsewhere; ``choose`` as before where None."""
        other = copy.copy(self)
        other._executor, other._choose = executor, choose or self._choose
        return other

    def noting(self, note: Note) -> "Native[S]":
        """The same server, which tells of each state before anybody sees it."""
        other = copy.copy(self)
        other._note = note
        return other

    @property
    def is_global(self) -> bool:
        """Whether ``params`` is a model of the task."""
        return self._strategy.is_global

    def begin(self) -> S:
        return self._strategy.init(self._key.at("init").torch())

    def cohort(self, round: int) -> list[int]:
        """The clients that are chosen in a round."""
        return self._choose(round)

    def train(self, state: S, round: int) -> tuple[S, Trained]:
        cohort = self._choose(round)
        return run_round(self._strategy, state, round, cohort, self._executor, self._streams, self._note)

    def evaluate(self, state: S, round: int) -> tuple[ClientScore, ...] | None:
        if self._panel is None:
            return None
        shared = dict(self._strategy.phases[0].broadcast(state))
        if self._strategy.is_global:
            shared["model"] = self._strategy.params(state)
        return score_clients(self._executor, self._panel, shared, round, self._key, self._population)

    def conclude(self, state: S) -> None:
        """Raises ``FedsimError`` for the end of a run that came to nothing; which no round of ours lets happen."""

    def params(self, state: S) -> Tree:
        return self._strategy.params(state)

    def gauges(self, state: S) -> dict[str, float]:
        return self._strategy.gauges(state) if self._strategy.gauges else {}

    def export(self, state: S) -> dict[str, bytes]:
        return self._strategy.export(state) if self._strategy.export else {}


def run_round(
    strategy: Strategy[S],
    state: S,
    round: int,
    cohort: list[int],
    executor: Executor,
    key: Key,
    note: Note | None = None,
) -> tuple[S, Trained]:
    """One round: every phase is broadcast, worked on, reduced, and taken into the state; ``note`` is told of it."""
    metrics: dict[str, float] = {}
    clients = examples = down = up = 0
    failures: list[Failure] = []
    learned = False
    for i, phase in enumerate(strategy.phases):
        work = asked(round, i, phase.local, phase.broadcast(state), key)
        outcome = executor.map(work, cohort, phase.reduce)
        if outcome.clients and outcome.channels != strategy.sends[i]:
            sent, said = sorted(outcome.channels), sorted(strategy.sends[i])
            raise FedsimError(
                f"the strategy's sends: must be what clients send in exchange {i + 1}, {sent} (got {said})"
            )
        result: Any = phase.reduce.finish(outcome.folded)
        if result is not None:
            state, learned = phase.finish(state, result), True
            metrics |= getattr(result, "metrics", {})
            if note:
                note(round, i, state)
        clients, examples = max(clients, outcome.clients), max(examples, outcome.examples)
        down, up = down + outcome.bytes_down, up + outcome.bytes_up
        failures += outcome.failures
        # Who failed has nothing to go on with: it sits out what is left of the round.
        cohort = [c for c in cohort if c not in {failure.client for failure in outcome.failures}]
    return state, Trained(metrics, clients, examples, down, up, tuple(failures), learned)


def score_clients(
    executor: Executor, panel: Panel, shared: dict[str, Tree], round: int, key: Key, population: int
) -> tuple[ClientScore, ...]:
    """Evaluate the panel: a sample of clients that is the same in every round."""
    chosen = sampling.uniform(key.at("panel"), population, min(panel.clients, population))
    work = Work(round, -1, panel.local, shared, key)
    reports = executor.map(work, chosen, collect()).folded or ()
    return tuple(sorted(ClientScore(r.client, r.examples, r.metrics) for r in reports if r.examples))
