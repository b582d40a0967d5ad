"""FedKSeed (Qin et al. 2023, arXiv:2312.06353): zeroth-order steps that travel as seeds and scalars.

    z_k = N(0, I) drawn from the k-th of K seeds that everybody knows
    the model is         w = w₀ − η Σ_k a_k z_k                  (w₀: drawn from a seed too; a = 0 at first)
    client i, T steps:   draw k,  ρ ← [f_i(w + λ z_k) − f_i(w − λ z_k)]/2λ,  w ← w − η ρ z_k
    sends                the T pairs (k, ρ)
    server               a_k ← a_k + mean_i Σ_t [k_t = k] ρ_t

The estimate is MeZO's (Malladi et al. 2023, arXiv:2305.17333); seeds for vectors is also the idea of DeComFL (Li et al.
2024, arXiv:2405.15861). Up go 8 T bytes and down 8 + 4 K, whatever the model's size. Everybody rebuilds w from a in the
same way, whenever it comes: a late joiner has the same bits. K models are drawn to do so.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedsim import Batch, Done, Local, Pass, Payload, Phase, Reducer, Report, Schedule, Strategy, Task, Tree, tree
from fedsim.config import StrategyConfig
from fedsim.rng import Key


class Config(StrategyConfig):
    name: str = "fedkseed"
    lr: float = Field(0.01, gt=0, description="η")
    steps: int = Field(10, ge=1, description="T, local steps; two queries each")
    seeds: int = Field(64, ge=1, le=1 << 16, description="K, directions that there are")
    smoothing: float = Field(1e-3, gt=0, description="λ")
    batch_size: int = Field(32, ge=1, description="examples that both queries of a step see")


class State(NamedTuple):
    seed: Tensor  # int64 ()
    a: Tensor  # (K,) float32
    queries: int


class Sum(NamedTuple):
    a: Tensor  # (K,) float64
    metrics: dict[str, float]
    clients: int
    examples: int


class Carry(NamedTuple):
    w: Tree
    k: Tensor  # (T,) int32; what was drawn
    rho: Tensor  # (T,) float32; what came out
    t: Tensor  # ()


def direction(seed: int, k: int, like: Tree) -> Tree:
    """z_k, named as ``like``."""
    g = Key.root(seed).at("direction", k).wide()
    return tree.map(lambda p: torch.randn(p.shape, generator=g, dtype=torch.float32).to(p), like)


def replay(config: Config, task: Task, seed: Tensor, a: Tensor) -> Tree:
    """w, from the seed and the scalars alone. Directions that were never taken are not drawn."""
    w = task.init(Key.root(int(seed)).at("model").torch())
    for k, scalar in enumerate(a.tolist()):
        if scalar:
            w = tree.axpy(-config.lr * scalar, direction(int(seed), k, w), w)
    return w


def build(config: Config, task: Task) -> Strategy[State]:
    @lru_cache(maxsize=1)
    def rebuilt(seed: int, a: tuple[float, ...]) -> Tree:  # all clients of a round rebuild the same model
        return replay(config, task, torch.tensor(seed), torch.tensor(a))

    def model(seed: Tensor, a: Tensor) -> Tree:
        return rebuilt(int(seed), tuple(a.tolist()))

    def init(generator: torch.Generator) -> State:
        return State(torch.randint(1 << 62, (), generator=generator), torch.zeros(config.seeds), 0)

    def start(shared: Payload, memory: Payload, visit: Any) -> Carry:
        w = {name: x.to(visit.examples.device) for name, x in model(**shared["replay"]).items()}
        none = torch.zeros(config.steps)
        return Carry(w, none.int(), none, torch.zeros((), dtype=torch.int64))

    def draw(shared: Payload, generator: torch.Generator) -> Tensor:
        return torch.randint(config.seeds, (), generator=generator, device=generator.device)

    def step(shared: Payload, c: Carry, batch: Batch, k: Tensor) -> Carry:
        z = direction(int(shared["replay"]["seed"]), int(k), c.w)
        ahead, behind = (task.loss(tree.axpy(s * config.smoothing, z, c.w), batch) for s in (1, -1))
        rho = ((ahead - behind) / (2 * config.smoothing)).detach().float().cpu()
        w = tree.axpy(-config.lr * float(rho), z, c.w)
        return Carry(w, c.k.index_put((c.t,), k.int().cpu()), c.rho.index_put((c.t,), rho), c.t + 1)

    def final(shared: Payload, c: Carry) -> Done:
        # A client without examples made no step, and sends scalars of 0.
        return Done({"steps": {"k": c.k, "rho": c.rho}}, {}, {"queries": 2.0 * c.t})

    def lift(report: Report) -> Sum:
        sent = report.value["steps"]
        a = torch.zeros(config.seeds, dtype=torch.float64).index_add(
            0, sent["k"].long().cpu(), sent["rho"].double().cpu()
        )
        return Sum(a, report.metrics, 1, report.examples)

    def merge(x: Sum, y: Sum) -> Sum:
        metrics = {name: value + y.metrics[name] for name, value in x.metrics.items()}
        return Sum(x.a + y.a, metrics, x.clients + y.clients, x.examples + y.examples)

    def finish(state: State, total: Sum) -> State:
        a = state.a + (total.a / total.clients).float()
        return State(state.seed, a, state.queries + round(total.metrics["queries"]))

    why = "directions are drawn from seeds, one client at a time"
    local = Local(start, (Pass(step, Schedule(config.batch_size, steps=config.steps)),), final, None, draw, why)
    phase: Phase[State] = Phase(
        lambda state: {"replay": {"seed": state.seed, "a": state.a}}, local, Reducer(lift, merge, lambda s: s), finish
    )
    return Strategy(
        init,
        (phase,),
        lambda state: model(state.seed, state.a),
        (frozenset({"steps"}),),
        gauges=lambda state: {"queries": state.queries},
    )
