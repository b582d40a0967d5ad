"""A rate that learns by hypergradient descent: updates of two rounds in, a number out.

    h      ← ⟨now, before⟩                        raw; with mode "cosine" divided by both norms
    rate   ← clip(rate + κ h, low, high)

Successive updates that agree raise the rate, updates that disagree lower it (Baydin et al. 2018, arXiv:1703.04782: the
derivative of the loss by the rate is −h). A pure function of its arguments: whatever the server does with the update
afterwards (momentum, FedAdam) does not concern it.
"""

from typing import Literal, NamedTuple

from fedsim import tree
from fedsim.types import Tree

Mode = Literal["raw", "cosine"]


class Rule(NamedTuple):
    """How far a rate moves at a time, and between which bounds."""

    kappa: float
    mode: Mode
    low: float
    high: float


def adapt(rule: Rule, rate: float, now: Tree, before: Tree) -> float:
    """The new rate. Inner products are in float64; where ``before`` is zero (the first round) the rate stays."""
    wide, wide_before = ({name: x.double() for name, x in t.items()} for t in (now, before))
    h = float((tree.dot if rule.mode == "raw" else tree.cosine)(wide, wide_before))
    return min(max(rate + rule.kappa * h, rule.low), rule.high)
