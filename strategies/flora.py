"""FLoRA: stacking (Wang et al. 2024, arXiv:2409.05976).

    client k     A_k drawn, B_k = 0;  A_k, B_k ← local steps on W₀ + ΔW
    server       [B_1 … B_K] [p_1 A_1; …; p_K A_K] = Σ p_k B_k A_k
                 ΔW ← ΔW + s Σ p_k B_k A_k

Adapters begin anew in every round; A's draw follows from the seed and the round, so neither goes down. In the paper the
stacked factors go down; a client may come for the first time in any round here, so ΔW goes down whole, and is counted.
"""

import torch

from clients.lora import LoraConfig, lora, prepare, seed_of, send_factors
from fedsim import Mean, Payload, Strategy, Task, Tree
from server.adapters import grown, only_products
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "flora"


def build(config: Config, task: Task) -> Strategy[State]:
    of = prepare(config, task)

    def fresh(shared: Payload, memory: Payload | None = None) -> Tree:
        seed = seed_of(shared)
        return of.A(seed, int(shared["draw"]["round"])) | of.B(seed) | shared["params"]

    def finish(s: State, mean: Mean) -> State:
        products = mean.value["product"]
        change = grown(s.change, of.layers, of.base(s.seed), lambda layer: products[layer.name])
        return s._replace(params=mean.value["head"], change=change)

    local = lora(
        of,
        config,
        fixed=lambda shared: {},
        change=lambda shared: shared["change"],
        start=fresh,
        final=send_factors,
        template=fresh,
    )
    return family(
        of,
        local,
        only_products(weighted_mean(config.weighting), of.layers, config.alpha),
        begin=of.head,
        finish=finish,
        broadcast=lambda s: {"params": s.params, "change": s.change, "draw": {"round": torch.tensor(s.round)}},
        factors=lambda s: of.A(s.seed, s.round) | of.B(s.seed) | s.params,
        sends="factors",
    )
