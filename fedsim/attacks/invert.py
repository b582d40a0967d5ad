"""Pictures whose update is the one that was seen: iterative gradient inversion.

    ig    Adam on the sign of the gradient of 1 − cos(u(x'), u*) + λ TV(x'); the step falls by 10 at 3/8, 5/8 and 7/8 of
          the iterations; x' stays in [0, 1]   (Geiping et al. 2020, arXiv:2003.14053)
    dlg   L-BFGS on ‖u(x') − u*‖²              (Zhu et al. 2019, arXiv:1906.08935; labels are among the other unknowns)
    rog   x' = bicubic enlargement of z ∈ [0, 1] at half the size; Adam on ‖u(x') − u*‖², its step falling tenfold by a
          cosine   (Yue et al. 2023, arXiv:2206.04055; without the pretrained networks that repaint x' there)

u(x') is whatever the victim would have sent had it held x', a differentiable function that the caller gives.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.attacks.images import coloured, total_variation
from fedsim.types import Payload

Method = Literal["ig", "dlg", "rog"]


class Plan(NamedTuple):
    """How an inversion is run. ``step`` is Adam's, in units of the pictures' range; ``tv`` is λ."""

    method: Method
    iterations: int
    step: float
    tv: float
    restarts: int


class Found(NamedTuple):
    """Pictures, the other unknowns that were optimised with them, and what is left of the objective."""

    x: Tensor
    others: list[Tensor]
    objective: float


def flat(value: Payload) -> Tensor:
    """Every number of a payload, in the order of its names."""
    return torch.cat([part[n].flatten() for _, part in sorted(value.items()) for n in sorted(part)])


def cosine(u: Tensor, seen: Tensor) -> Tensor:
    """1 − cos(u, seen), shape (); 1 where either is 0."""
    similarity: Tensor = (u @ seen) / (u.norm() * seen.norm()).clamp(min=1e-20)
    return 1 - similarity


def invert(
    update: Callable[[Tensor, Sequence[Tensor]], Tensor],
    seen: Tensor,
    shape: Sequence[int],
    plan: Plan,
    generator: torch.Generator,
    unknowns: Callable[[torch.Generator], list[Tensor]] = lambda generator: [],
) -> Found:
    """Pictures of ``shape`` (N, …), of the restart with the lowest objective.

    update:   (x', unknowns) -> the numbers that would have been sent, as many as ``seen``
    unknowns: draws what else the attacker does not know, and optimises
    """
    seen = seen.detach()
    attempts = []
    for _ in range(plan.restarts):
        start = 0.5 + 0.25 * torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(seen)
        others = [t.detach().clone().requires_grad_() for t in unknowns(generator)]
        attempts.append(_METHODS[plan.method](update, seen, start, others, plan))
    return min(attempts, key=lambda found: found.objective)


def _ig(update: Callable[..., Tensor], seen: Tensor, start: Tensor, others: list[Tensor], plan: Plan) -> Found:
    x = start.clamp(0, 1).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [x]}, *([{"params": others}] if others else [])], lr=plan.step)
    falls = [math.ceil(plan.iterations * part / 8) for part in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, 0.1)
    best = Found(start, others, math.inf)
    for _ in range(plan.iterations):
        match = cosine(update(x, others), seen)
        objective = match + plan.tv * total_variation(x)
        if float(objective.detach()) < best.objective:
            best = Found(x.detach().clone(), [t.detach().clone() for t in others], float(objective.detach()))
        x.grad, *rest = torch.autograd.grad(objective, [x, *others], allow_unused=True, materialize_grads=True)
        x.grad = x.grad.sign()
        for t, g in zip(others, rest):
            t.grad = g
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return best


def _dlg(update: Callable[..., Tensor], seen: Tensor, start: Tensor, others: list[Tensor], plan: Plan) -> Found:
    x, scale = start.requires_grad_(), seen.square().sum().clamp(min=1e-20)  # a scale that does not move the minimum
    optimizer = torch.optim.LBFGS(
        [x, *others], max_iter=plan.iterations, max_eval=plan.iterations, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        objective = (update(x, others) - seen).square().sum() / scale
        grads = torch.autograd.grad(objective, [x, *others], allow_unused=True, materialize_grads=True)
        for t, g in zip([x, *others], grads):
            t.grad = g
        return objective

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Found(x.detach().clamp(0, 1), [t.detach() for t in others], float(closure().detach()))


def _rog(update: Callable[..., Tensor], seen: Tensor, start: Tensor, others: list[Tensor], plan: Plan) -> Found:
    whole = coloured(start)
    size = whole.shape[-2:]
    z = F.interpolate(whole, size=[(s + 1) // 2 for s in size], mode="area").clamp(0, 1).requires_grad_()
    optimizer = torch.optim.Adam([z, *others], lr=plan.step)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.iterations, plan.step / 10)
    scale = seen.square().sum().clamp(min=1e-20)

    def enlarged() -> Tensor:
        return F.interpolate(z, size=list(size), mode="bicubic", align_corners=False).view(start.shape)

    best = Found(start, others, math.inf)
    for _ in range(plan.iterations):
        objective = (update(enlarged(), others) - seen).square().sum() / scale
        if float(objective.detach()) < best.objective:
            found = enlarged().detach().clamp(0, 1)
            best = Found(found, [t.detach().clone() for t in others], float(objective.detach()))
        z.grad, *rest = torch.autograd.grad(objective, [z, *others], allow_unused=True, materialize_grads=True)
        for t, g in zip(others, rest):
            t.grad = g
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            z.clamp_(0, 1)
    return best


_METHODS: dict[Method, Callable[..., Found]] = {"ig": _ig, "dlg": _dlg, "rog": _rog}
