"""Local steps whose rate is given by the server, or learned by the client: FedHyper's client half, as middleware.

    paper      β_k ← clip(β_{k−1} + κ (⟨g_k, g_{k−1}⟩ + ⟨g_k, Δ⟩/K), β₀/γ, γ β₀)            before step k ≥ 1, of K
    released   β_{k+1} ← clip(min(1.1, 1 + κ (⟨d_k, d_{k−1}⟩ + 0.1 ⟨d_k, −Δ⟩/M)) β_k, β₀/γ, γ β₀)
               after the step d_k = w_{k+1} − w_k, but for the first of each epoch; d_{−1} = −Δ; M clients a cohort

g_k is the gradient with every correction and noise in it (FedProx's pull, SCAFFOLD's control variates, DP-SGD),
whatever the local optimiser makes of it. Δ points from the clients' mean back to the model before, along gradients;
what travels on channel "previous" is the mean update −Δ. In mode "cosine", inner products are divided by the norms and
κ is in parts of β₀. ``cap`` bounds β from above whatever γ β₀ is.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clients.sgd import Carry, Descent
from fedsim import tree
from fedsim.errors import ConfigError
from fedsim.types import Batch, Done, Local, Payload, Tree, Visit

GROWTH, GLOBAL = 1.1, 0.1  # the released code's constants


class Rule(NamedTuple):
    """How a client moves its own rate. ``epochs`` and ``cohort`` matter to the released form alone."""

    kappa: float
    mode: Literal["raw", "cosine"]
    form: Literal["paper", "released"]
    gamma: float
    cap: float | None
    epochs: int
    cohort: int


class Paced(NamedTuple):
    """A client in the middle of its steps, and how its rate has moved. Tensors without a name have shape ()."""

    inner: Carry  # its ``rate`` is β_k
    start: Tensor  # β₀
    before: Tree  # g_{k−1}, or d_{k−1}
    excess: Tensor  # Σ over steps of β_k − β₀
    steps: Tensor  # K


def given(local: Local) -> Local:
    """``local`` at the rate that the server sends on channel "rates". The step itself is the same one."""
    _descent(local)

    def init(shared: Payload, memory: Payload, visit: Visit) -> Carry:
        carry: Carry = local.init(shared, memory, visit)
        return carry._replace(rate=shared["rates"]["local"])

    def final(shared: Payload, c: Carry) -> Done:
        done = local.final(shared, c)
        return done._replace(metrics=done.metrics | {"local_rate": c.rate})

    return local._replace(init=init, final=final)


def learned(local: Local, rule: Rule) -> Local:
    """``local`` with a rate that each client moves by itself, from β₀ at the beginning of each visit.

    The inner ``final`` sees the visit's mean rate as ``carry.rate``, so that SCAFFOLD's (x − y)/(K η) stays a mean of
    gradients. Metric ``local_rate`` is that mean.
    """
    descent, whose = _descent(local), local.model
    gradient, move = descent.gradient, descent.move

    def init(shared: Payload, memory: Payload, visit: Visit) -> Paced:
        c = local.init(shared, memory, visit)
        before = tree.zeros(c.params) if rule.form == "paper" else shared["previous"]
        return Paced(c, c.rate, before, torch.zeros_like(c.rate), visit.steps.to(c.rate.dtype))

    def step(shared: Payload, c: Paced, batch: Batch, draw: Any) -> Paced:
        before = c.before
        g, inner = gradient(shared, c.inner, batch, draw)
        if rule.form == "paper":
            inner = inner._replace(rate=_paper(rule, c, inner, g, shared["previous"]))
            before = g
        moved = move(inner, g)
        if rule.form == "released":
            before = tree.sub(moved.params, inner.params)
            moved = moved._replace(rate=_released(rule, c, inner, before, shared["previous"]))
        return Paced(moved, c.start, before, c.excess + (inner.rate - c.start), c.steps)

    def final(shared: Payload, c: Paced) -> Done:
        rate = c.start + c.excess / c.inner.step.clamp(min=1)
        done = local.final(shared, c.inner._replace(rate=rate))
        return done._replace(metrics=done.metrics | {"local_rate": rate})

    return local._replace(
        init=init,
        passes=(local.passes[0]._replace(step=step),),
        final=final,
        model=(lambda shared, c: whose(shared, c.inner)) if whose else None,
    )


def _descent(local: Local) -> Descent:
    """The step whose rate is to be set. ``ConfigError`` where clients do anything but descend gradients."""
    step = local.passes[0].step if len(local.passes) == 1 else None
    if not isinstance(step, Descent):
        raise ConfigError("strategy.base: its clients take no gradient steps whose rate could be set")
    return step


def _paper(rule: Rule, c: Paced, inner: Carry, g: Tree, previous: Tree) -> Tensor:
    """β_k of the paper's form; the first step has β₀."""
    product, unit = _product(rule, c)
    h = product(g, c.before) - product(g, previous) / c.steps
    rate = inner.rate + rule.kappa * unit * torch.where(inner.step > 0, h, torch.zeros_like(h))
    return _clip(rule, c, rate)


def _released(rule: Rule, c: Paced, inner: Carry, d: Tree, previous: Tree) -> Tensor:
    """β_{k+1} of the released code's form."""
    product, _ = _product(rule, c)
    h = product(d, c.before) + GLOBAL * product(d, previous) / rule.cohort
    growth = (1 + rule.kappa * h).clamp(max=GROWTH)
    of_epoch = torch.remainder(inner.step, (c.steps / rule.epochs).clamp(min=1))
    return _clip(rule, c, inner.rate * torch.where(of_epoch > 0, growth, torch.ones_like(growth)))


def _product(rule: Rule, c: Paced) -> tuple[Callable[[Tree, Tree], Tensor], Tensor | float]:
    """The inner product of the rule's mode, and what κ is a part of."""
    return (tree.dot, 1.0) if rule.mode == "raw" else (tree.cosine, c.start)


def _clip(rule: Rule, c: Paced, rate: Tensor) -> Tensor:
    high = c.start * rule.gamma
    return torch.clamp(rate, min=c.start / rule.gamma, max=high if rule.cap is None else high.clamp(max=rule.cap))
