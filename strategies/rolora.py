"""RoLoRA: alternating minimisation (Chen et al. 2024, arXiv:2409.02346).

    odd rounds    B_k ← local steps from B with A common and frozen;   B ← Σ p_k B_k
    even rounds   A_k ← local steps from A with B common and frozen;   A ← Σ p_k A_k

Both means are exact, since the other factor is the same at every client. Both factors go down, one of them comes up. In
round 1 B starts at 0, where A would have no gradient. A trained head is trained in every round.
"""

from clients.lora import LoraConfig, lora, prepare
from fedsim import Mean, Payload, Strategy, Task, tree
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "rolora"


def build(config: Config, task: Task) -> Strategy[State]:
    of = prepare(config, task)
    As, Bs = {layer.A for layer in of.layers}, {layer.B for layer in of.layers}

    def broadcast(s: State) -> Payload:
        frozen = As if s.round % 2 else Bs
        return {
            "params": {name: x for name, x in s.params.items() if name not in frozen},
            "fixed": {name: x for name, x in s.params.items() if name in frozen},
        }

    def finish(s: State, mean: Mean) -> State:
        delta = mean.value["delta"]
        moved = tree.add({name: s.params[name] for name in delta}, delta)
        return s._replace(params=s.params | moved)

    return family(
        of,
        lora(of, config, fixed=lambda shared: shared["fixed"]),
        weighted_mean(config.weighting),
        begin=lambda seed: of.A(seed, 0) | of.B(seed) | of.head(seed),
        finish=finish,
        broadcast=broadcast,
    )
