"""FlexLoRA: clients of different ranks (Bai et al. 2024, arXiv:2402.11505).

    server       U S Vᵀ = svd_r(Σ p_k s_k B_k A_k),   B = U S/s,  A = Vᵀ          s_k = α/r_k,  r = max r_k
    client k     A_k = A[:r_k],  B_k = (U S)[:, :r_k]/s_k = B[:, :r_k] r_k/r;  local steps;  sends A_k, B_k of rank r_k

A client draws its rank from ``ranks`` on its first visit and remembers it. It is sent all of A and B and cuts its own
share, since what is broadcast is one thing for all. With one rank the aggregation is exact up to the cut at r.
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator

from clients.lora import NOTHING, LoraConfig, lora, prepare
from clients.sgd import Carry, train_metrics
from fedsim import Done, Mean, Payload, Strategy, Task, Tree
from fedsim.errors import ConfigError
from server.adapters import Factors, by_layer, only_products, svd
from server.reduce import weighted_mean
from strategies.lora import State, family

Rank = Annotated[int, Field(ge=1, le=4096)]


class Config(LoraConfig):
    name: str = "flexlora"
    ranks: Annotated[tuple[Rank, ...], Field(strict=False, min_length=1)] = (2, 4, 8)

    @model_validator(mode="after")
    def _fit(self) -> "Config":
        if max(self.ranks) > self.rank:
            raise ValueError(f"ranks: must be at most rank, {self.rank} (got {max(self.ranks)})")
        return self


def build(config: Config, task: Task) -> Strategy[State]:
    of, r = prepare(config, task), config.rank
    if task.private and set(config.ranks) != {r}:
        raise ConfigError("strategy.ranks: under [privacy] all clients need the rank 'rank'; their noise has one shape")

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        i = int(torch.randint(len(config.ranks), (), generator=generator))
        return {"rank": {"rank": torch.tensor(config.ranks[i])}}

    def cut(shared: Payload, memory: Payload) -> Tree:
        own, r_k = dict(shared["params"]), int(memory["rank"]["rank"])
        for layer in of.layers:
            own[layer.A], own[layer.B] = own[layer.A][:r_k], own[layer.B][:, :r_k] * (r_k / r)
        return own

    def final(shared: Payload, c: Carry) -> Done:
        return Done({"factors": c.params}, {"rank": c.memory["rank"]}, train_metrics(c))

    def finish(s: State, mean: Mean) -> State:
        def split(name: str) -> Factors:
            B, A = svd(mean.value["product"][name], r)
            return Factors(B * (r / config.alpha), A)

        return s._replace(params=by_layer(of.layers, s.params, lambda layer: split(layer.name)) | mean.value["head"])

    why = "clients have adapters of different ranks" if len(set(config.ranks)) > 1 else None
    return family(
        of,
        lora(of, config, NOTHING, start=cut, final=final, remember=remember, unbatchable=why, varies=why is not None),
        only_products(weighted_mean(config.weighting), of.layers, config.alpha),
        begin=lambda seed: of.A(seed, 0) | of.B(seed) | of.head(seed),
        finish=finish,
        sends="factors",
    )
