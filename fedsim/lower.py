"""Small networks for a block of clients at once, written out: no autograd, no vmap, few and large operations.

A chain of linear layers, convolutions, ReLU and max-pooling that ends in logits for a cross-entropy is differentiated
by hand for K clients whose parameters are stacked:

    linear        x [K, B, i], W [K, o, i]:  one batched matrix product each for x Wᵀ, for δ W and for δᵀ x; a step of
                  SGD is part of the last one, W ← W − η δᵀ x, so that no gradient is ever written
    convolution   the K clients as K groups of one convolution, images and kernels with channels last
    the rest      one operation over all clients

On a CPU a block of 2 to 16 such clients stays in the cache, and costs a quarter to a half of what as many plain steps
cost (docs/decisions/0010-lowering.md). ``lower`` answers None for anything else; clients then run as they always can.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedsim.types import Batch, Tree

CHANNELS_LAST = torch.channels_last
CACHE = 5 << 20  # bytes that the widest activations of a block may take: measured, see docs/benchmarks.md
MOST = 16  # clients at once, where activations are small
_aten = torch.ops.aten


class Layer(Protocol):
    """One layer for K clients. Activations are flat, [K, B, features], or images, [B, K·channels, H, W]."""

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        """The output, and what ``backward`` needs besides."""
        ...

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: "Step", first: bool) -> Tensor:
        """Hand the parameters' gradients to ``step``; the gradient by the input (anything where ``first``)."""
        ...


class Step(Protocol):
    """What is done with the gradients of a layer."""

    def product(self, name: str, w: Tensor, a: Tensor, b: Tensor) -> None:
        """The gradient by ``w`` [K, o, i] is a b, with a [K, o, B] and b [K, B, i]."""
        ...

    def gradient(self, name: str, w: Tensor, g: Tensor) -> None:
        """The gradient by ``w`` is ``g``."""
        ...


class Collect:
    """Keeps gradients."""

    def __init__(self) -> None:
        self.grads: Tree = {}

    def product(self, name: str, w: Tensor, a: Tensor, b: Tensor) -> None:
        self.grads[name] = torch.bmm(a, b)

    def gradient(self, name: str, w: Tensor, g: Tensor) -> None:
        self.grads[name] = g


class Descend:
    """w ← w − g, in place; the product and the step are one operation. (The rate is in the loss.)"""

    def product(self, name: str, w: Tensor, a: Tensor, b: Tensor) -> None:
        w.baddbmm_(a, b, alpha=-1)

    def gradient(self, name: str, w: Tensor, g: Tensor) -> None:
        w.sub_(g)


class Linear(NamedTuple):
    weight: str
    bias: str | None

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        w = params[self.weight].transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, w), x
        return torch.baddbmm(params[self.bias].unsqueeze(1), x, w), x

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: Step, first: bool) -> Tensor:
        w = params[self.weight]
        back = delta if first else torch.bmm(delta, w)  # before the step changes w
        step.product(self.weight, w, delta.transpose(1, 2), kept)
        if self.bias is not None:
            step.gradient(self.bias, params[self.bias], delta.sum(1))
        return back


class Conv(NamedTuple):
    weight: str
    bias: str | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        w = _kernels(params[self.weight])
        b = None if self.bias is None else params[self.bias].reshape(-1)
        y = torch.conv2d(x, w, b, self.stride, self.padding, self.dilation, clients)
        # One input channel is laid out in both ways at once, and the result then has channels first.
        return y.contiguous(memory_format=CHANNELS_LAST), (x, w)

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: Step, first: bool) -> Tensor:
        x, w = kept
        bias = None if self.bias is None else [len(w)]
        mask = [not first, True, self.bias is not None]
        back, gw, gb = _aten.convolution_backward(
            delta, x, w, bias, self.stride, self.padding, self.dilation, False, [0, 0], clients, mask
        )
        step.gradient(self.weight, params[self.weight], gw.view(params[self.weight].shape))
        if self.bias is not None:
            step.gradient(self.bias, params[self.bias], gb.view(clients, -1))
        return delta if first else back


class MaxPool(NamedTuple):
    size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        y, at = _aten.max_pool2d_with_indices(x, self.size, self.stride, self.padding, self.dilation, False)
        return y, (x, at)

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: Step, first: bool) -> Tensor:
        x, at = kept
        back: Tensor = _aten.max_pool2d_with_indices_backward(
            delta, x, self.size, self.stride, self.padding, self.dilation, False, at
        )
        return back


class Relu(NamedTuple):
    """In place where the layer before does not need its output."""

    owned: bool

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        y = x.clamp_min_(0) if self.owned else x.clamp_min(0)
        return y, y

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: Step, first: bool) -> Tensor:
        back: Tensor = _aten.threshold_backward(delta, kept, 0)
        return back


class ToImage(NamedTuple):
    """[K, B, …] -> [B, K·C, H, W], channels last."""

    shape: tuple[int, int, int]

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        c, h, w = self.shape
        there = x.reshape(clients, -1, c, h, w).permute(1, 3, 4, 0, 2)
        # Through one dimension, so that a single channel has stride 1: only then is the fast convolution chosen.
        return there.reshape(-1).view(-1, h, w, clients * c).permute(0, 3, 1, 2), x.shape

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: Step, first: bool) -> Tensor:
        return delta if first else ToFlat().forward(params, delta, clients)[0].view(kept)


class ToFlat(NamedTuple):
    """[B, K·C, H, W] -> [K, B, C·H·W]."""

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        _, channels, h, w = x.shape
        there = x.view(len(x), clients, channels // clients, h, w).transpose(0, 1)
        return there.reshape(clients, len(x), -1), (channels // clients, h, w)

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: Step, first: bool) -> Tensor:
        return ToImage(kept).forward(params, delta, clients)[0]


class Flat(NamedTuple):
    """[K, B, …] -> [K, B, features]."""

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        return x.flatten(2), x.shape

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: Step, first: bool) -> Tensor:
        return delta if first else delta.view(kept)


class Chain:
    """Cross-entropy of a chain of layers, for K clients at once. All results of a client depend on its slices alone."""

    def __init__(self, layers: Sequence[Layer], kernels: frozenset[str], widest: int) -> None:
        """``widest``: the numbers of an example's largest activation."""
        self._layers, self._kernels, self._widest = layers, kernels, widest

    def block(self, params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        """Values [K] and gradients [K, …]; nothing is changed (``fedsim.autodiff.Block``)."""
        step = Collect()
        sums = self._run(params, batch, step, None)
        n = batch.y.shape[1] if batch.weight is None else batch.weight.sum(1).clamp_min(torch.finfo(sums.dtype).tiny)
        return sums / n, {name: step.grads[name] for name in params}

    def descend(self, params: Tree, batch: Batch, rate: Tensor) -> Tensor:
        """A step of SGD with rates [K] on parameters [K, …] of ``own``, in place.

        Gives the clients' sums of weighted losses [K] before it.
        """
        return self._run(params, batch, Descend(), rate)

    @property
    def linear(self) -> bool:
        """Whether all parameters are those of linear layers: gradients are products, and ``Step`` sees both factors."""
        return not self._kernels

    def differentiate(self, params: Tree, batch: Batch, step: Step) -> None:
        """Hand the gradients of the means over all examples to ``step``, from the last layer to the first."""
        self._run(params, batch._replace(weight=None), step, None)

    def own(self, params: Tree) -> Tree:
        """A copy of parameters [K, …] in the layout in which steps are fastest: kernels with channels last."""
        return {
            name: p.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).permute(0, 1, 4, 2, 3)
            if name in self._kernels
            else p.clone(memory_format=torch.contiguous_format)
            for name, p in params.items()
        }

    def clients(self, batch_size: int) -> int:
        """How many clients to run at once on a CPU, a power of two: more fall out of the cache, fewer waste calls."""
        examples = max(1, CACHE // (4 * self._widest) // batch_size)
        return int(min(MOST, max(2, 1 << (examples.bit_length() - 1))))

    def _run(self, params: Tree, batch: Batch, step: Step, rate: Tensor | None) -> Tensor:
        with torch.no_grad():
            clients, h, kept = len(batch.x), batch.x, []
            for layer in self._layers:
                h, keep = layer.forward(params, h, clients)
                kept.append(keep)
            sums, delta = _cross_entropy(h, batch, rate)
            for i in range(len(self._layers) - 1, -1, -1):
                delta = self._layers[i].backward(params, kept[i], delta, clients, step, _first(self._layers, i))
                kept[i] = None
        return sums


class Lowered:
    """A loss with its chain's formulations for a block as attributes, where ``autodiff`` and ``clients.sgd`` look."""

    def __init__(self, loss: Callable[[Tree, Batch], Tensor], chain: Chain) -> None:
        self._loss, self.chain = loss, chain
        self.block, self.descend, self.own, self.clients = chain.block, chain.descend, chain.own, chain.clients

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        """The weighted mean over a batch of one client, shape ()."""
        return self._loss(params, batch)


def _first(layers: Sequence[Layer], i: int) -> bool:
    """Whether nothing before layer ``i`` has parameters, so that no gradient by its input is wanted."""
    return not any(isinstance(layer, Linear | Conv) for layer in layers[:i])


def _kernels(w: Tensor) -> Tensor:
    """[K, o, i, h, w] -> [K·o, i, h, w], channels last; without a copy for parameters of ``own``."""
    clients, o, i, height, width = w.shape
    # Through one dimension, as in ``ToImage``.
    flat = w.permute(0, 1, 3, 4, 2).reshape(-1)
    return flat.view(clients * o, height, width, i).permute(0, 3, 1, 2)


def _cross_entropy(logits: Tensor, batch: Batch, rate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of weighted losses, [K], and the gradient of their means by the logits [K, B, C], times ``rate``."""
    classes, (clients, size) = logits.shape[-1], batch.y.shape
    log_p = torch.log_softmax(logits.view(-1, classes), 1)
    y = batch.y.reshape(-1)
    each = _aten.nll_loss_forward(log_p, y, None, 0, -100)[0].view(clients, size)
    if batch.weight is None:
        share = (logits.new_ones(clients) if rate is None else rate).div(size).unsqueeze(1).expand(clients, size)
    else:
        weight = batch.weight.to(each.dtype)
        each = each * weight
        scale = weight.sum(1, keepdim=True).clamp_min(torch.finfo(each.dtype).tiny)
        share = weight / scale if rate is None else weight * (rate.unsqueeze(1) / scale)
    back = _aten.nll_loss_backward(share.reshape(-1), log_p, y, None, 0, -100, log_p.new_zeros(()))
    delta = _aten._log_softmax_backward_data(back, log_p, 1, log_p.dtype)
    return each.sum(1), delta.view(logits.shape)


def lower(module: nn.Module, example: tuple[Tensor, Tensor]) -> Chain | None:
    """The chain of a module under a cross-entropy, or None where it is something else.

    ``example`` is a batch x (N, …) and y (N,). Layers are taken for what they are only where nothing was changed about
    them: no subclass, no hook, no frozen, tied or foreign parameter.
    """
    found = _flatten(module)
    x, y = example
    if found is None or y.ndim != 1 or not x.is_floating_point():
        return None
    trainable = [name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad]
    parts = [f"{name}.{which}" for name, layer in found for which in dict(layer.named_parameters(recurse=False))]
    if sorted(trainable) != sorted(parts) or len(trainable) != len(list(module.parameters())):
        return None
    layers, shapes = _translate(found, tuple(x.shape[1:]))
    if not layers or len(shapes[-1]) != 1 or not isinstance(layers[-1], Linear):
        return None
    widest = max(torch.Size(shape).numel() for shape in shapes)
    return Chain(layers, frozenset(layer.weight for layer in layers if isinstance(layer, Conv)), widest)


def _flatten(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]] | None:
    """The layers of nested ``nn.Sequential``s by name; None where anything about one of them was changed."""
    changed = "forward" in vars(module) or any(
        getattr(module, hooks)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    if changed:
        return None
    if type(module) is not nn.Sequential:
        return [(prefix.rstrip("."), module)]
    out: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        inner = _flatten(child, f"{prefix}{name}.")
        if inner is None:
            return None
        out += inner
    # A layer that stands in two places is listed once by ``named_children``.
    return out if len(module) == len(list(module.named_children())) else None


def _translate(
    found: list[tuple[str, nn.Module]], shape: tuple[int, ...]
) -> tuple[list[Layer] | None, list[tuple[int, ...]]]:
    """Layers of ours, and the shapes of an example on its way. ``image``: whether activations are [B, K·C, H, W]."""
    layers: list[Layer] = []
    shapes = [shape]
    image = False
    for name, part in found:
        kind = type(part)
        if kind is nn.Identity:
            continue
        if kind is nn.Unflatten and not image:
            shape = _shape_after(part, shape)
        elif isinstance(part, nn.Flatten) and (part.start_dim, part.end_dim) == (1, -1):
            layers.append(ToFlat() if image else Flat())
            image = False
            shape = (int(torch.Size(shape).numel()),)
        elif kind is nn.Linear and len(shape) == 1:
            layers.append(Linear(f"{name}.weight", f"{name}.bias" if part.bias is not None else None))
            shape = (int(part.out_features),)  # type: ignore[arg-type]
        elif kind is nn.ReLU:
            layers.append(Relu(bool(layers) and isinstance(layers[-1], Linear | Conv | MaxPool)))
        elif kind in (nn.Conv2d, nn.MaxPool2d) and len(shape) == 3:
            layer = _conv(name, part) if isinstance(part, nn.Conv2d) else _pool(part)
            if layer is None:
                return None, shapes
            if not image:
                layers.append(ToImage(shape))
                image = True
            layers.append(layer)
            shape = _shape_after(part, shape)
        else:
            return None, shapes
        shapes.append(shape)
    return layers, shapes


def _shape_after(part: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an example after a layer, found without touching memory."""
    dtype = next((p.dtype for p in part.parameters()), torch.float32)
    with torch.no_grad():
        x = torch.empty(1, *shape, dtype=dtype, device="meta")
        return tuple(copy.deepcopy(part).to("meta")(x).shape[1:])


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(v) for v in value]


def _conv(name: str, part: nn.Conv2d) -> Conv | None:
    if part.groups != 1 or part.padding_mode != "zeros":
        return None
    padding = part.padding
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(part.dilation, part.kernel_size, strict=True)]
        if any(span % 2 for span in spans):
            return None  # more on one side than on the other
        padding = tuple(span // 2 for span in spans)
    elif padding == "valid":
        padding = 0  # type: ignore[assignment]
    bias = f"{name}.bias" if part.bias is not None else None
    return Conv(f"{name}.weight", bias, _pair(part.stride), _pair(padding), _pair(part.dilation))


def _pool(part: Any) -> MaxPool | None:
    if part.ceil_mode or part.return_indices:
        return None
    stride = part.stride if part.stride is not None else part.kernel_size
    return MaxPool(_pair(part.kernel_size), _pair(stride), _pair(part.padding), _pair(part.dilation))
