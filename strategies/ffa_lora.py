"""FFA-LoRA: federated freeze-A LoRA (Sun, Li, Li, Ding 2024, arXiv:2403.12313).

    h = (W₀ + s B A) x            s = α/r;  A is drawn once, the same for all, and frozen;  B starts at 0
    client k     B_k ← B;  B_k ← B_k − η ∂F_k/∂B_k        under DP with the gradients of examples clipped over all B
    server       B ← Σ p_k B_k                           exact: Σ p_k B_k A = (Σ p_k B_k) A

A follows from the run's seed and is never sent, the head is frozen where it was drawn: B alone travels, up and down.
(s, η) and (c s, η/c²) give the same W under SGD, so α is one more name for the learning rate.
"""

from clients.lora import LoraConfig, lora, prepare, seed_of
from fedsim import Mean, Payload, Strategy, Task, Tree, tree
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "ffa_lora"


def build(config: Config, task: Task) -> Strategy[State]:
    of = prepare(config, task)

    def A(shared: Payload) -> Tree:
        return of.A(seed_of(shared), 0)

    def finish(s: State, mean: Mean) -> State:
        return s._replace(params=tree.add(s.params, mean.value["delta"]))

    return family(
        of,
        lora(of, config, fixed=A),
        weighted_mean(config.weighting),
        begin=lambda seed: of.B(seed) | of.head(seed),
        finish=finish,
        factors=lambda s: of.A(s.seed, 0) | s.params,
    )
