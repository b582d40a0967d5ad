"""FedSVD: FFA-LoRA whose A is made anew from what was learned (Lee et al. 2025, arXiv:2505.12805).

    client k     B_k ← local steps from B, A frozen
    server       B ← Σ p_k B_k;  every ``svd_period`` rounds  U S Vᵀ = B A,  B ← U S,  A ← Vᵀ

The product B A is unchanged by the split, A gets orthonormal rows, and under DP the split is post-processing. A goes
down (r (d_in + d_out) in all), B alone comes up. ``svd_period = 0`` is FFA-LoRA.
"""

from pydantic import Field

from clients.lora import LoraConfig, lora, prepare, seed_of
from fedsim import Mean, Payload, Strategy, Task, Tree, tree
from server.adapters import by_layer, resplit
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "fedsvd"
    svd_period: int = Field(1, ge=0, description="rounds between two splits; 0: never")


def build(config: Config, task: Task) -> Strategy[State]:
    of, period = prepare(config, task), config.svd_period
    As = [layer.A for layer in of.layers]

    def broadcast(s: State) -> Payload:
        moving = {name: x for name, x in s.params.items() if name not in As}
        return {"params": moving} | ({"fixed": {name: s.params[name] for name in As}} if period else {})

    def fixed(shared: Payload) -> Tree:
        return shared["fixed"] if period else of.A(seed_of(shared), 0)

    def finish(s: State, mean: Mean) -> State:
        delta = mean.value["delta"]
        params = s.params | tree.add({name: s.params[name] for name in delta}, delta)
        if period and s.round % period == 0:
            params |= by_layer(of.layers, params, lambda layer: resplit(params[layer.B], params[layer.A]))
        return s._replace(params=params)

    return family(
        of,
        lora(of, config, fixed),
        weighted_mean(config.weighting),
        begin=lambda seed: of.A(seed, 0) | of.B(seed) | of.head(seed),
        finish=finish,
        broadcast=broadcast,
    )
