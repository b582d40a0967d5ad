"""FedSA-LoRA: share A, keep B (Guo et al. 2024, arXiv:2410.01463).

    client k     A_k, B_k ← local steps from A and its own B_k;  sends A_k, keeps B_k (and a trained head)
    server       A ← Σ p_k A_k

A is said to learn what is common and B what is a client's own. There is no global model: each client's is measured.
"""

import torch

from clients.lora import NOTHING, LoraConfig, lora, prepare, seed_of
from clients.sgd import Carry, train_metrics
from fedsim import Done, Mean, Payload, Strategy, Task, Tree, tree
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "fedsa_lora"


def build(config: Config, task: Task) -> Strategy[State]:
    of = prepare(config, task)

    def own(shared: Payload) -> Tree:
        return of.B(seed_of(shared)) | of.head(seed_of(shared))

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        return {"own": own(shared)}

    def final(shared: Payload, c: Carry) -> Done:
        moved = tree.sub({name: c.params[name] for name in shared["params"]}, shared["params"])
        return Done({"delta": moved}, {"own": {name: c.params[name] for name in c.memory["own"]}}, train_metrics(c))

    def personal(shared: Payload, memory: Payload) -> Tree:
        return of.merged(seed_of(shared), shared["params"] | memory["own"])

    def finish(s: State, mean: Mean) -> State:
        return s._replace(params=tree.add(s.params, mean.value["delta"]))

    local = lora(
        of,
        config,
        fixed=NOTHING,
        start=lambda shared, memory: shared["params"] | memory["own"],
        final=final,
        remember=remember,
        template=lambda shared: shared["params"] | own(shared),
    )
    return family(
        of,
        local,
        weighted_mean(config.weighting),
        begin=lambda seed: of.A(seed, 0),
        finish=finish,
        factors=lambda s: s.params | of.B(s.seed),
        personal=personal,
        is_global=False,
        params=lambda s: s.params,
        export=None,
    )
