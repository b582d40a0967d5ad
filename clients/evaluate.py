"""Evaluation on a client's own held-out examples: of the global model, and of the client's own where it has one."""

from typing import Any, NamedTuple

from torch import Tensor

from fedsim import tree
from fedsim.types import Batch, Done, Local, Metrics, Pass, Payload, Schedule, Strategy, Task, Tree, Visit


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
