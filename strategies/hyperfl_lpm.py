"""HyperFL-LPM (Guo et al. 2025, AAAI, arXiv:2412.07187, section 4.3): HyperFL for large pre-trained models.

    the backbone W₀ is frozen and everybody's; client i keeps v_i and the classifier ϕ_i
    θ_i = h(v_i; φ) are adapters, here low-rank ones:   W = W₀ + s B A,   θ = all A and B,   s = α/r
    two passes, what is sent and what the server does are those of ``strategies.hyperfl``

W₀ is the task's own: ``model = "text"`` has a pre-trained transformer. It is known to all, and never travels. With
parametrization "mip" the adapters start at θ⁰, with B = 0: the backbone as it was; "default" starts somewhere.

Differs from the paper: there, adapters are bottlenecks behind each block (ReLU between, a norm after) of a ViT or a
ResNet; here they are LoRA's. One such bottleneck behind the last block is the task "bottleneck": with it the strategy
``hyperfl`` is HyperFL-LPM, and the frozen model is run once for each example (experiments/hyperfl/lpm).
"""

from typing import Any

import torch
from pydantic import Field

from fedsim import Payload, Strategy, Task, Tree, tree
from fedsim.rng import Key
from fedsim.tasks import adapters
from strategies import hyperfl
from strategies.hyperfl import State


class Config(hyperfl.Config):
    name: str = "hyperfl_lpm"
    adapter_rank: int = Field(8, ge=1, le=4096, description="r, of the adapters")
    alpha: float = Field(8.0, gt=0, description="α; the scale is s = α/r")
    targets: list[str] = Field(
        default_factory=list,
        description="names of linear layers; none given: query and value, or without attention all but the head",
    )


def build(config: Config, task: Task) -> Strategy[State]:
    bare = task.private.bare if task.private else task
    layers, head = adapters.targets(bare, config.targets)
    with tree.constants():
        base = bare.init(Key.root(0).at("backbone").torch())

    def start(generator: torch.Generator) -> Tree:
        """Adapters and a head of whoever draws them."""
        key = Key.root(int(torch.randint(1 << 62, (), generator=generator, device=generator.device)))
        factors: Tree = {}
        for layer in layers:
            W0 = base[layer.weight]
            factors[layer.A] = adapters.start_A(layer, config.adapter_rank, "kaiming", key, W0)
            factors[layer.B] = W0.new_zeros(layer.rows, config.adapter_rank)
        own = bare.init(generator)
        return factors | {name: own[name] for name in head}

    shape = start(Key.root(0).torch())
    small = adapters.adapted(bare, layers, config.alpha, base, {}, shape)._replace(init=start)
    inner = hyperfl.build(config, task.private.around(small) if task.private else small)
    personal, phase = inner.personal, inner.phases[0]
    model = phase.local.model
    assert personal and model

    def whole(factors: Tree) -> Tree:
        return adapters.merged(layers, config.alpha, base, factors)

    def of_client(shared: Payload, memory: Payload) -> Tree:
        return whole(personal(shared, memory))

    def working(shared: Payload, carry: Any) -> Tree:
        return whole(model(shared, carry))

    return inner._replace(personal=of_client, phases=(phase._replace(local=phase.local._replace(model=working)),))
