"""pFedHN (Shamsian et al. 2021, arXiv:2103.04628), Algorithm 1: a hypernetwork generates every client's whole model.

    θ_i = h(v_i; φ),   client i takes K local SGD steps from θ_i to θ̃_i,   Δθ_i = θ̃_i − θ_i
    φ   ← φ + α Σ p_k (∂θ_k/∂φ)ᵀ Δθ_k / Σ p_k,     v_i ← v_i + α (∂θ_i/∂v_i)ᵀ Δθ_i

In the paper the server holds h and every v_i, takes one client a round, and sends θ_i. Here a broadcast is the same for
a whole cohort, so h travels, client i keeps v_i, and pulls Δθ_i back through h before it sends. The iterates are those
of the paper (for one client a round); the bytes are what travels here, |φ| each way instead of |θ|.
"""

from typing import NamedTuple

import torch
from pydantic import Field

from clients.alternate import shapes
from clients.hypernet import Form, Parametrization, hypernet
from clients.sgd import Carry, SgdConfig, sgd, train_metrics
from fedsim import Done, Mean, Payload, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(SgdConfig):
    name: str = "pfedhn"
    server_lr: float = Field(0.05, gt=0, description="α; a step of φ moves θ about 1 + ‖a‖² times as far")
    embedding: int = Field(64, ge=1, le=1 << 16, description="numbers in v")
    hidden: int = Field(128, ge=1, le=1 << 16, description="units of the hypernetwork's hidden layer")
    parametrization: Parametrization = Field("default", description="see clients.hypernet")
    head: Form = Field("dense", description="how the hypernetwork's output layers are factored")
    rank: int = Field(8, ge=1, description="of head 'lowrank'")


class State(NamedTuple):
    phi: Tree


def build(config: Config, task: Task) -> Strategy[State]:
    names = shapes(task)
    net = hypernet(names, config.embedding, (config.hidden,), config.parametrization, config.head, config.rank)

    def init(generator: torch.Generator) -> State:
        return State(net.init(generator, task.init(generator)))

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        v = torch.randn(config.embedding, generator=generator, device=generator.device)
        return {"embed": {"v": v.to(next(iter(shared["hyper"].values())).dtype)}}

    def start(shared: Payload, memory: Payload) -> Tree:
        return net.generate(shared["hyper"], memory["embed"]["v"])

    def final(shared: Payload, c: Carry) -> Done:
        v = c.memory["embed"]["v"]
        theta, pull, *_ = torch.func.vjp(net.generate, shared["hyper"], v)
        by_phi, by_v = pull(tree.sub(c.params, theta))
        memory = {"embed": {"v": v + config.server_lr * by_v}}
        return Done({"delta": by_phi}, memory, train_metrics(c))

    def finish(state: State, mean: Mean) -> State:
        return State(tree.axpy(config.server_lr, mean.value["delta"], state.phi))

    local = sgd(task, config, final=final, remember=remember, start=start)
    phase = Phase(lambda state: {"hyper": state.phi}, local, weighted_mean(config.weighting), finish)
    return Strategy(init, (phase,), lambda state: state.phi, (frozenset({"delta"}),), start, is_global=False)
