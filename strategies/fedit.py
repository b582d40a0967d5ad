"""FedIT: LoRA with FedAvg on both factors (Zhang et al. 2023, arXiv:2305.05644); "LoRA" in the tables of FFA-LoRA.

    client k     A_k, B_k ← local steps from A, B
    server       A ← Σ p_k A_k,   B ← Σ p_k B_k

B A is then not the mean update: Σ p_k B_k A_k − B A = Σ p_k (B_k − B)(A_k − A).
"""

from clients.lora import NOTHING, LoraConfig, lora, prepare
from fedsim import Mean, Strategy, Task, tree
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "fedit"


def build(config: Config, task: Task) -> Strategy[State]:
    of = prepare(config, task)

    def finish(s: State, mean: Mean) -> State:
        return s._replace(params=tree.add(s.params, mean.value["delta"]))

    return family(
        of,
        lora(of, config, fixed=NOTHING),
        weighted_mean(config.weighting),
        begin=lambda seed: of.A(seed, 0) | of.B(seed) | of.head(seed),
        finish=finish,
    )
