"""HyperFL (Guo et al. 2025, AAAI, arXiv:2412.07187): clients share a hypernetwork, and keep what it is asked with.

    client i keeps an embedding v_i ~ N(0, 1)^64 and a classifier ϕ_i, both drawn by itself; the server has φ
    θ_i = h(v_i; φ),   ŷ = g(f(x; θ_i); ϕ_i),   min over φ, {v_i, ϕ_i} of Σ_i (n_i/n) F_i(θ_i, ϕ_i)

    client i   ϕ_i      ← SGD on F_i over ϕ alone, θ_i = h(v_i; φ) held fixed                  (1 epoch)
               φ_i, v_i ← SGD on F_i(h(v; φ), ϕ_i) over φ and v, ϕ_i held fixed                (E epochs)
                          ‖∂F/∂φ‖ and ‖∂F/∂v‖ each clipped to 50
    sends      φ_i − φ, and nothing else
    server     φ ← φ + Σ p_k (φ_k − φ) / Σ p_k

There is no global model. What is measured is each client's h(v_i; φ) with ϕ_i, generated anew from the φ received.
Parametrization "mip" and the heads "lowrank" and "kronecker" are described in ``clients.hypernet``.

This is not a privacy mechanism, and no guarantee is claimed: one gradient of φ gives θ_i and ∂F_i/∂θ_i exactly
(docs/leakage.md). A config with one step or one epoch is refused unless ``allow_single_step`` says so.

Differs from the authors' code: embeddings and classifiers are drawn at the clients (there, all start as one copy of the
server's, which is ``common_start`` here), and weights are generated anew before evaluation (there, they are one step
old).
"""

from typing import ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator

from clients import alternate
from clients.alternate import AlternateConfig, Carry, clipped, private_names, take, train_metrics
from clients.hypernet import Form, Parametrization, hypernet
from fedsim import Done, Mean, Payload, Phase, Strategy, Task, Tree, tree
from server.reduce import weighted_mean


class Config(AlternateConfig):
    USUAL: ClassVar[int] = 5

    name: str = "hyperfl"
    lr: float = Field(0.02, gt=0, description="η, the step size of φ and v")
    momentum: float = Field(0.5, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    epochs: int | None = Field(None, ge=1, description="E, passes that train φ and v; 5 where nothing is said")
    batch_size: int = Field(50, ge=1)
    clip: float = Field(50.0, gt=0, description="the norm that the gradients of φ and of v are clipped to")
    embedding: int = Field(64, ge=1, le=1 << 16, description="numbers in v")
    hidden: int = Field(128, ge=1, le=1 << 16, description="units of the hypernetwork's hidden layer")
    parametrization: Parametrization = Field("default", description="mip: magnitude-invariant")
    head: Form = Field("dense", description="how the hypernetwork's output layers are factored")
    rank: int = Field(8, ge=1, description="of head 'lowrank'")
    common_start: bool = Field(False, description="v and the classifier start as one copy, which the server sends")
    allow_single_step: bool = Field(False, description="send a single gradient of φ, which gives θ away")

    @model_validator(mode="after")
    def _many_steps(self) -> "Config":
        if not self.allow_single_step and 1 in (self.epochs, self.steps):
            key = "epochs" if self.epochs == 1 else "steps"
            raise ValueError(
                f"{key}: must be at least 2 (got 1): a single gradient of φ gives θ away; allow_single_step = true if"
                " that is meant"
            )
        return self


class State(NamedTuple):
    """``start`` is what all clients start from besides; {} where each draws its own."""

    phi: Tree
    start: Tree


def build(config: Config, task: Task) -> Strategy[State]:
    shapes = alternate.shapes(task)
    head = private_names(shapes, config.private)
    body = {name: shape for name, shape in shapes.items() if name not in head}
    net = hypernet(body, config.embedding, (config.hidden,), config.parametrization, config.head, config.rank)

    def init(generator: torch.Generator) -> State:
        phi = net.init(generator, task.init(generator))
        return State(phi, draw(generator) if config.common_start else {})

    def draw(generator: torch.Generator) -> Tree:
        own = take(task.init(generator), head)
        like = next(iter(own.values()))
        v = torch.randn(config.embedding, generator=generator, device=generator.device)
        return {"v": v.to(like.dtype)} | own

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        own = shared["start"] if config.common_start else draw(generator)
        return {"embed": take(own, ["v"]), "head": take(own, head)}

    def broadcast(state: State) -> Payload:
        return {"hyper": state.phi} | ({"start": state.start} if config.common_start else {})

    def start(shared: Payload, memory: Payload) -> Tree:
        return shared["hyper"] | memory["embed"]

    def generate(outer: Tree) -> Tree:
        return net.generate(outer, outer["v"])

    def clip(g: Tree) -> Tree:
        return clipped(g, ([name for name in g if name != "v"], ["v"]), config.clip)

    def final(shared: Payload, c: Carry) -> Done:
        delta = tree.sub(take(c.outer, shared["hyper"]), shared["hyper"])
        return Done({"delta": delta}, {"embed": take(c.outer, ["v"]), "head": c.head}, train_metrics(c))

    def finish(state: State, mean: Mean) -> State:
        return state._replace(phi=tree.add(state.phi, mean.value["delta"]))

    def personal(shared: Payload, memory: Payload) -> Tree:
        own = net.generate(shared["hyper"], memory["embed"]["v"]) | memory["head"]
        return take(own, shapes)

    local = alternate.alternate(task, config, start, generate, final, remember, clip)
    phase = Phase(broadcast, local, weighted_mean(config.weighting), finish)
    return Strategy(init, (phase,), lambda state: state.phi, (frozenset({"delta"}),), personal, is_global=False)
