"""Local work in two passes: first a private head with the body held fixed, then the body with the head held fixed.

    pass 1   ϕ ← SGD on F(θ, ϕ) over ϕ alone
    pass 2   o ← SGD on F(body(o), ϕ) over o alone       (o: θ itself, or what generates it; θ = body(o))

Both with momentum and weight decay, momentum starting at 0 in each pass: g ← clip(∇), m ← μ m + g + λ o, o ← o − η m.

Under example-level privacy (``clients.dp_sgd``) both passes take noisy gradients by (θ, ϕ): the body's step depends on
the head, so a head that was fitted without noise would put every example into every gradient, and clipping would bound
nothing. What generates θ gets its gradient from the noisy one by the chain rule, which is post-processing.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from clients.sgd import SgdConfig
from fedsim import tree
from fedsim.autodiff import value_and_grad
from fedsim.errors import ConfigError
from fedsim.rng import Key
from fedsim.types import Batch, Done, Local, Pass, Payload, Private, Schedule, Task, Tree, Visit


class AlternateConfig(SgdConfig):
    """What strategies with a private head are told; ``lr``, ``epochs`` and ``steps`` are those of the body."""

    optimizer: Literal["sgd"] = "sgd"
    head_lr: float = Field(0.1, gt=0, description="the step size of the head's pass")
    head_epochs: int = Field(1, ge=1, description="passes over the client's examples that train the head")
    private: str | None = Field(None, description="layer whose parameters are the private head; the last by default")

    @model_validator(mode="after")
    def _named(self) -> "AlternateConfig":
        if self.private == "":
            raise ValueError("private: must name a layer (got '')")
        return self


class Carry(NamedTuple):
    """A client in the middle of its two passes."""

    head: Tree
    outer: Tree  # what pass 2 trains
    body: Tree  # θ as pass 1 sees it
    head_moment: Tree
    outer_moment: Tree
    rate: Tensor  # η of the body in this round
    loss: Tensor  # Σ over the body's steps of the batch's mean loss · its examples
    examples: Tensor
    own: Tensor  # the client's number of examples
    memory: Payload


def shapes(task: Task) -> dict[str, torch.Size]:
    """The shapes of the task's parameters, in their order."""
    return {name: x.shape for name, x in task.init(Key.root(0).at("shapes").torch()).items()}


def private_names(names: Iterable[str], layer: str | None) -> list[str]:
    """The parameters of a layer: of the last one where None. ``ConfigError`` where there are none, or no others."""
    names = list(names)
    wanted = layer if layer is not None else names[-1].rpartition(".")[0] or names[-1]
    chosen = [name for name in names if name == wanted or name.startswith(f"{wanted}.")]
    if not chosen:
        raise ConfigError(f"strategy.private: no parameter begins with '{wanted}' (there are {', '.join(names)})")
    if len(chosen) == len(names):
        raise ConfigError(f"strategy.private: '{wanted}' is the whole model, so nothing is left to share")
    return chosen


def take(a: Tree, names: Iterable[str]) -> Tree:
    """The part of a tree with these names."""
    return {name: a[name] for name in names}


def clipped(g: Tree, groups: Sequence[Sequence[str]], norm: float) -> Tree:
    """Each group of names scaled to a Euclidean norm of at most ``norm``."""
    out = dict(g)
    for group in groups:
        part = take(g, group)
        square = tree.dot(part, part)
        # The smallest number keeps the root differentiable at 0, and is nothing beside any other square.
        size = (square + torch.finfo(square.dtype).tiny).sqrt()
        factor = (norm / (size + 1e-6)).clamp(max=1.0)
        out |= tree.scale(factor, part)
    return out


def alternate(
    task: Task,
    config: AlternateConfig,
    start: Callable[[Payload, Payload], Tree],
    body: Callable[[Tree], Tree],
    final: Callable[[Payload, Carry], Done],
    remember: Callable[[Payload, torch.Generator], Payload],
    clip: Callable[[Tree], Tree] | None = None,
) -> Local:
    """The two passes. Memory has the channel "head"; ``start(shared, memory)`` is o, whose names must not be a head's.

    ``clip`` is applied to the gradient of o before weight decay.
    """
    lr, decay, private = config.head_lr, config.weight_decay, task.private
    sampling: Literal["shuffle", "poisson"] = "poisson" if private else "shuffle"
    draw = partial(_draw, private) if private else None

    def init(shared: Payload, memory: Payload, visit: Visit) -> Carry:
        head, outer = memory["head"], start(shared, memory)
        if head.keys() & outer.keys():
            raise ValueError(f"the head and what is trained with it share the names {sorted(head.keys() & outer)}")
        zero = next(iter(outer.values())).new_zeros(())
        m, n, rate = tree.zeros(head), tree.zeros(outer), zero + config.rate(visit.round)
        return Carry(head, outer, body(outer), m, n, rate, zero, zero, visit.examples, memory)

    def head_step(shared: Payload, c: Carry, batch: Batch, draw: Any) -> Carry:
        if private:
            g = private.gradient(c.body | c.head, batch, draw, c.own)
        else:
            _, g = value_and_grad(task.loss)(c.body | c.head, batch)
        g = tree.axpy(decay, c.head, take(g, c.head))
        m = tree.axpy(config.momentum, c.head_moment, g)
        return c._replace(head=tree.axpy(-lr, m, c.head), head_moment=m)

    def body_gradient(c: Carry, batch: Batch, draw: Any) -> tuple[Tree, Carry]:
        if private:
            theta, pull, *_ = torch.func.vjp(body, c.outer)
            return pull(take(private.gradient(theta | c.head, batch, draw, c.own), theta))[0], c

        def loss(params: Tree, b: Batch) -> Tensor:
            return task.loss(body(take(params, c.outer)) | take(params, c.head), b)

        value, g = value_and_grad(loss)(c.outer | c.head, batch)
        n = c.examples.new_full((), len(batch.y)) if batch.weight is None else batch.weight.sum()
        return take(g, c.outer), c._replace(loss=c.loss + value.detach() * n, examples=c.examples + n)

    def body_step(shared: Payload, c: Carry, batch: Batch, draw: Any) -> Carry:
        g, c = body_gradient(c, batch, draw)
        g = tree.axpy(decay, c.outer, clip(g) if clip else g)
        m = tree.axpy(config.momentum, c.outer_moment, g)
        return c._replace(outer=tree.axpy(-c.rate, m, c.outer), outer_moment=m)

    def model(shared: Payload, c: Carry) -> Tree:
        return body(c.outer) | c.head

    passes = (
        Pass(head_step, Schedule(config.batch_size, config.head_epochs, sampling=sampling)),
        Pass(body_step, config.schedule()._replace(sampling=sampling)),
    )
    return Local(init, passes, final, remember, draw, task.unbatchable, model)


def _draw(private: Private, shared: Payload, generator: torch.Generator) -> Any:
    return private.draw(generator)


def train_metrics(c: Carry) -> dict[str, Any]:
    """The mean loss over the examples of the body's pass, as each was seen before its step."""
    return {"train_loss": c.loss / c.examples.clamp(min=1)}
