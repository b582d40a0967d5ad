"""FZooS (Shu, Lin, Dai and Low 2023, arXiv:2308.04077): federated zeroth-order optimisation with shared surrogates.

    client i, from x:   asks y_i(x) and the points around x that its surrogate knows least of, fits w_i   (sends w_i)
    server              w ← mean_i w_i
    client i, T steps   g ← ∇μ_i(u) + γ_t (∇φ(u)ᵀ w − ∇φ(u)ᵀ w_i),   γ_t = 1/t,   u ← u − η g
                        before each step but the first, it asks for more points that it knows least of
    (sends u_i)
    server              x ← mean_i u_i

The surrogate μ_i, its doubt, and the features φ are in ``clients.surrogate``, and the clients' work on them is in
``clients.by_surrogate``. Per round and client: T + (T − 1)·active + 1 + survey queries, and d + M numbers each way. The
paper counts the exchange of weights to the round before; here it comes first,
at the same point x and with the same queries. So the correction is on from round 1, no weights are stale where cohorts
change, and the first survey takes the place of the authors' ten initial queries.
"""

from clients.by_surrogate import SurrogateConfig, by_surrogate, survey
from clients.zeroth_order import flat
from fedsim import Mean, Payload, Phase, Strategy, Task, Tree
from server.reduce import weighted_mean
from strategies.fedzo import State, counted, strategy, walk


class Config(SurrogateConfig):
    name: str = "fzoos"


# The contract's model has 63 parameters.
CHECK = {
    "features": 64,
    "survey": 10,
    "survey_candidates": 20,
    "candidates": 20,
    "active": 2,
    "local": 40,
    "fit": 60,
    "history": 80,
}


def build(config: Config, task: Task) -> Strategy[State]:
    def mean_weights(state: State, mean: Mean) -> State:
        return counted(state, mean)._replace(common={"surrogate": mean.value["surrogate"]})

    reduce = weighted_mean(config.weighting)
    exchange = Phase(lambda state: {"params": state.x}, survey(task, config), reduce, mean_weights)
    iterate = walk(config, by_surrogate(task, config), lambda state: {"surrogate": state.common["surrogate"]})
    sends = (frozenset({"surrogate"}), frozenset({"params"}))

    def common(x: Tree) -> Payload:
        return {"surrogate": {"w": flat(x).new_zeros(config.features)}}

    return strategy(config, task, (exchange, iterate), sends, common)
