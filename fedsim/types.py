"""The words of the project as values. Nothing here is changed after it is made.

A *strategy* is data: how the server's state begins, and the *phases* of a round. A phase says what is broadcast, what
each client does with it (its *local* update), how the reports are reduced, and what the server makes of the result.
The engine owns every loop; a local update is written for one client and is run for a block of clients at once where
its tensors allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedsim.errors import ConfigError

Tree = dict[str, Tensor]
"""Named tensors: parameters, a gradient, a control variate."""

Payload = dict[str, Tree]
"""What travels or is remembered: one tree a channel, e.g. ``{"params": …, "control": …}``."""

Metrics = dict[str, Tensor]
"""Named scalars, shape ()."""

S = TypeVar("S")
A = TypeVar("A")
M = TypeVar("M")


class Batch(NamedTuple):
    """Examples of one client. ``weight`` is 1 for an example and 0 for padding; None means that all count."""

    x: Tensor
    y: Tensor
    weight: Tensor | None = None


class Task(NamedTuple):
    """A federated learning task: a model as pure functions of its parameters, and the population that learns it.

    ``predict`` gives logits (batch, …, classes). ``loss`` is the weighted mean over the batch, shape (). ``score``
    gives sums over a batch: ``count`` (predictions), ``correct`` and ``loss``, each of shape ().
    """

    init: Callable[[torch.Generator], Tree]
    predict: Callable[[Tree, Tensor], Tensor]
    loss: Callable[[Tree, Batch], Tensor]
    score: Callable[[Tree, Batch], Metrics]
    classes: int
    population: int
    unbatchable: str | None = None  # why a block of clients cannot be stacked, e.g. a layer without a batching rule
    module: Callable[[], Any] | None = None  # a fresh nn.Module with these parameters, where the task was made from one
    private: Private | None = None  # how clients must get their gradients; set by ``clients.dp_sgd``


class Private(NamedTuple):
    """The only way to an example under example-level privacy.

    gradient: (params, batch, draw, the client's number of examples) -> a noisy gradient
    draw:     (generator) -> the randomness of one step, for ``gradient``
    around:   (another task) -> that task under the same privacy
    bare:     the task without it, for what makes another one of it (adapters) and puts that under privacy again
    """

    gradient: Callable[[Tree, Batch, Any, Tensor], Tree]
    draw: Callable[[torch.Generator], Any]
    around: Callable[[Task], Task]
    bare: Task


class Schedule(NamedTuple):
    """Which batches a client sees: ``epochs`` passes over its examples, or ``steps`` batches of as many as it takes."""

    batch_size: int
    epochs: int = 1
    steps: int | None = None
    shuffle: bool = True
    split: str = "train"  # or "holdout"
    sampling: Literal["shuffle", "poisson"] = "shuffle"  # poisson: each example is in a batch with probability size/n


class Visit(NamedTuple):
    """What a client knows about this visit. Tensors have shape (); ``steps`` counts the first pass."""

    round: int
    examples: Tensor
    steps: Tensor


class Done(NamedTuple):
    """A client's work: ``value`` travels, ``memory`` stays ({}: none), ``metrics`` are scalars to be averaged."""

    value: Payload
    memory: Payload
    metrics: Metrics


class Pass(NamedTuple):
    """One run of the engine's loop: ``step(shared, carry, batch, draw) -> carry`` over the batches of ``schedule``."""

    step: Callable[[Payload, Any, Batch, Any], Any]
    schedule: Schedule
    fused: Fused | None = None


class Fused(NamedTuple):
    """A step for K clients at once, in place: a faster formulation, with the numbers of ``of`` to rounding.

    of:   the step that this is a formulation of. The engine uses it for that very step only, so that middleware which
          replaces or wraps a step is never bypassed
    own:  (carry [K, …]) -> the same in memory that steps may change, laid out as they like it
    step: (shared, carry [K, …], batch [K, B, …], draw [K, …]) changes the carry; a weight of None: all examples count
    most: so many clients at once are best on a CPU, a power of two
    """

    of: Callable[[Payload, Any, Batch, Any], Any]
    own: Callable[[Any], Any]
    step: Callable[[Payload, Any, Batch, Any], None]
    most: int


class Local(NamedTuple):
    """One client's work, written for one client.

    init:     (shared, memory, visit) -> carry, a structure of tensors; memory is {} for a client without one
    passes:   run in order over the client's own batches
    final:    (shared, carry) -> Done
    remember: (shared, generator) -> the memory of a client that has none yet; None for a client without memory
    draw:     (shared, generator) -> this step's randomness (noise, masks); steps themselves are deterministic
    unbatchable: why a block of clients cannot run at once, or None
    model:    (shared, carry) -> the client's model as its work stands, where it has one; for measuring only
    varies:   whether the shapes of what is sent differ from client to client, by what each remembers from its start on
    secret:   whether the draws protect somebody: then no two broadcasts are answered with the same ones
    """

    init: Callable[[Payload, Payload, Visit], Any]
    passes: tuple[Pass, ...]
    final: Callable[[Payload, Any], Done]
    remember: Callable[[Payload, torch.Generator], Payload] | None = None
    draw: Callable[[Payload, torch.Generator], Any] | None = None
    unbatchable: str | None = None
    model: Callable[[Payload, Any], Tree] | None = None
    varies: bool = False
    secret: bool = False


class Report(NamedTuple):
    """All that the server sees of a client."""

    client: int
    examples: int
    value: Payload
    metrics: dict[str, float]


class Reports(NamedTuple):
    """Reports of a block of clients: the first axis of every tensor is the clients."""

    clients: list[int]
    examples: list[int]
    value: Payload
    metrics: dict[str, list[float]]


class Mean(NamedTuple):
    """The result of an averaging reduction, in the dtypes that the clients sent."""

    value: Payload
    metrics: dict[str, float]
    clients: int
    examples: int


class Reducer(NamedTuple, Generic[A, M]):
    """A monoid over reports. ``merge`` may use up its arguments: accumulators belong to the engine.

    The engine folds over the positions of the cohort in a tree of fixed shape, so the result depends neither on the
    order of arrival nor on which worker ran which block. ``finish`` gets None where no client reported; it gives None
    where there is nothing to learn from, and the server's state then stays as it is. ``screen`` is what the server does
    with a report before ``lift``, knowing the broadcast; a ``ValueError`` drops the client, and names it.
    """

    lift: Callable[[Any], A]
    merge: Callable[[A, A], A]
    finish: Callable[[A | None], M | None]
    screen: Callable[[Payload, Report], Any] | None = None  # (broadcast, report) -> what lift takes
    mean: Literal["uniform", "examples"] | None = None  # a weighted mean and nothing else: what it weighs by
    stack: Callable[[Reports], A] | None = None  # a block at once: the bits of lifting each and merging by position

    def take(self, shared: Payload, report: Report) -> A:
        """The accumulator of one report to this broadcast."""
        return self.lift(self.screen(shared, report) if self.screen else report)


class Phase(NamedTuple, Generic[S]):
    """One exchange: broadcast, local work, reduction, and the server's new state."""

    broadcast: Callable[[S], Payload]
    local: Local
    reduce: Reducer[Any, Any]
    finish: Callable[[S, Any], S]


class Strategy(NamedTuple, Generic[S]):
    """A federated algorithm.

    init:     (generator) -> state, a NamedTuple of trees, tensors and numbers (it is what a checkpoint holds)
    phases:   the exchanges of a round, in order
    params:   (state) -> the shared model, which the run ends with
    sends:    the channels that a client's value has in each phase: exactly these travel
    personal: (shared, memory) -> the client's own model, where clients have one; evaluated beside the global model
    is_global: whether ``params`` is a model of the task, to be evaluated on the central test set
    gauges:   (state) -> named numbers to be logged each round (a learning rate, a step size)
    export:   (state) -> files that a run leaves beside its model, by their path in the run's folder
    """

    init: Callable[[torch.Generator], S]
    phases: tuple[Phase[S], ...]
    params: Callable[[S], Tree]
    sends: tuple[frozenset[str], ...]
    personal: Callable[[Payload, Payload], Tree] | None = None
    is_global: bool = True
    gauges: Callable[[S], dict[str, float]] | None = None
    export: Callable[[S], dict[str, bytes]] | None = None


def wellformed(made: Any, name: str) -> None:
    """Refuse what is no whole strategy. Raises ``ConfigError``: what the plugin ``name`` should have built."""
    if not isinstance(made, Strategy):
        raise ConfigError(f"strategy.name: '{name}' must build a Strategy (got {type(made).__name__})")
    for part, right, be, value in _parts(made):
        if not right:
            got = repr(value) if len(repr(value)) < 60 else type(value).__name__
            raise ConfigError(f"strategy.name: {part} of '{name}' must be {be} (got {got})")


def _parts(s: Strategy[Any]) -> Iterator[tuple[str, bool, str, Any]]:
    """Each part of a strategy by name: whether it is what it must be, what that is, and what it is."""
    yield "init", callable(s.init), "a function", s.init
    yield "params", callable(s.params), "a function", s.params
    for name in ("personal", "gauges", "export"):
        own = getattr(s, name)
        yield name, own is None or callable(own), "a function or None", own
    yield "phases", _all(s.phases, Phase) and len(s.phases) > 0, "a tuple of at least one Phase", s.phases
    for i, phase in enumerate(s.phases):
        here = f"phases[{i}]"
        yield f"{here}.broadcast", callable(phase.broadcast), "a function", phase.broadcast
        yield f"{here}.finish", callable(phase.finish), "a function", phase.finish
        yield f"{here}.reduce", isinstance(phase.reduce, Reducer), "a Reducer", phase.reduce
        yield f"{here}.local", isinstance(phase.local, Local), "a Local", phase.local
        yield f"{here}.local.passes", _all(phase.local.passes, Pass), "a tuple of Pass", phase.local.passes
    names = _all(s.sends, Set) and all(isinstance(channel, str) for part in s.sends for channel in part)
    yield "sends", names and len(s.sends) == len(s.phases), "a tuple of a frozenset of channels each phase", s.sends


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, tuple) and all(isinstance(x, kind) for x in value)
