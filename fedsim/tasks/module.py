"""An ``nn.Module`` as a ``Task``: pure functions of named parameters.

Parameters are named as ``module.named_parameters()`` names them. Those with ``requires_grad=False`` and all buffers
are constants of the task: they are drawn from one fixed stream, so that every worker and every run has the same ones,
and they are not in the tree and do not travel.

Randomness. Modules are initialised, and dropout is drawn, by PyTorch's global generator. ``seeded`` lends it out:
inside, it is seeded from a named stream; afterwards it is as it was. ``init`` does so by itself. A model with dropout
says so in ``unbatchable``, hence its clients run one by one, and whoever runs one wraps the whole visit in
``seeded(generator)`` with that client's own stream. ``loss`` is the model in training mode (dropout on), ``predict``
and ``score`` are the model in evaluation mode.
"""

import copy
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedsim.autodiff import value_and_grad
from fedsim.config import TaskConfig
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.lower import Lowered, lower
from fedsim.rng import Key
from fedsim.types import Batch, Metrics, Task, Tree

Precision = Literal["float32", "bfloat16"]
Size = Annotated[int, Field(strict=True, ge=1, le=1 << 16)]  # a width that a config may ask for
_Slot = tuple[dict[str, Any], str, str]  # a submodule's dictionary of parameters, the key there, the parameter's name


class ModuleConfig(TaskConfig):
    """Base of the ``Config`` of a task that is made from an ``nn.Module``."""

    precision: Precision = Field(
        "float32", description="of products inside the model; parameters, sums and gradients stay in float32"
    )

    @model_validator(mode="after")
    def _of_float32(self) -> Self:
        if self.precision != "float32" and self.dtype != "float32":
            raise ValueError(f"precision: {self.precision} is for parameters of float32 (got dtype {self.dtype})")
        return self


def products(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, matrix products and convolutions are of this precision."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Inside, the global generators (PyTorch's, Python's, NumPy's) start from ``generator``; outside, nothing changes.

    Costs less than 0.1 ms on a CPU. The global generators belong to the process: one thread at a time.
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
    make: Callable[[], nn.Module],
    classes: int,
    population: int,
    dtype: torch.dtype,
    example: tuple[Tensor, Tensor],
    precision: Precision = "float32",
) -> Task:
    """The task of training the model that ``make`` returns.

    ``make`` is called once now and once for each ``init``, under ``seeded``. ``example`` is a batch (x, y) of a few
    examples: x (N, …) -> logits (N, classes) for labels y (N,), or (N, T, classes) for labels (N, T). The model is
    tried on the first of them, so that what cannot work is said before anything runs. float64 parameters are the
    float32 ones, converted: both dtypes start from the same point. ``precision`` bfloat16 is PyTorch's mixed precision:
    logits, losses, parameters and their gradients have ``dtype``, products are of operands rounded to 8 bits. Models
    are then not written out for blocks (fedsim/lower.py), whose point is a CPU's cache.

    Raises ``ConfigError``: not an ``nn.Module``, no trainable parameter, layers that keep statistics or change their
    buffers, logits of the wrong shape, or any exception of the model's own.
    """
    with seeded(_constants()):
        prototype = _checked(make()).to(dtype)
    call = _Functional(prototype, precision)
    names = call.names

    def init(generator: torch.Generator) -> Tree:
        with seeded(generator):
            fresh = {name: p for name, p in make().named_parameters() if p.requires_grad}
        if list(fresh) != names:
            raise ConfigError(f"task.model: has other parameters at each call: {sorted(set(names) ^ set(fresh))}")
        # A copy, since a module may share its memory with something else (tied or cached tensors).
        return {name: p.detach().to(generator.device, dtype, copy=True) for name, p in fresh.items()}

    def predict(params: Tree, x: Tensor) -> Tensor:
        return call(params, x, training=False)

    def loss(params: Tree, batch: Batch) -> Tensor:
        return cross_entropy(call(params, batch.x, training=True), batch)

    x, y = example[0][:1].cpu(), example[1][:1].cpu()
    tiny = Batch(x.to(dtype) if x.is_floating_point() else x, y)
    start = {name: p.detach() for name, p in prototype.named_parameters() if p.requires_grad}
    _try(call, predict, loss, start, tiny, classes)
    chain = lower(prototype, (tiny.x, tiny.y)) if precision == "float32" else None
    unbatchable = None if chain else _unbatchable(loss, start, tiny)  # layers that are known to be stackable
    fast = loss if chain is None else Lowered(loss, chain)
    return Task(init, predict, fast, _Score(predict), classes, population, unbatchable, lambda: make().to(dtype))


def from_dataset(make: Callable[[], nn.Module], config: TaskConfig, dataset: Dataset, population: int) -> Task:
    """``from_module`` with the data set's classes and its first training example."""
    first = dataset.train.x[:1], dataset.train.y[:1]
    precision = config.precision if isinstance(config, ModuleConfig) else "float32"
    return from_module(make, dataset.classes, population, getattr(torch, config.dtype), first, precision)


def features(dataset: Dataset) -> int:
    """The number of inputs of an example, flattened. Raises ``ConfigError`` where they are not floating numbers."""
    x = dataset.train.x
    if not x.is_floating_point():
        raise ConfigError(f"task.model: needs floating inputs, and {dataset.name} has {x.dtype}")
    return prod(x.shape[1:])


def image(dataset: Dataset) -> tuple[int, int, int]:
    """Channels, height and width. Raises ``ConfigError`` where an example is not (H, W) or (C, H, W)."""
    features(dataset)
    shape = tuple(dataset.train.x.shape[1:])
    if len(shape) not in (2, 3):
        raise ConfigError(
            f"task.model: needs images (H, W) or (C, H, W), and {dataset.name} has inputs of shape {shape}"
        )
    channels, height, width = (1, *shape)[-3:]
    return channels, height, width


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The weighted mean over examples (for sequences, of the mean over their tokens), shape ().

    logits (N, C) and y (N,), or logits (N, T, C) and y (N, T). A batch of padding alone has loss 0 and gradient 0.
    """
    if batch.weight is None:
        return F.cross_entropy(*_flat(logits, batch.y))
    each = F.cross_entropy(*_flat(logits, batch.y), reduction="none")
    if batch.y.ndim > 1:
        each = each.view(batch.y.shape).flatten(1).mean(1)
    weight = batch.weight.to(each.dtype)
    return (weight * each).sum() / weight.sum().clamp_min(torch.finfo(each.dtype).tiny)


def _flat(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (logits, y) if y.ndim == 1 else (logits.flatten(0, -2), y.flatten())


def scores(logits: Tensor, batch: Batch) -> Metrics:
    """Sums over the batch's predictions (tokens, for sequences), each of shape (): count, correct, loss."""
    each = F.cross_entropy(*_flat(logits, batch.y), reduction="none").view(batch.y.shape)
    right = (logits.argmax(-1) == batch.y).to(each.dtype)
    weight = torch.ones_like(each)
    if batch.weight is not None:
        weight = batch.weight.to(each.dtype).view(-1, *[1] * (each.ndim - 1)).expand_as(each)
    return {"count": weight.sum(), "correct": (weight * right).sum(), "loss": (weight * each).sum()}


class _Score:
    """``Task.score`` by ``scores``. ``of_logits`` spares central evaluation, which has the logits, a second pass."""

    of_logits = staticmethod(scores)

    def __init__(self, predict: Callable[[Tree, Tensor], Tensor]) -> None:
        self._predict = predict

    def __call__(self, params: Tree, batch: Batch) -> Metrics:
        return scores(self._predict(params, batch.x), batch)


class _Functional:
    """Calls a module with given parameters, as ``torch.func.functional_call`` does, at a fraction of its overhead.

    A call puts the parameters into the module for as long as it runs, so each thread has its own copy, one for each
    mode and device. A copy holds constants alone: where parameters belong there are placeholders without memory.
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self._precision = precision
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        prototype = copy.deepcopy(module)
        places = {
            name: nn.Parameter(torch.empty_like(module.get_parameter(name), device="meta")) for name in self.names
        }
        for parameters, key, name in _slots(prototype):
            parameters[key] = places[name]  # the same for tied parameters, which are thus still known to be tied
        self._prototype, self._copies = prototype, threading.local()

    def bound(self, device: torch.device, training: bool) -> tuple[nn.Module, list[_Slot]]:
        """This thread's copy on this device in this mode, and the places of its parameters."""
        key = f"{device}:{training}"
        found: tuple[nn.Module, list[_Slot]] | None = getattr(self._copies, key, None)
        if found is None:
            module = copy.deepcopy(self._prototype).train(training)
            for part in module.modules():
                for name, constant in part.named_parameters(recurse=False):
                    if not constant.requires_grad:
                        part._parameters[name] = nn.Parameter(constant.to(device), requires_grad=False)
                for name, buffer in part.named_buffers(recurse=False):
                    part._buffers[name] = buffer.to(device)
            found = module, _slots(module)
            setattr(self._copies, key, found)
        return found

    def __call__(self, params: Tree, x: Tensor, training: bool) -> Tensor:
        if len(params) != len(self.names):
            raise ValueError(f"parameters differ: {sorted(params.keys() ^ set(self.names))}")
        some = next(iter(params.values()))
        module, slots = self.bound(some.device, training)
        kept = [parameters[key] for parameters, key, _ in slots]
        try:
            for parameters, key, name in slots:
                parameters[key] = params[name]
            with products(self._precision, some.device):
                logits: Tensor = module(x)
        finally:
            for (parameters, key, _), placeholder in zip(slots, kept, strict=True):
                parameters[key] = placeholder
        return logits.to(some.dtype) if self._precision != "float32" else logits


def _slots(module: nn.Module) -> list[_Slot]:
    """Every place that holds a trainable parameter, with the parameter's name; tied ones have several places."""
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    return [
        (part._parameters, key, names[id(p)])
        for part in module.modules()
        for key, p in part._parameters.items()
        if id(p) in names
    ]


def _checked(module: Any) -> nn.Module:
    """Refuse what can be seen to be wrong without running it."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"task.model: must return an nn.Module (got {type(module).__name__})")
    for name, part in module.named_modules():
        kind = type(part).__name__
        if isinstance(part, nn.modules.batchnorm._BatchNorm) or getattr(part, "track_running_stats", False):
            # Statistics of a batch are not a function of the parameters, and padding would be part of them.
            raise ConfigError(f"task.model: layer '{name}' ({kind}) keeps statistics of its batches; use nn.GroupNorm")
        if any(nn.parameter.is_lazy(p) for p in part.parameters(recurse=False)):
            raise ConfigError(f"task.model: layer '{name}' ({kind}) has no shape yet; give its input size")
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError("task.model: has no trainable parameter")
    if (odd := next((n for n, p in module.named_parameters() if p.is_complex()), None)) is not None:
        raise ConfigError(f"task.model: parameter '{odd}' is complex, and training here is of real numbers")
    return module


def _try(call: _Functional, predict: Any, loss: Any, params: Tree, tiny: Batch, classes: int) -> None:
    """Predict and differentiate one example. Raises ``ConfigError`` for whatever goes wrong."""
    shape = tuple(tiny.x.shape)
    trained, _ = call.bound(torch.device("cpu"), training=True)
    before = {name: b.clone() for name, b in trained.named_buffers()}
    try:
        with seeded(_constants()):
            with torch.no_grad():
                logits = predict(params, tiny.x)
            got, expected = getattr(logits, "shape", type(logits).__name__), (*tiny.y.shape, classes)
            if got != expected:
                got = tuple(got) if isinstance(got, torch.Size) else got
                raise ConfigError(f"task.model: gives {got} for an input of shape {shape}, expected {expected}")
            value_and_grad(loss)(params, tiny)
    except ConfigError:
        raise
    except Exception as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(f"task.model: fails for an input of shape {shape}: {type(e).__name__}: {reason}") from e
    for name, b in trained.named_buffers():
        if not torch.equal(b, before[name]):
            raise ConfigError(
                f"task.model: changes its buffer '{name}' while training; a task has no state but parameters"
            )


def _unbatchable(loss: Callable[[Tree, Batch], Tensor], params: Tree, tiny: Batch) -> str | None:
    """Why a block of clients cannot be stacked, found by trying it with two clients of one example; or None.

    The loss alone is tried, as evaluation needs the forward pass too, and ``torch.func.grad`` would load torch._dynamo
    (0.6 s), in vain where clients run one by one.
    """
    stacked = {name: p.expand(2, *p.shape) for name, p in params.items()}
    batch = Batch(tiny.x.expand(2, *tiny.x.shape), tiny.y.expand(2, *tiny.y.shape), torch.ones(2, 1))
    try:
        with torch.no_grad(), seeded(_constants()), warnings.catch_warnings():
            # Without a batching rule some layers fall back to a loop with this warning: one by one is as fast.
            warnings.filterwarnings("error", message=".*batching rule")
            torch.vmap(loss)(stacked, batch)
    except Exception as e:
        if "random" in str(e):
            return "draws random numbers while training (dropout)"
        return str(e).partition("\n")[0].partition(". ")[0][:160]
    return None


def _constants() -> torch.Generator:
    return Key.root(0).at("task", "constants").torch()
