"""The words of the project as values. Nothing here is changed after it is made.

A *strategy* is data: how the server's state begins, and the *phases* of a round. A phase says what is broadcast, what
each client does with it (its *local* update), how the reports are reduced, and what the server makes of the result.
The engine owns every loop; a local update is written for one client and is run for a block of clients at once where
its tensors allow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

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
