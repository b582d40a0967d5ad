"""Server optimisers: what the server does with the mean update Δ, which it treats as a negative gradient.

    momentum   m ← β m + Δ                              w ← w + η m
    adaptive   m ← β₁ m + (1 − β₁) Δ,  v by the rule     w ← w + η m / (√v + τ)
               adagrad  v ← v + Δ²
               adam     v ← β₂ v + (1 − β₂) Δ²
               yogi     v ← v − (1 − β₂) Δ² sign(v − Δ²)

Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2: no bias correction, and v starts at τ².
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from fedsim import tree
from fedsim.types import Tree


class Moments(NamedTuple):
    """What a server optimiser keeps; {} where it keeps nothing."""

    m: Tree
    v: Tree


class ServerOptimizer(NamedTuple):
    """``init(w) -> moments`` and ``step(w, Δ, moments) -> (w, moments)``."""

    init: Callable[[Tree], Moments]
    step: Callable[[Tree, Tree, Moments], tuple[Tree, Moments]]


def plain(eta: float) -> ServerOptimizer:
    """w ← w + η Δ."""
    return ServerOptimizer(lambda w: Moments({}, {}), lambda w, delta, s: (tree.axpy(eta, delta, w), s))


def momentum(eta: float, beta: float) -> ServerOptimizer:
    """Hsu et al. 2019 (arXiv:1909.06335)."""

    def step(w: Tree, delta: Tree, s: Moments) -> tuple[Tree, Moments]:
        m = tree.axpy(beta, s.m, delta)
        return tree.axpy(eta, m, w), Moments(m, {})

    return ServerOptimizer(lambda w: Moments(tree.zeros(w), {}), step)


def adaptive(
    rule: Literal["adagrad", "adam", "yogi"], eta: float, beta1: float, beta2: float, tau: float
) -> ServerOptimizer:
    """The three rules of Algorithm 2."""

    def second(v: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        square = delta * delta
        match rule:
            case "adagrad":
                return v + square
            case "adam":
                return beta2 * v + (1 - beta2) * square
            case "yogi":
                return v - (1 - beta2) * square * torch.sign(v - square)

    def init(w: Tree) -> Moments:
        return Moments(tree.zeros(w), tree.map(lambda x: torch.full_like(x, tau**2), w))

    def step(w: Tree, delta: Tree, s: Moments) -> tuple[Tree, Moments]:
        m = tree.axpy(1 - beta1, delta, tree.scale(beta1, s.m))
        v = tree.map(second, s.v, delta)
        return tree.map(lambda x, mi, vi: x + eta * mi / (vi.sqrt() + tau), w, m, v), Moments(m, v)

    return ServerOptimizer(init, step)
