"""LoRA-FAIR: a correction on the server (Bian et al. 2024, arXiv:2411.14961).

    client k     A_k, B_k ← local steps from A, B
    server       Ā = Σ p_k A_k,  B̄ = Σ p_k B_k
                 ΔB = argmin ‖Σ p_k B_k A_k − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖²
                 A ← Ā,  B ← B̄ + ΔB

The paper measures the first term by a cosine and minimises by gradient steps; with the Frobenius norm there is a closed
form, ΔB = (Σ p_k B_k A_k − B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹. λ → ∞ is FedIT; λ → 0 is the best B for Ā.
"""

from pydantic import Field

from clients.lora import NOTHING, LoraConfig, lora, prepare
from fedsim import Mean, Strategy, Task, tree
from server.adapters import Factors, by_layer, corrected, with_products
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "lora_fair"
    ridge: float = Field(0.01, gt=0, description="λ")


def build(config: Config, task: Task) -> Strategy[State]:
    of = prepare(config, task)

    def finish(s: State, mean: Mean) -> State:
        params, products = tree.add(s.params, mean.value["delta"]), mean.value["product"]
        better = by_layer(
            of.layers,
            params,
            lambda layer: Factors(
                corrected(products[layer.name], params[layer.B], params[layer.A], config.ridge), params[layer.A]
            ),
        )
        return s._replace(params=params | better)

    return family(
        of,
        lora(of, config, fixed=NOTHING),
        with_products(weighted_mean(config.weighting), of.layers),
        begin=lambda seed: of.A(seed, 0) | of.B(seed) | of.head(seed),
        finish=finish,
    )
