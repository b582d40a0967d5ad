"""Evaluation on a client's own held-out examples: of the global model, and of the client's own where it has one.

As received from the server (``evaluation``, a phase of its own), and right after local training (``after_training``).
"""

from typing import Any, NamedTuple

from torch import Tensor

from fedsim import tree
from fedsim.types import Batch, Done, Local, Metrics, Pass, Payload, Phase, Schedule, Strategy, Task, Tree, Visit

WHOLE = 1 << 20  # a batch that holds any client's held-out examples


class Carry(NamedTuple):
    model: Tree  # the client's own; {} where clients have none
    of_global: Metrics  # sums so far
    of_own: Metrics


def evaluation(task: Task, strategy: Strategy[Any], batch_size: int) -> Local:
    """Counts right predictions on the "holdout" split; ``shared`` is phase 0's broadcast plus channel "model".

    Metrics: accuracy and loss (global model), personal_accuracy and personal_loss (own model). Nothing travels but
    these numbers, and no memory changes.
    """
    personal, is_global = strategy.personal, strategy.is_global

    def init(shared: Payload, memory: Payload, visit: Visit) -> Carry:
        own = personal(shared, memory) if personal else {}
        zero = next(iter((own or shared["model"]).values())).new_zeros(())
        none = {"count": zero, "correct": zero, "loss": zero}
        return Carry(own, none if is_global else {}, none if personal else {})

    def step(shared: Payload, c: Carry, batch: Batch, draw: None) -> Carry:
        return Carry(
            c.model,
            tree.add(c.of_global, task.score(shared["model"], batch)) if is_global else {},
            tree.add(c.of_own, task.score(c.model, batch)) if personal else {},
        )

    def final(shared: Payload, c: Carry) -> Done:
        metrics: dict[str, Tensor] = {}
        for prefix, sums in (("", c.of_global), ("personal_", c.of_own)):
            if sums:
                count = sums["count"].clamp(min=1)
                metrics |= {f"{prefix}accuracy": sums["correct"] / count, f"{prefix}loss": sums["loss"] / count}
        return Done({}, {}, metrics)

    schedule = Schedule(batch_size, epochs=1, shuffle=False, split="holdout")
    return Local(init, (Pass(step, schedule),), final, strategy.phases[0].local.remember, None, task.unbatchable)


class Watched(NamedTuple):
    """A client's work, and what was counted after it."""

    work: Any
    counted: Metrics


def after_training(task: Task, strategy: Strategy[Any]) -> Strategy[Any]:
    """The strategy whose clients also report ``local_accuracy`` and ``local_loss``: on the "holdout" split, of the
    model that they have when their work is done and before it is sent. Nothing else changes.

    Phases whose clients have no model at the end (``Local.model``) stay as they are. The mean over clients weighs by
    their training examples; a client without held-out examples (it has one example in all) counts with 0.
    """
    return strategy._replace(phases=tuple(_watched(task, phase) for phase in strategy.phases))


def _watched(task: Task, phase: Phase[Any]) -> Phase[Any]:
    local = phase.local
    model = local.model
    if model is None:
        return phase

    def init(shared: Payload, memory: Payload, visit: Visit) -> Watched:
        work = local.init(shared, memory, visit)
        zero = next(iter(model(shared, work).values())).new_zeros(())
        return Watched(work, {"count": zero, "correct": zero, "loss": zero})

    def carried(each: Pass) -> Pass:
        def step(shared: Payload, c: Watched, batch: Batch, draw: Any) -> Watched:
            return c._replace(work=each.step(shared, c.work, batch, draw))

        return Pass(step, each.schedule)

    def count(shared: Payload, c: Watched, batch: Batch, draw: Any) -> Watched:
        return c._replace(counted=tree.add(c.counted, task.score(model(shared, c.work), batch)))

    def final(shared: Payload, c: Watched) -> Done:
        done, n = local.final(shared, c.work), c.counted["count"].clamp(min=1)
        measured = {"local_accuracy": c.counted["correct"] / n, "local_loss": c.counted["loss"] / n}
        return done._replace(metrics=done.metrics | measured)

    held_out = Pass(count, Schedule(WHOLE, epochs=1, shuffle=False, split="holdout"))
    passes = (*(carried(each) for each in local.passes), held_out)
    return phase._replace(local=local._replace(init=init, passes=passes, final=final, model=None))
