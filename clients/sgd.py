"""Local SGD and Adam, written for one client.

    g ← ∇F_k(w; batch) + λ w + correction        (λ: weight decay)
    sgd:   m ← μ m + g,  w ← w − η m
    adam:  m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,
           w ← w − η/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + ε)

The formulas are those of ``torch.optim.SGD`` and ``torch.optim.Adam``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedsim import tree
from fedsim.autodiff import transformed, value_and_grad
from fedsim.config import Closed, StrategyConfig
from fedsim.lower import Chain
from fedsim.types import Batch, Done, Fused, Local, Pass, Payload, Private, Schedule, Task, Tree, Visit

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Exponential(Closed):
    """η · factor^(round−1)."""

    name: Literal["exponential"]
    factor: float = Field(gt=0, le=1)


class Cosine(Closed):
    """η · (1 + cos(π · min(round−1, rounds)/rounds)) / 2."""

    name: Literal["cosine"]
    rounds: int = Field(ge=1)


class Steps(Closed):
    """η · factor^⌊(round−1)/every⌋."""

    name: Literal["step"]
    every: int = Field(ge=1)
    factor: float = Field(gt=0, le=1)


RateSchedule = Exponential | Cosine | Steps


def scheduled(rate: float, schedule: RateSchedule | None, round: int) -> float:
    """A rate in this round (rounds are counted from 1)."""
    match schedule:
        case Exponential(factor=factor):
            return rate * float(factor) ** (round - 1)
        case Cosine(rounds=rounds):
            return rate * (1 + math.cos(math.pi * min(round - 1, rounds) / rounds)) / 2
        case Steps(every=every, factor=factor):
            return rate * float(factor) ** ((round - 1) // every)
        case None:
            return rate


class SgdConfig(StrategyConfig):
    """What every strategy with local gradient steps is told."""

    USUAL: ClassVar[int] = 1  # epochs where nothing is said

    lr: float = Field(0.1, gt=0, description="η, the clients' learning rate")
    lr_schedule: Annotated[RateSchedule, Field(discriminator="name")] | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    epochs: int | None = Field(None, ge=1, description="passes over the client's examples; 1 where nothing is said")
    steps: int | None = Field(None, ge=1, description="batches a visit, instead of epochs")
    batch_size: int = Field(32, ge=1)
    weighting: Literal["examples", "uniform"] = Field("examples", description="what the mean over clients weighs by")

    @model_validator(mode="after")
    def _one_length(self) -> "SgdConfig":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs: give either epochs or steps (got both)")
        if self.optimizer == "adam" and self.momentum:
            raise ValueError(f"momentum: belongs to optimizer 'sgd' (got {self.momentum} with 'adam')")
        return self

    def schedule(self) -> Schedule:
        return Schedule(self.batch_size, self.epochs or self.USUAL, self.steps)

    def rate(self, round: int) -> float:
        """η in this round (rounds are counted from 1)."""
        return scheduled(self.lr, self.lr_schedule, round)


class Carry(NamedTuple):
    """A client in the middle of its local steps. Tensors without a name have shape ()."""

    params: Tree
    moments: Payload  # the optimizer's: {} | {"m"} | {"m", "v"}
    memory: Payload
    rate: Tensor  # η of this round
    step: Tensor  # steps taken
    loss: Tensor  # Σ over steps of the batch's mean loss · its examples
    examples: Tensor
    own: Tensor  # the client's number of examples


@dataclass(frozen=True)
class Descent:
    """A local step in two halves, so that middleware can come between them: noise, or a rate that the gradient decides.

    gradient: (shared, carry, batch, draw) -> g with every correction, and the carry with what was measured
    move:     (carry, g) -> the carry after a step of ``carry.rate`` along g
    """

    gradient: Callable[[Payload, Carry, Batch, Any], tuple[Tree, Carry]]
    move: Callable[[Carry, Tree], Carry]

    def __call__(self, shared: Payload, c: Carry, batch: Batch, draw: Any) -> Carry:
        g, c = self.gradient(shared, c, batch, draw)
        return self.move(c, g)


def sgd(
    task: Task,
    config: SgdConfig,
    correction: Callable[[Payload, Payload, Tree], Tree] | None = None,
    final: Callable[[Payload, Carry], Done] | None = None,
    remember: Callable[[Payload, torch.Generator], Payload] | None = None,
    start: Callable[[Payload, Payload], Tree] = lambda shared, memory: shared["params"],
) -> Local:
    """Local steps from ``start(shared, memory)``, which is the broadcast model.

    ``correction(shared, memory, w)`` is added to every gradient (FedProx's pull, SCAFFOLD's control variates).
    ``final`` makes what is sent; without it, {"delta": w_k − w}.
    """
    loss_and_grad = value_and_grad(task.loss)
    schedule = config.schedule()
    if task.private:
        schedule = schedule._replace(sampling="poisson")

    def init(shared: Payload, memory: Payload, visit: Visit) -> Carry:
        w = tree.moved(start(shared, memory), visit.examples.device)
        zero = next(iter(w.values())).new_zeros(())
        moments = {"m": tree.zeros(w)} if config.momentum or config.optimizer == "adam" else {}
        if config.optimizer == "adam":
            moments["v"] = tree.zeros(w)
        return Carry(w, moments, memory, zero + config.rate(visit.round), zero, zero, zero, visit.examples)

    def gradient(shared: Payload, c: Carry, batch: Batch, draw: Any) -> tuple[Tree, Carry]:
        if task.private:
            g, measured = task.private.gradient(c.params, batch, draw, c.own), c
        else:
            loss, g = loss_and_grad(c.params, batch)
            n = len(batch.y) if batch.weight is None else batch.weight.sum()
            measured = c._replace(loss=c.loss + loss.detach() * n, examples=c.examples + n)
        if config.weight_decay:
            g = tree.axpy(config.weight_decay, c.params, g)
        if correction:
            g = tree.add(g, correction(shared, c.memory, c.params))
        return g, measured

    def move(c: Carry, g: Tree) -> Carry:
        t = c.step + 1
        direction, moments = _direction(config, g, c.moments, t)
        if c.rate.device.type == "cpu" and not transformed():
            eta = float(c.rate)  # as a number it goes into the sum, which is then one operation
            w = tree.map(lambda x, d: torch.sub(x, d, alpha=eta), c.params, direction)
        else:
            w = tree.axpy(-c.rate, direction, c.params)
        return c._replace(params=w, moments=moments, step=t)

    step = Descent(gradient, move)
    draw = partial(_draw, task.private) if task.private else None
    passes = (Pass(step, schedule, _fused(step, task, config, correction)),)
    return Local(init, passes, final or send_delta, remember, draw, task.unbatchable, lambda shared, c: c.params)


def _fused(
    step: Descent, task: Task, config: SgdConfig, correction: Callable[[Payload, Payload, Tree], Tree] | None
) -> Fused | None:
    """Plain steps along the gradient with its corrections, where the network is one that ``fedsim.lower`` knows."""
    private = task.private
    chain: Chain | None = getattr((private.bare if private else task).loss, "chain", None)
    if chain is None or config.optimizer != "sgd" or config.momentum:
        return None

    def own(c: Carry) -> Carry:
        loss, examples, steps = (x.clone(memory_format=torch.contiguous_format) for x in (c.loss, c.examples, c.step))
        return c._replace(params=chain.own(c.params), loss=loss, examples=examples, step=steps)

    def beside(shared: Payload, memory: Payload, w: Tree, rate: Tensor) -> Tree:
        """What a step adds to w besides −η ∇F."""
        g = tree.scale(config.weight_decay, w) if config.weight_decay else None
        if correction:
            more = correction(shared, memory, w)
            g = more if g is None else tree.add(g, more)
        return tree.scale(-rate, g or {})

    def fused(shared: Payload, c: Carry, batch: Batch, draw: Any) -> None:
        extra: Tree = {}
        if correction or config.weight_decay:
            extra = torch.vmap(partial(beside, shared))(c.memory, c.params, c.rate)
        if private:
            dims: Any = (0, Batch(*(None if t is None else 0 for t in batch)), 0, 0)  # type: ignore[arg-type]
            for name, g in torch.vmap(private.gradient, in_dims=dims)(c.params, batch, draw, c.own).items():
                c.params[name].addcmul_(g, c.rate.view(-1, *[1] * (g.ndim - 1)), value=-1)
        else:
            c.loss.add_(chain.descend(c.params, batch, c.rate))
            c.examples.add_(batch.y.shape[1] if batch.weight is None else batch.weight.sum(1))
        for name, x in extra.items():
            c.params[name].add_(x)
        c.step.add_(1)

    return Fused(step, own, fused, chain.clients(config.batch_size))


def _draw(private: Private, shared: Payload, generator: torch.Generator) -> Any:
    return private.draw(generator)


def send_delta(shared: Payload, c: Carry) -> Done:
    """Δ_k = w_k − w."""
    return Done({"delta": tree.sub(c.params, shared["params"])}, {}, train_metrics(c))


def train_metrics(c: Carry) -> dict[str, Tensor]:
    """The mean loss over the examples of this visit, as each was seen before its step."""
    return {"train_loss": c.loss / c.examples.clamp(min=1)}


def _direction(config: SgdConfig, g: Tree, moments: Payload, t: Tensor) -> tuple[Tree, Payload]:
    """What the parameters move along, and the new moments."""
    if config.optimizer == "adam":
        m = tree.axpy(1 - BETA1, g, tree.scale(BETA1, moments["m"]))
        v = tree.map(lambda vi, gi: BETA2 * vi + (1 - BETA2) * gi * gi, moments["v"], g)
        c1, c2 = 1 - BETA1**t, (1 - BETA2**t).sqrt()
        return tree.map(lambda mi, vi: mi / (vi.sqrt() / c2 + EPS) / c1, m, v), {"m": m, "v": v}
    if config.momentum:
        m = tree.axpy(config.momentum, moments["m"], g)
        return m, {"m": m}
    return g, {}
