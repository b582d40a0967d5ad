"""An ``nn.Module`` as a ``Task``: pure functions of named parameters.

Parameters are named as ``module.named_parameters()`` names them. Those with ``requires_grad=False`` and all buffers
are constants of the task: they are drawn from one fixed stream, so that every worker and every run has the same ones,
and they are not in the tree and do not travel.

Randomness. Modules are initialised, and dropout is drawn, by PyTorch's global generator. ``seeded`` lends it out: inside, it
is seeded from a named stream; afterwards it is as it was. ``init`` does so by itself. A model with dropout says so in
``unbatchable``, hence its clients run one by one, and whoever runs one wraps the visit in ``seeded(generator)`` with the
client's own stream. ``loss`` is the model in training mode (dropout on), ``predict`` and ``score`` in evaluation mode.
"""

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.autodiff import value_and_grad
from fedsim.errors import ConfigError
from fedsim.rng import Key
from fedsim.types import Batch, Metrics, Task, Tree


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Inside, the global generators (PyTorch's, Python's, NumPy's) start from ``generator``; outside, nothing changes.

    Costs about 20 µs on a CPU. The global generators belong to the process: one thread at a time.
    """
    device = generator.device
    seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # torch.manual_seed would also seed the accelerators that are not forked here.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % (1 << 32))  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def from_module(
    make: Callable[[], nn.Module], classes: int, population: int, dtype: torch.dtype, example: tuple[Tensor, Tensor]
) -> Task:
    """The task of training the model that ``make`` returns.

    ``make`` is called once now and once for each ``init``, under ``seeded``. ``example`` is a batch (x, y) of a few
    examples: x (N, …) -> logits (N, classes) for labels y (N,), or (N, T, classes) for labels (N, T). The model is
    tried on the first of them, so that what cannot work is said before anything runs. float64 parameters are the
    float32 ones, converted: both dtypes start from the same point.

    Raises ``ConfigError``: not an ``nn.Module``, no trainable parameter, layers that keep statistics or change their
    buffers, logits of the wrong shape, or any exception of the model's own.
    """
    with seeded(Key.root(0).at("task", "constants").torch()):
        prototype = _checked(make()).to(dtype)
    names = [name for name, p in prototype.named_parameters() if p.requires_grad]
    call = _Functional(prototype, names)

    def init(generator: torch.Generator) -> Tree:
        with seeded(generator):
            fresh = {name: p for name, p in make().named_parameters() if p.requires_grad}
        if list(fresh) != names:
            raise ConfigError(f"task.model: other parameters at each call ({sorted(set(names) ^ set(fresh))})")
        # A copy, since a module may share its memory with something else (tied or cached tensors).
        return {name: p.detach().to(generator.device, dtype, copy=True) for name, p in fresh.items()}

    def predict(params: Tree, x: Tensor) -> Tensor:
        return call(params, x, training=False)

    def loss(params: Tree, batch: Batch) -> Tensor:
        return cross_entropy(call(params, batch.x, training=True), batch)

    def score(params: Tree, batch: Batch) -> Metrics:
        return scores(predict(params, batch.x), batch)

    tiny = Batch(_float(example[0][:1], dtype), example[1][:1])
    start = {name: p.detach() for name, p in prototype.named_parameters() if name in names}
    _try(prototype, predict, loss, start, tiny, classes)
    return Task(init, predict, loss, score, classes, population, _unbatchable(loss, start, tiny))


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The weighted mean over examples (for sequences, of the mean over their tokens), shape ().

    logits (N, C) and y (N,), or logits (N, T, C) and y (N, T). A batch of padding alone has loss 0 and gradient 0.
    """
    if batch.weight is None:
        return F.cross_entropy(logits.flatten(0, -2), batch.y.flatten())
    each = F.cross_entropy(logits.flatten(0, -2), batch.y.flatten(), reduction="none")
    if batch.y.ndim > 1:
        each = each.view(batch.y.shape).flatten(1).mean(1)
    weight = batch.weight.to(each.dtype)
    return (weight * each).sum() / weight.sum().clamp_min(torch.finfo(each.dtype).tiny)


def scores(logits: Tensor, batch: Batch) -> Metrics:
    """Sums over the batch's predictions (tokens, for sequences), each of shape (): count, correct, loss."""
    each = F.cross_entropy(logits.flatten(0, -2), batch.y.flatten(), reduction="none").view(batch.y.shape)
    right = (logits.argmax(-1) == batch.y).to(each.dtype)
    weight = torch.ones_like(each)
    if batch.weight is not None:
        weight = batch.weight.to(each.dtype).view(-1, *[1] * (each.ndim - 1)).expand_as(each)
    return {"count": weight.sum(), "correct": (weight * right).sum(), "loss": (weight * each).sum()}


class _Functional:
    """Calls a module with given parameters, as ``torch.func.functional_call`` does, at a fraction of its overhead.

    Each thread has a copy of the module, since a call puts the parameters into it for as long as it runs.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self._prototype, self._names, self._threads = module, names, threading.local()

    def __call__(self, params: Tree, x: Tensor, training: bool) -> Tensor:
        if params.keys() != self._keys:
            raise ValueError
        ...
