"""DP-SGD (Abadi et al. 2016, arXiv:1607.00133), Algorithm 1: example-level privacy at each client.

    batch   each of the client's n examples on its own with probability q = min(1, B/n)
    g_i     ∇F(w; i) · min(1, C/‖∇F(w; i)‖)            the norm over all trainable tensors jointly
    g       (Σ g_i + N(0, (σ C)² I)) / min(B, n)       a fixed denominator; an empty batch is noised too

A task so wrapped gives ``clients.sgd`` its gradients; momentum, Adam, weight decay, FedProx's pull and SCAFFOLD's
control variates come after the noise, and are post-processing. The wrapped task has no loss and no prediction to be
called with: a local update that asks for one would look at examples without noise, and is refused.

Two ways to the same numbers:

    batched   ``torch.vmap`` over a batch's examples, inside the engine's ``vmap`` over clients; for the networks
              of ``fedsim.lower`` its own, which makes no gradient of an example by a linear layer
    opacus    Opacus's GradSampleModule and DPOptimizer on the task's nn.Module, one client at a time: for models that
              cannot be batched (nn.LSTM becomes Opacus's DPLSTM, with the same parameters)

The factor is C/(‖g_i‖ + 10⁻⁶), at most 1, as in Opacus. Noise is added in the model's dtype, as Opacus does: the
argument for float64 (see ``server.wrap``) is about what is published, and here that is a client's update after many
steps. The only file at the clients that imports opacus.
"""

import threading
import warnings
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedsim import tree
from fedsim.autodiff import value_and_grad
from fedsim.errors import ConfigError
from fedsim.lower import Chain
from fedsim.rng import Key
from fedsim.tasks.module import cross_entropy, seeded
from fedsim.types import Batch, Private, Task, Tree

Way = Literal["batched", "opacus"]
TINY = 1e-6  # Opacus's


def way(task: Task, asked: Literal["auto", "batched", "opacus"]) -> Way:
    """How this task's gradients are had. Raises ``ConfigError`` where it cannot be had as asked."""
    if asked == "batched" and task.unbatchable is not None:
        raise ConfigError(f"privacy.grad_sample: 'batched' cannot be used for this model: {task.unbatchable}")
    chosen: Way = "batched" if asked == "batched" or (asked == "auto" and task.unbatchable is None) else "opacus"
    if chosen == "opacus":
        if task.module is None:
            raise ConfigError("privacy.grad_sample: 'opacus' needs a task that was made from an nn.Module")
        opacus_module(task)
    return chosen


def private(
    task: Task, sigma: float, clip: float, batch_size: int, asked: Literal["auto", "batched", "opacus"]
) -> Task:
    """The task under example-level privacy: σ, C, and B, the expected size of a batch."""
    chosen = way(task, asked)
    shapes = {name: (x.shape, x.dtype) for name, x in task.init(Key.root(0).at("template").torch()).items()}

    def draw(generator: torch.Generator) -> Tree:
        at = generator.device
        return {n: torch.randn(s, generator=generator, dtype=dtype, device=at) for n, (s, dtype) in shapes.items()}

    def gradient(params: Tree, batch: Batch, noise: Tree, examples: Tensor) -> Tree:
        total = clipped_sum(task, params, batch, clip) if len(batch.y) else tree.zeros(params)
        return averaged(noised(total, noise, sigma * clip), batch_size, examples)

    def by_opacus(params: Tree, batch: Batch, generator: torch.Generator, examples: Tensor) -> Tree:
        return averaged(opacus_sum(task, params, batch, clip, sigma, generator), batch_size, examples)

    def around(other: Task) -> Task:
        return private(other, sigma, clip, batch_size, asked)

    def refuse(*_: Any) -> Any:
        raise ConfigError(
            "privacy.mode: 'example' needs a strategy whose clients only take the gradients of clients.sgd; this one "
            "looks at examples in a way of its own, and that would have no noise"
        )

    if chosen == "opacus":
        why = task.unbatchable or "gradients of examples by Opacus's hooks"
        return task._replace(
            predict=refuse,
            loss=refuse,
            score=refuse,
            unbatchable=why,
            private=Private(by_opacus, lambda generator: generator, around, task),
        )
    return task._replace(predict=refuse, loss=refuse, score=refuse, private=Private(gradient, draw, around, task))


def clipped_sum(task: Task, params: Tree, batch: Batch, clip: float) -> Tree:
    """Σ g_i over the examples of a batch; padding (weight 0) adds nothing."""
    chain: Chain | None = getattr(task.loss, "chain", None)
    if chain is not None:
        return chain.clipped_sum(params, batch, clip)
    loss_and_grad = value_and_grad(task.loss)

    def of_example(x: Tensor, y: Tensor) -> Tree:
        return loss_and_grad(params, Batch(x[None], y[None]))[1]

    grads = torch.vmap(of_example)(batch.x, batch.y)
    size = norms(grads)
    scale = factors(size, clip)
    if batch.weight is not None:
        scale = scale * (batch.weight > 0)
    fine = size.isfinite()
    return {name: weighted(torch.where(_like(fine, g), g, 0.0), scale) for name, g in grads.items()}


def norms(grads: Tree) -> Tensor:
    """‖g_i‖ over all tensors jointly, shape (B,)."""
    return torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def factors(size: Tensor, clip: float) -> Tensor:
    """min(1, C/‖g_i‖), and 0 for a gradient without a finite norm, which cannot be bounded."""
    return torch.where(size.isfinite(), (clip / (size + TINY)).clamp(max=1.0), 0.0)


def weighted(g: Tensor, scale: Tensor) -> Tensor:
    """Σ scale_i g_i, with the shape of one example's g."""
    return (scale @ g.flatten(1)).view(g.shape[1:])


def _like(flags: Tensor, g: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (g.ndim - 1))


def noised(total: Tree, noise: Tree, deviation: float) -> Tree:
    """Σ g_i + N(0, deviation² I), of which ``noise`` is the standard draw."""
    return tree.map(lambda g, z: torch.add(g, z, alpha=deviation), total, noise)


def averaged(total: Tree, batch_size: int, examples: Tensor) -> Tree:
    """Over the expected number of examples, q n = min(B, n): never over the number that was drawn."""
    expected = examples.clamp(max=batch_size)
    return tree.map(lambda g: g / expected.to(g.dtype), total)


class _Wrapped:
    """A module under Opacus's hooks, its optimizer, and its parameters by the task's names."""

    def __init__(self, task: Task, device: torch.device) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        module = opacus_module(task).to(device)
        # Opacus's recurrent layers rename their parameters; their state_dict keeps the names of torch's.
        tensors = module.state_dict(keep_vars=True)
        names = task.init(Key.root(0).at("template").torch())
        self.params = {name: cast(nn.Parameter, tensors[name]) for name in names}
        if {id(p) for p in self.params.values()} != {id(p) for p in module.parameters() if p.requires_grad}:
            raise ConfigError("privacy.grad_sample: 'opacus' replaced a layer by one with other parameters")
        self.module = GradSampleModule(module, batch_first=True, loss_reduction="sum")
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.params.values(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self.checked = False

    def check(self, batch: Batch) -> None:
        """Once, on the first batch of two: what an example's logits are must not depend on the others in its batch."""
        if self.checked or len(batch.y) < 2:
            return
        module = self.module.eval()
        with torch.no_grad():
            alone, together = module(batch.x[:1]), module(batch.x)[:1]
        module.train()
        if not torch.allclose(alone, together, rtol=1e-3, atol=1e-4):
            raise ConfigError(
                "privacy.grad_sample: the model mixes the examples of a batch; they have no gradients alone"
            )
        self.checked = True


_wrapped = threading.local()


def opacus_module(task: Task) -> nn.Module:
    """The task's module with layers that Opacus has rules for. Raises ``ConfigError`` naming a layer that has none."""
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    assert task.module is not None
    with seeded(Key.root(0).at("template").torch()):
        module: nn.Module = task.module()
        try:
            if ModuleValidator.validate(module):
                module = ModuleValidator.fix(module)
            problems = [*ModuleValidator.validate(module), *GradSampleModule.validate(module)]
        except Exception as e:  # what Opacus makes of a stranger's module is not foreseeable
            problems = [e]
    if problems:
        first = str(problems[0]).partition("\n")[0][:200]
        named = [f"layer '{name}' ({type(part).__name__})" for name, part in module.named_modules() if name]
        layer = next((text for text in named if text.partition("(")[2][:-1] in first), "the model")
        raise ConfigError(f"privacy.grad_sample: {layer} has no gradients of single examples in Opacus: {first}")
    return module.train()


def opacus_sum(task: Task, params: Tree, batch: Batch, clip: float, sigma: float, generator: torch.Generator) -> Tree:
    """Σ g_i + N(0, (σ C)² I), clipped and noised by Opacus's own optimizer."""
    kept: dict[Any, tuple[Task, _Wrapped]] = getattr(_wrapped, "of", {})
    _wrapped.of = kept
    of = id(task), batch.x.device
    if of not in kept:
        kept.clear()
        kept[of] = task, _Wrapped(task, batch.x.device)
    wrapped = kept[of][1]
    with torch.no_grad():
        for name, p in wrapped.params.items():
            p.copy_(params[name])
    optimizer = wrapped.optimizer
    optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.generator = sigma, clip, generator
    optimizer.zero_grad(set_to_none=True)
    wrapped.check(batch)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hooks fire though no input requires a gradient: that is what we want
        if n := len(batch.y):
            logits = wrapped.module(batch.x)
            (cross_entropy(logits, batch) * n).backward()  # type: ignore[no-untyped-call]
        else:
            for p in wrapped.params.values():
                p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
    _drop_unbounded(list(wrapped.params.values()))
    optimizer.pre_step()
    return {name: _taken(p) for name, p in wrapped.params.items()}


def _drop_unbounded(params: list[nn.Parameter]) -> None:
    """Zero the gradients of examples whose norm is not finite: Opacus would make NaN of the whole sum."""
    samples = [cast(Tensor, p.grad_sample) for p in params]  # type: ignore[attr-defined]
    bad = ~norms({str(i): g for i, g in enumerate(samples)}).isfinite()
    if bad.any():
        for g in samples:
            g[bad] = 0.0


def _taken(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad.detach().clone()
