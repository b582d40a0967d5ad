"""Local training of low-rank adapters, for every member of LoRA's family.

    h = (W₀ + ΔW + s B A) x        s = α/r

What a client trains is the channel "params" of the broadcast (B alone, A and B, A alone, R), by ``clients.sgd``.
Everything else is a constant, and a client gets it in one of two ways: from a seed, which is broadcast as 8 bytes (the
channel "seed"), so that neither the frozen base nor a shared A ever travels; or, where the server changes it, as a
channel of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field

from clients.sgd import Carry, Descent, SgdConfig, sgd, train_metrics
from fedsim import Done, Local, Pass, Payload, Task, Tree, tree
from fedsim.rng import Key
from fedsim.tasks import adapters
from fedsim.tasks.adapters import Layer, Start

NOTHING: Callable[[Payload], Tree] = lambda shared: {}  # noqa: E731


class LoraConfig(SgdConfig):
    """What every strategy with adapters is told."""

    rank: int = Field(8, ge=1, le=4096, description="r")
    alpha: float = Field(8.0, gt=0, description="α; the scale is s = α/r")
    targets: list[str] = Field(
        default_factory=list,
        description="names of linear layers; none given: query and value, or without attention all but the head",
    )
    start: Start = Field("kaiming", description="A before training; B is 0")
    head: Literal["frozen", "train"] = Field("frozen", description="whether the last linear layer is trained and sent")


@dataclass(frozen=True)
class Adapters:
    """Where a task is adapted, and its constants, which follow from a seed and are made once in a process.

    base:    (seed) -> all parameters of the task, frozen
    A:       (seed, number of the draw: 0 unless A is drawn anew) -> A of every layer
    B, head: (seed) -> what these start with; B is 0, and ``head`` is {} where it is frozen
    """

    task: Task  # the one that strategies evaluate; under privacy it has no loss
    layers: tuple[Layer, ...]
    alpha: float
    base: Callable[[int], Tree]
    A: Callable[[int, int], Tree]
    B: Callable[[int], Tree]
    head: Callable[[int], Tree]

    def of(self, seed: int, fixed: Tree, start: Tree, change: Tree) -> Task:
        """The task of training ``start`` beside ``fixed``, on W₀ + ``change``; as private as the run is."""
        bare = self.task.private.bare if self.task.private else self.task
        task = adapters.adapted(bare, self.layers, self.alpha, self._changed(seed, change), fixed, start)
        return self.task.private.around(task) if self.task.private else task

    def merged(self, seed: int, factors: Tree, change: Tree | None = None) -> Tree:
        """The parameters of the task with the adapters in them: the model that is evaluated."""
        return adapters.merged(self.layers, self.alpha, self._changed(seed, change or {}), factors)

    def _changed(self, seed: int, change: Tree) -> Tree:
        """All parameters, W₀ + ``change`` among them, where the change is."""
        base = self.base(seed)
        if not change:
            return base
        return base | tree.add(tree.resident({name: base[name] for name in change}, tree.device(change)), change)


def prepare(config: LoraConfig, task: Task) -> Adapters:
    """Raises ``ConfigError`` where the model has no such layers."""
    bare = task.private.bare if task.private else task
    layers, head = adapters.targets(bare, config.targets)

    @lru_cache(maxsize=1)
    def base(seed: int) -> Tree:
        with tree.constants():
            return bare.init(Key.root(seed).at("adapters", "base").torch())

    def B(seed: int) -> Tree:
        return {layer.B: base(seed)[layer.weight].new_zeros(layer.rows, config.rank) for layer in layers}

    def trained(seed: int) -> Tree:
        return {name: base(seed)[name] for name in head} if config.head == "train" else {}

    @lru_cache(maxsize=2)
    def A(seed: int, draw: int) -> Tree:
        key = Key.root(seed).at("adapters", "A", draw)
        with tree.constants():
            return {
                layer.A: adapters.start_A(layer, config.rank, config.start, key, base(seed)[layer.weight])
                for layer in layers
            }

    return Adapters(task, layers, config.alpha, base, A, B, trained)


def new_seed(generator: torch.Generator) -> int:
    """The seed that names a run's constants, from the stream that a strategy's state begins with."""
    return int(torch.randint(1 << 62, (), generator=generator, device=generator.device))


def seed_channel(seed: int) -> Tree:
    """What is broadcast in the place of constants: 8 bytes."""
    return {"seed": torch.tensor(seed, dtype=torch.int64)}


def seed_of(shared: Payload) -> int:
    return int(shared["seed"]["seed"])


def lora(
    of: Adapters,
    config: LoraConfig,
    fixed: Callable[[Payload], Tree],
    change: Callable[[Payload], Tree] = NOTHING,
    start: Callable[[Payload, Payload], Tree] = lambda shared, memory: shared["params"],
    final: Callable[[Payload, Carry], Done] | None = None,
    remember: Callable[[Payload, torch.Generator], Payload] | None = None,
    template: Callable[[Payload], Tree] = lambda shared: shared["params"],
    unbatchable: str | None = None,
    varies: bool = False,
) -> Local:
    """Local steps on the adapters. Of the broadcast: ``fixed`` gives the factors that are not trained, ``change`` what
    W₀ has become, ``template`` tensors of the trained ones' names and shapes. The rest is as for ``clients.sgd.sgd``.
    """

    def task(shared: Payload) -> Task:
        return of.of(seed_of(shared), fixed(shared), template(shared), change(shared))

    def gradient(shared: Payload, c: Carry, batch: Any, draw: Any) -> tuple[Tree, Carry]:
        step = sgd(task(shared), config).passes[0].step
        assert isinstance(step, Descent)
        return step.gradient(shared, c, batch, draw)

    def draw(shared: Payload, generator: torch.Generator) -> Any:
        private = task(shared).private
        assert private
        return private.draw(generator)

    plain = sgd(of.task, config, final=final, remember=remember, start=start)
    (only,) = plain.passes
    assert isinstance(only.step, Descent)
    passes = (Pass(Descent(gradient, only.step.move), only.schedule),)
    return plain._replace(
        passes=passes,
        draw=draw if of.task.private else None,
        unbatchable=unbatchable or plain.unbatchable,
        model=lambda shared, c: of.merged(seed_of(shared), fixed(shared) | c.params, change(shared)),
        varies=varies,
    )


def send_factors(shared: Payload, c: Carry) -> Done:
    """A_k and B_k themselves, for a server that forms their product."""
    return Done({"factors": c.params}, {}, train_metrics(c))
