"""The form that the family of LoRA shares: local steps on adapters of a frozen model, and what the server does then.

h = (W₀ + ΔW + s B A) x,   s = α/r             (Hu et al. 2021, arXiv:2106.09685)

who                A          B          server
ffa_lora           frozen     trained    mean of B: exact
fedit              trained    trained    mean of A, mean of B: not the mean of B A
fedex_lora         trained    trained    the same, and ΔW takes the difference
flora              trained    trained    ΔW takes the whole product; adapters begin anew
flexlora           trained    trained    the product's best rank-r factors; clients of different ranks
rolora             by turns   by turns   mean of the one that was trained: exact
fedsa_lora         trained    own        mean of A; B stays at the client
fedsvd             re-split   trained    mean of B, then B A = U S Vᵀ anew as (U S)(Vᵀ)
fed_sb             frozen     frozen     mean of R in B R A: exact
lora_fair          trained    trained    means, and a correction of B towards the product
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from clients.lora import Adapters, new_seed, seed_channel
from fedsim import Local, Mean, Payload, Phase, Reducer, Strategy, Tree
from fedsim.tasks.adapters import files
from server.adapters import moving


class State(NamedTuple):
    """seed: names the frozen base and what is drawn; params: what the server keeps of the factors (and a trained head);
    change: what was added to W₀, {} where nothing ever is."""

    seed: int
    round: int
    params: Tree
    change: Tree


def family(
    of: Adapters,
    local: Local,
    reduce: Reducer[Any, Any],
    *,
    begin: Callable[[int], Tree],
    finish: Callable[[State, Mean], State],
    broadcast: Callable[[State], Payload] = lambda s: {"params": s.params},
    factors: Callable[[State], Tree] = lambda s: s.params,
    sends: str = "delta",
    **more: Any,
) -> Strategy[State]:
    """``begin(seed)``: the first params; ``factors(state)``: A and B; ``broadcast(state)``: what goes with the seed."""

    def init(generator: torch.Generator) -> State:
        seed = new_seed(generator)
        return State(seed, 1, begin(seed), {})

    def shared(s: State) -> Payload:
        return {**broadcast(s), "seed": seed_channel(s.seed)}

    def done(s: State, mean: Mean) -> State:
        return finish(s, mean)._replace(round=s.round + 1)

    def export(s: State) -> dict[str, bytes]:
        return files(of.task, of.layers, of.alpha, of.base(s.seed), factors(s), s.change)

    guarded = moving(reduce, of.layers) if of.task.private else reduce
    strategy = Strategy(
        init,
        (Phase(shared, local, guarded, done),),
        lambda s: of.merged(s.seed, factors(s), s.change),
        (frozenset({sends}),),
        export=export,
    )
    return strategy._replace(**more)
