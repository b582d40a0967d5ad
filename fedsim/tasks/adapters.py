"""Low-rank adapters on any task: a task whose parameters are the adapters, and whose model is a constant.

    h = (W₀ + s B A) x,   s = α/r,   A (r, d_in),   B (d_out, r)          (LoRA, Hu et al. 2021, arXiv:2106.09685)
    h = (W₀ + s B R A) x                          with R (r, r) in between, where there is one

``adapted`` turns a task into one whose tree holds only what is trained: A, B or R of some linear layers, named
``{layer}.lora_A`` and so on, and the head's tensors if it is trained too. Everything else is a constant of that task.
It goes through ``task.loss`` and ``task.predict`` with weights that *say* W₀ + s B A: where the model computes x Wᵀ
they give x W₀ᵀ + s (x Aᵀ) Bᵀ and the sum is never formed; for anything else that a model does with a weight, it is.
So no model has to be rewritten, and whatever is wrapped around a task stays around it.

Clients in a block share W₀. Their examples go through it as one batch, and only the products with what is their own
are batched by client; a shared A is applied to all examples at once. The same formulation gives the gradients of single
examples, each with its own B. It takes for granted that a model treats the examples of a batch alike and apart, along
the first dimension of whatever enters a linear layer; that is tried on the first block, and where it does not hold,
``torch.func`` does the work.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedsim import tree
from fedsim.autodiff import value_and_grad
from fedsim.errors import ConfigError
from fedsim.rng import Key
from fedsim.tasks.module import seeded
from fedsim.types import Batch, Task, Tree

log = logging.getLogger("fedsim")

Start = Literal["kaiming", "gaussian", "orthogonal", "svd"]

ATTENTION = ("query", "value", "q_lin", "v_lin", "q_proj", "v_proj", "c_attn")  # their names in common models
TRIED = 0.1  # relative; two formulations differ by rounding, at worst bfloat16's, and a wrong one differs wholly
APART = 1e-5  # relative; how far a client's numbers may move with its neighbour's examples, by the same operations


class Layer(NamedTuple):
    """A linear layer that is adapted: h = W x + b with W (rows, columns)."""

    name: str
    rows: int
    columns: int

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def A(self) -> str:
        return f"{self.name}.lora_A"

    @property
    def B(self) -> str:
        return f"{self.name}.lora_B"

    @property
    def R(self) -> str:
        return f"{self.name}.lora_R"


class Targets(NamedTuple):
    """The layers that are adapted, and the names of the head's parameters."""

    layers: tuple[Layer, ...]
    head: tuple[str, ...]


def targets(task: Task, wanted: Sequence[str] = ()) -> Targets:
    """The linear layers called so, or whose name ends so after a dot; the head is the model's last linear layer.

    With nothing wanted: the query and value projections of attention, and where a model has none by the usual names,
    every linear layer but the head. Raises ``ConfigError`` for a model without such layers.
    """
    model = _module(task)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    linear = [
        Layer(name, part.out_features, part.in_features)
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and f"{name}.weight" in trainable
    ]
    if not linear:
        raise ConfigError("strategy.targets: this model has no trainable linear layer to adapt")
    *body, last = linear
    for names in [tuple(wanted)] if wanted else [ATTENTION, tuple(layer.name for layer in body)]:
        chosen = tuple(layer for layer in linear if any(f".{layer.name}".endswith(f".{name}") for name in names))
        if chosen:
            break
    else:
        known = ", ".join(dict.fromkeys(layer.name.rpartition(".")[2] for layer in linear))
        asked = ", ".join(wanted) or "any but the head"
        raise ConfigError(f"strategy.targets: no linear layer of this model is {asked} (it has: {known})")
    missing = [name for name in wanted if not any(f".{layer.name}".endswith(f".{name}") for layer in chosen)]
    if missing:
        raise ConfigError(f"strategy.targets: this model has no linear layer '{missing[0]}'")
    head = tuple(name for name in (last.weight, f"{last.name}.bias") if name in trainable and last not in chosen)
    return Targets(chosen, head)


def _module(task: Task) -> nn.Module:
    """The task's module, for its names and shapes."""
    if task.module is None:
        raise ConfigError("strategy.name: adapters need a task that was made from an nn.Module")
    with seeded(Key.root(0).at("adapters", "module").torch()):
        module: nn.Module = task.module()
    return module


def start_A(layer: Layer, rank: int, how: Start, key: Key, W0: Tensor) -> Tensor:
    """A before training, (rank, columns), from the stream ``key``; in W₀'s dtype and on its device.

    kaiming: U(−1/√d_in, 1/√d_in), what PEFT and loralib do. gaussian: N(0, 1/r²), PEFT's. orthogonal: orthonormal rows
    (columns, where r > d_in). svd: the first right singular vectors of W₀; rows beyond its rank are 0.
    """
    shape, generator = (rank, layer.columns), key.at(layer.name).torch()
    match how:
        case "kaiming":
            A = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(layer.columns)
        case "gaussian":
            A = torch.randn(shape, generator=generator) / rank
        case "orthogonal":
            Q = torch.linalg.qr(torch.randn(max(shape), min(shape), generator=generator)).Q
            A = Q if rank > layer.columns else Q.T
        case "svd":
            V = torch.linalg.svd(W0.cpu().double(), full_matrices=False).Vh[:rank]
            A = F.pad(V, (0, 0, 0, rank - len(V)))
    return A.to(W0.device, W0.dtype).contiguous()


def adapted(task: Task, layers: Sequence[Layer], alpha: float, base: Tree, fixed: Tree, start: Tree) -> Task:
    """The task of training the tensors of ``start``: factors of ``layers``, and parameters of ``task`` (a head).

    base:  all parameters of ``task``, constants where they are not in ``start``
    fixed: the factors that are not trained. Of each layer A and B must be in one of the two; R may be.

    The scale is α/r with r the number of rows of A, so that clients may differ in rank.
    """

    own = [name for name in start if name in base and base[name].ndim == 2]

    def whole(params: Tree, clients: int = 0) -> Tree:
        at = tree.device(params)
        known = tree.resident(fixed, at) | params
        out = tree.resident(base, at) | {name: p for name, p in params.items() if name in base}
        for layer in layers:
            A, B = known[layer.A], known[layer.B]
            parts = (A, known[layer.R], B) if layer.R in known else (A, B)
            out[layer.weight] = _Sum.of(out[layer.weight], parts, alpha / A.shape[-2], clients)
        if clients:  # a head of each client's own
            out |= {name: _Sum.of(out[name], (), 0.0, clients) for name in own}
        return out

    return task._replace(
        init=lambda generator: tree.map(lambda x: x.clone(), start),
        predict=lambda params, x: task.predict(whole(params), x),
        loss=_Loss(task, whole),
        score=lambda params, batch: task.score(whole(params), batch),
        module=None,
    )


def merged(layers: Sequence[Layer], alpha: float, base: Tree, factors: Tree) -> Tree:
    """The parameters of the task itself: W₀ + s B A formed, in W₀'s dtype; a trained head in its place."""
    at = tree.device(base, factors)
    base, factors = tree.resident(base, at), tree.resident(factors, at)
    out = base | {name: p for name, p in factors.items() if name in base}
    for layer in layers:
        out[layer.weight] = out[layer.weight] + increment(layer, alpha, factors).to(out[layer.weight].dtype)
    return out


def increment(layer: Layer, alpha: float, factors: Tree) -> Tensor:
    """s B A, or s B R A, of one layer (rows, columns)."""
    A, B = factors[layer.A], factors[layer.B]
    BR = B @ factors[layer.R] if layer.R in factors else B
    return alpha / A.shape[-2] * (BR @ A)


def files(
    task: Task, layers: Sequence[Layer], alpha: float, base: Tree, factors: Tree, change: Tree
) -> dict[str, bytes]:
    """The adapters as PEFT saves them: ``PeftModel.from_pretrained(model, "adapter")`` gives a model of equal logits.

    Where W₀ itself has changed, the increment as a whole is split into factors of as many singular values as it has.
    A module that keeps its backbone in a part of its own says so by ``backbone = (name of the part, path)``; names are
    then the backbone's, and what is outside of it (the head) is in ``head.safetensors``.
    """
    module = _module(task)
    part, path = getattr(module, "backbone", ("", None))
    prefix = f"{part}." if part else ""
    pairs = {layer: _pair(layer, alpha, factors, change.get(layer.weight)) for layer in layers}
    rank = max(len(A) for A, _ in pairs.values())
    tensors = {}
    for layer, (A, B) in pairs.items():
        name, missing = f"base_model.model.{layer.name.removeprefix(prefix)}", rank - len(A)
        tensors[f"{name}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing)).cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = F.pad(B, (0, missing)).cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # the scale is in B
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(hasattr(module.get_submodule(layer.name), "fan_in_fan_out") for layer in layers),
        "target_modules": [layer.name.removeprefix(prefix) for layer in layers],
    }
    out = {
        "adapter/adapter_config.json": json.dumps(config, indent=2).encode(),
        "adapter/adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    everything = base | {name: x for name, x in factors.items() if name in base}
    head = {
        name: x.cpu().contiguous()
        for name, x in everything.items()
        if (prefix and not name.startswith(prefix)) or name in factors
    }
    return out | ({"adapter/head.safetensors": save(head)} if head else {})


def _pair(layer: Layer, alpha: float, factors: Tree, change: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and s B of a layer, W₀'s change in them."""
    if change is None:
        A, B = factors[layer.A], factors[layer.B]
        return A, alpha / len(A) * (B @ factors[layer.R] if layer.R in factors else B)
    U, S, Vh = torch.linalg.svd((change + increment(layer, alpha, factors)).double(), full_matrices=False)
    rank = max(1, int((S / S[0].clamp_min(1e-300) > torch.finfo(change.dtype).eps).sum()))
    root = S[:rank].sqrt()
    return (root[:, None] * Vh[:rank]).to(change.dtype), (U[:, :rank] * root).to(change.dtype)


class _Loss:
    """The loss as a function of the adapters, with a formulation for blocks (``fedsim.autodiff.Block``)."""

    def __init__(self, task: Task, whole: Callable[..., Tree]) -> None:
        self._task, self._whole = task, whole

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        return self._task.loss(self._whole(params), batch)

    def block(self, params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        """Values [K] and gradients [K, …] of K clients, from one pass over all their examples."""
        if self._folds(params, batch):
            return self._fold(params, batch)
        if batch.weight is None:
            batch = batch._replace(weight=torch.ones(batch.y.shape[:2], device=batch.y.device))
        each = torch.func.grad_and_value(lambda p, x, y, w: self(p, Batch(x, y, w)))
        grads, values = torch.vmap(each)(params, *batch)
        return values, grads

    def _folds(self, params: Tree, batch: Batch) -> bool:
        """Whether this model can be folded: tried once, with the first two clients of the first block."""
        known = _FOLDS.get(id(self._task.loss))
        if known is not None:
            return known[1]
        two = [
            ({name: p[k] for name, p in params.items()}, Batch(*(None if t is None else t[k] for t in batch)))  # type: ignore[arg-type]
            for k in range(min(2, len(batch.y)))
        ]
        if len(two) < 2:
            return False  # nothing can be told from one
        plain = [value_and_grad(self)(*one) for one in two]  # a client that fails, fails here, and nothing is learned
        if not all(bool(value.isfinite()) for value, _ in plain):
            return False
        try:
            values, grads = self._fold(
                {name: p[:2] for name, p in params.items()},
                Batch(*(None if t is None else t[:2] for t in batch)),  # type: ignore[arg-type]
            )
            good = all(
                _close(values[k], value, TRIED) and all(_close(grads[name][k], g, TRIED) for name, g in own.items())
                for k, (value, own) in enumerate(plain)
            ) and self._apart({name: p[:2] for name, p in params.items()}, two[0][1], two[1][1])
        except (RuntimeError, ValueError) as e:
            log.debug("folding failed: %s", e)
            good = False
        if not good:
            log.warning("this model does not keep the examples of a batch apart: blocks of clients run by torch.func")
        _FOLDS[id(self._task.loss)] = self._task.loss, good  # the loss is kept, so that its id stays its own
        return good

    def _apart(self, params: Tree, first: Batch, second: Batch) -> bool:
        """Whether the first client's numbers are its own, whatever examples the second one has.

        Under privacy at example level "clients" are the examples of a batch, and one that had a part, however small, in
        another's gradient would not be clipped there.
        """
        weight = torch.ones(2, len(first.y), device=first.y.device)
        weight[1] = 0
        (a, ga), (b, gb) = (
            self._fold(params, Batch(torch.stack([first.x, other.x]), torch.stack([first.y, other.y]), weight))
            for other in (first, second)
        )
        return _close(b[0], a[0], APART) and all(_close(gb[name][0], g[0], APART) for name, g in ga.items())

    def _fold(self, params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        """With weights u_kj that sum to 1 for each client, the mean over all K·B examples is Σ_k L_k / Σ u.

        So its gradient by client k's adapters is that of L_k / Σ u, and its derivative by u_kj is (l_kj − mean) / Σ u,
        which gives the loss of each example back. A task promises that its loss is a weighted mean.
        """
        clients, size = batch.y.shape[:2]
        dtype = next(iter(params.values())).dtype
        if batch.weight is None:
            u = torch.full((clients, size), 1 / size, dtype=dtype, device=batch.y.device)
        else:
            w = batch.weight.to(dtype)
            u = w / w.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        total = u.sum().clamp_min(torch.finfo(dtype).tiny)
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            u.requires_grad_()
            flat = Batch(batch.x.flatten(0, 1), batch.y.flatten(0, 1), u.flatten())
            mean = self._task.loss(self._whole(leaves, clients), flat)
            *grads, of_u = torch.autograd.grad(mean, [*leaves.values(), u], materialize_grads=True)
        u = u.detach()
        values = (u * (mean.detach() + total * of_u)).sum(1)
        return values, {name: total * g for name, g in zip(leaves, grads, strict=True)}


_FOLDS: dict[int, tuple[Any, bool]] = {}  # by the id of a task's loss: whether folding its clients was found right


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-6


class _Sum(Tensor):
    """A weight W₀ + s·(product of factors). As the weight of a linear layer it is applied part by part."""

    _parts: tuple[Tensor, ...]
    _scale: float
    _clients: int  # 0, or so many clients' examples in the batch one after the other, with factors [K, …] or shared

    @classmethod
    def of(cls, W0: Tensor, parts: tuple[Tensor, ...], scale: float, clients: int) -> "_Sum":
        out = W0.as_subclass(cls)
        out._parts, out._scale, out._clients = parts, scale, clients
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and not kwargs and isinstance(args[1], cls) and not isinstance(args[0], cls):
                x, weight, *bias = args
                if not weight._parts:
                    return weight._apart(x, *bias)
                return F.linear(x, weight, *bias).as_subclass(Tensor) + weight._scale * weight._low(x)
            if func in _ABOUT:
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(cls, cls._formed, (args, kwargs))
        return func(*args, **kwargs)

    def _low(self, x: Tensor) -> Tensor:
        """x Aᵀ [Rᵀ] Bᵀ."""
        for factor in self._parts:
            if factor.ndim == 2 or not self._clients:
                x = x @ factor.mT
            else:
                x = (x.reshape(self._clients, -1, x.shape[-1]) @ factor.mT).view(*x.shape[:-1], -1)
        return x

    def _apart(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b with W [K, rows, columns] and b [K, rows] of each client's own."""
        y = x.reshape(self._clients, -1, x.shape[-1]) @ self.as_subclass(Tensor).mT
        if bias is not None:
            y = y + bias[:, None]
        return y.view(*x.shape[:-1], -1)

    def _formed(self) -> Tensor:
        if self._clients:
            raise ValueError("a weight of many clients stands for no matrix")
        with torch._C.DisableTorchFunctionSubclass():
            product = self._parts[0]
            for factor in self._parts[1:]:
                product = factor @ product
            return self.as_subclass(Tensor) + self._scale * product


_ABOUT: set[Any] = {  # what can be said of a sum without forming it
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "dtype", "device", "ndim")),
    Tensor.size,
    Tensor.dim,
}
