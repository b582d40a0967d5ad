"""FedEx-LoRA: exact aggregation (Singhal, Ponkshe, Vepakomma 2024, arXiv:2410.09432).

    client k     A_k, B_k ← local steps from A, B on W₀ + ΔW
    server       Ā = Σ p_k A_k,  B̄ = Σ p_k B_k,  ΔW ← ΔW + s (Σ p_k B_k A_k − B̄ Ā)
                 A ← Ā,  B ← B̄                       so W₀ + ΔW + s B̄ Ā has exactly the mean update

The p_k are the same in both terms. In the paper every client takes part in every round and adds the last residual to
the weights it keeps; here a client may come for the first time in any round, so ΔW goes down whole, and is counted so.
"""

from clients.lora import NOTHING, LoraConfig, lora, prepare
from fedsim import Mean, Strategy, Task, tree
from server.adapters import grown, residual, with_products
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "fedex_lora"


def build(config: Config, task: Task) -> Strategy[State]:
    of = prepare(config, task)
    s_ = config.alpha / config.rank

    def finish(s: State, mean: Mean) -> State:
        params, products = tree.add(s.params, mean.value["delta"]), mean.value["product"]
        change = grown(
            s.change, of.layers, of.base(s.seed), lambda layer: s_ * residual(products[layer.name], layer, params)
        )
        return s._replace(params=params, change=change)

    return family(
        of,
        lora(of, config, fixed=NOTHING, change=lambda shared: shared["change"]),
        with_products(weighted_mean(config.weighting), of.layers),
        begin=lambda seed: of.A(seed, 0) | of.B(seed) | of.head(seed),
        finish=finish,
        broadcast=lambda s: {"params": s.params, "change": s.change},
    )
