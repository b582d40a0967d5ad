"""Small networks for a block of clients at once, written out: no autograd, no vmap, few and large operations.

A chain of linear layers, convolutions, ReLU and max-pooling that ends in logits for a cross-entropy is differentiated
by hand for K clients whose parameters are stacked:

    linear        x [K, B, i], W [K, o, i]:  one batched matrix product each for x Wᵀ, for δ W and for δᵀ x; a step of
                  SGD is part of the last one, W ← W − η δᵀ x, so that no gradient is ever written
    convolution   the K clients as K groups of one convolution, images and kernels with channels last
    the rest      one operation over all clients

On a CPU a block of 2 to 16 such clients stays in the cache, and costs a quarter to a half of what as many plain steps
cost (docs/decisions/0007-lowering.md). ``lower`` answers None for anything else; clients then run as they always can.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedsim import tree
from fedsim.types import Batch, Tree

CHANNELS_LAST = torch.channels_last
CACHE = 5 << 20  # bytes that the widest activations of a block may take: measured, see docs/benchmarks.md
FEW = 4  # input channels, below which gradients of examples are had faster with channels last
TINY = 1e-6  # Opacus's, in C/(‖g‖ + 10⁻⁶)
MODELS = 16 << 20  # bytes of parameters in a block, beyond which more clients gain nothing
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
    """What is done with the gradients of layers."""

    def linear(self, layer: "Linear", params: Tree, x: Tensor, delta: Tensor) -> None:
        """The gradient by W [K, o, i] is δᵀ x and that by b [K, o] is Σ δ, for x [K, B, i] and δ [K, B, o]."""
        ...

    def conv(self, layer: "Conv", params: Tree, x: Tensor, w: Tensor, delta: Tensor, back: bool) -> Tensor:
        """x [B, K·i, H, W], kernels w [K·o, i, h, w], δ [B, K·o, H', W']; the gradient by x where ``back``."""
        ...


class Sums:
    """Gradients summed over the examples; what becomes of them is a subclass's matter."""

    def take(self, name: str, w: Tensor, g: Tensor) -> None:
        raise NotImplementedError

    def linear(self, layer: "Linear", params: Tree, x: Tensor, delta: Tensor) -> None:
        self.take(layer.weight, params[layer.weight], torch.bmm(delta.transpose(1, 2), x))
        if layer.bias is not None:
            self.take(layer.bias, params[layer.bias], delta.sum(1))

    def conv(self, layer: "Conv", params: Tree, x: Tensor, w: Tensor, delta: Tensor, back: bool) -> Tensor:
        kernel, clients = params[layer.weight], len(params[layer.weight])
        bias = None if layer.bias is None else [len(w)]
        mask = [back, True, layer.bias is not None]
        gx, gw, gb = _aten.convolution_backward(
            delta, x, w, bias, layer.stride, layer.padding, layer.dilation, False, [0, 0], clients, mask
        )
        self.take(layer.weight, kernel, gw.view(kernel.shape))
        if layer.bias is not None:
            self.take(layer.bias, params[layer.bias], gb.view(clients, -1))
        return gx if back else delta


class Collect(Sums):
    """Keeps gradients."""

    def __init__(self) -> None:
        self.grads: Tree = {}

    def take(self, name: str, w: Tensor, g: Tensor) -> None:
        self.grads[name] = g


class Descend(Sums):
    """w ← w − g, in place; for a linear layer, product and step are one operation. (The rate is in the loss.)"""

    def take(self, name: str, w: Tensor, g: Tensor) -> None:
        w.sub_(g)

    def linear(self, layer: "Linear", params: Tree, x: Tensor, delta: Tensor) -> None:
        params[layer.weight].baddbmm_(delta.transpose(1, 2), x, alpha=-1)
        if layer.bias is not None:
            params[layer.bias].sub_(delta.sum(1))


class Norms:
    """The norm of each example's gradient, and what it takes to sum them with factors once all norms are known.

    A linear layer's ‖δ xᵀ‖ is ‖δ‖ ‖x‖, so that no gradient of an example is ever made (Goodfellow 2015,
    arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679). A convolution's is made: its kernels are small.
    """

    def __init__(self) -> None:
        self.squares: Tensor | None = None  # [K, B]
        self._sums: list[Callable[[Tensor, Tensor | None, Tree], None]] = []

    def _add(self, squares: Tensor) -> None:
        self.squares = squares if self.squares is None else self.squares + squares

    def linear(self, layer: "Linear", params: Tree, x: Tensor, delta: Tensor) -> None:
        inputs = x.square().sum(2)
        self._add(delta.square().sum(2) * (inputs + 1 if layer.bias is not None else inputs))

        def weighted(factors: Tensor, fine: Tensor | None, out: Tree) -> None:
            scaled = _zeroed(delta, fine) * factors.unsqueeze(2)
            out[layer.weight] = torch.bmm(scaled.transpose(1, 2), _zeroed(x, fine))
            if layer.bias is not None:
                out[layer.bias] = scaled.sum(1)

        self._sums.append(weighted)

    def conv(self, layer: "Conv", params: Tree, x: Tensor, w: Tensor, delta: Tensor, back: bool) -> Tensor:
        kernel, examples = params[layer.weight], len(x)
        clients, o, i, height, width = kernel.shape
        # Every example of every client is a group of one convolution over a single "example".
        last = i < FEW
        groups, kind = examples * clients, CHANNELS_LAST if last else torch.contiguous_format
        shape = (groups * o, i, height, width)
        each = _aten.convolution_backward(
            _as_groups(delta, last),
            _as_groups(x, last),
            w.new_empty(shape).contiguous(memory_format=kind),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0, 0],
            groups,
            [False, True, False],
        )[1].reshape(examples, clients, -1)
        self._add(each.square().sum(2).T)
        bias = None
        if layer.bias is not None:
            bias = delta.sum((2, 3)).view(examples, clients, o)
            self._add(bias.square().sum(2).T)

        def weighted(factors: Tensor, fine: Tensor | None, out: Tree) -> None:
            f, seen = factors.T.reshape(examples, clients, 1), None if fine is None else fine.T
            out[layer.weight] = (_zeroed(each, seen) * f).sum(0).view(kernel.shape)
            if bias is not None and layer.bias is not None:
                out[layer.bias] = (_zeroed(bias, seen) * f).sum(0)

        self._sums.append(weighted)
        if not back:
            return delta
        gx: Tensor = _aten.convolution_backward(
            delta, x, w, None, layer.stride, layer.padding, layer.dilation, False, [0, 0], clients, [True, False, False]
        )[0]
        return gx

    def total(self, factors: Tensor, fine: Tensor | None) -> Tree:
        """Σ_b factors[k, b] g_kb, [K, …], over the examples that are ``fine``; None: all are."""
        out: Tree = {}
        for weighted in self._sums:
            weighted(factors, fine, out)
        return out


def _as_groups(x: Tensor, last: bool) -> Tensor:
    """[B, K·C, H, W], channels last -> [1, B·K·C, H, W], channels last or first: whichever convolution is faster."""
    b, channels, h, w = x.shape
    if not last:
        return x.reshape(1, b * channels, h, w)
    flat = x.permute(2, 3, 0, 1).reshape(-1)  # through one dimension, as in ``ToImage``
    return flat.view(1, h, w, b * channels).permute(0, 3, 1, 2)


class Linear(NamedTuple):
    weight: str
    bias: str | None

    def forward(self, params: Tree, x: Tensor, clients: int) -> tuple[Tensor, Any]:
        w = params[self.weight].transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, w), x
        return torch.baddbmm(params[self.bias].unsqueeze(1), x, w), x

    def backward(self, params: Tree, kept: Any, delta: Tensor, clients: int, step: Step, first: bool) -> Tensor:
        back = delta if first else torch.bmm(delta, params[self.weight])  # before the step changes it
        step.linear(self, params, kept, delta)
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
        return step.conv(self, params, x, w, delta, not first)


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

    def __init__(self, layers: Sequence[Layer], kernels: frozenset[str], widest: int, size: int) -> None:
        """``widest``: the numbers of an example's largest activation; ``size``: bytes of the parameters."""
        self._layers, self._kernels, self._widest, self._bytes = layers, kernels, widest, size
        # Nothing before this layer has parameters: no gradient by its input is wanted.
        self._begin = next(i for i, layer in enumerate(layers) if isinstance(layer, Linear | Conv))

    def block(self, params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        """Values [K] and gradients [K, …]; nothing is changed (``fedsim.autodiff.Block``)."""
        step = Collect()
        sums = self._run(params, batch, step, _mean(batch, params))
        n = batch.y.shape[1] if batch.weight is None else batch.weight.sum(1).clamp_min(torch.finfo(sums.dtype).tiny)
        return sums / n, {name: step.grads[name] for name in params}

    def descend(self, params: Tree, batch: Batch, rate: Tensor) -> Tensor:
        """A step of SGD with rates [K] on parameters [K, …] of ``own``, in place.

        Gives the clients' sums of weighted losses [K] before it.
        """
        return self._run(params, batch, Descend(), _mean(batch, params) * rate.unsqueeze(1))

    def clipped_sum(self, params: Tree, batch: Batch, clip: float) -> Tree:
        """Σ g_i min(1, clip/‖g_i‖) over one client's examples of weight > 0 (``clients.dp_sgd.ClippedSum``)."""
        flat = _ClippedSum.apply(self, clip, tuple(params), *batch, *params.values())  # type: ignore[no-untyped-call]
        return dict(zip(params, flat, strict=True))

    def clipped_sums(self, params: Tree, batch: Batch, clip: float) -> Tree:
        """The same for K clients: parameters and results [K, …]."""
        step = Norms()
        self._run(params, batch, step, next(iter(params.values())).new_ones(batch.y.shape))
        assert step.squares is not None
        size = step.squares.sqrt()
        factors = torch.where(size.isfinite(), (clip / (size + TINY)).clamp(max=1.0), 0.0)
        if batch.weight is not None:
            factors = factors * (batch.weight > 0)
        fine = size.isfinite()
        # On a GPU, to ask whether all are would be to wait for them.
        whole = fine.device == tree.HOST and bool(fine.all())
        total = step.total(factors, None if whole else fine)
        return {name: total[name] for name in params}

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
        fits = min(CACHE // (4 * self._widest * batch_size), MODELS // self._bytes)
        return int(min(MOST, max(2, 1 << (max(fits, 1).bit_length() - 1))))

    def _run(self, params: Tree, batch: Batch, step: Step, share: Tensor) -> Tensor:
        """The sums of weighted losses [K]; gradients are those of Σ share · loss, and ``step`` takes them."""
        with torch.no_grad():
            clients, h, kept = len(batch.x), batch.x, []
            for layer in self._layers:
                h, keep = layer.forward(params, h, clients)
                kept.append(keep)
            sums, delta = _cross_entropy(h, batch, share)
            for i in range(len(self._layers) - 1, self._begin - 1, -1):
                delta = self._layers[i].backward(params, kept[i], delta, clients, step, i == self._begin)
                kept[i] = None
        return sums


class Lowered:
    """A loss with its chain's formulations for a block as attributes, where ``autodiff`` and ``clients.sgd`` look."""

    def __init__(self, loss: Callable[[Tree, Batch], Tensor], chain: Chain) -> None:
        self._loss, self.chain = loss, chain
        self.block, self.descend, self.own, self.clients = chain.block, chain.descend, chain.own, chain.clients
        self.clipped_sum = chain.clipped_sum

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        """The weighted mean over a batch of one client, shape ()."""
        return self._loss(params, batch)


def _kernels(w: Tensor) -> Tensor:
    """[K, o, i, h, w] -> [K·o, i, h, w], channels last; without a copy for parameters of ``own``."""
    clients, o, i, height, width = w.shape
    # Through one dimension, as in ``ToImage``.
    flat = w.permute(0, 1, 3, 4, 2).reshape(-1)
    return flat.view(clients * o, height, width, i).permute(0, 3, 1, 2)


def _mean(batch: Batch, params: Tree) -> Tensor:
    """What each example counts in its client's mean, [K, B]."""
    if batch.weight is None:
        return next(iter(params.values())).new_full((1, 1), 1.0 / batch.y.shape[1]).expand(batch.y.shape)
    weight = batch.weight.to(next(iter(params.values())).dtype)
    return weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def _cross_entropy(logits: Tensor, batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of weighted losses, [K], and the gradient of Σ share · loss by the logits [K, B, C]."""
    classes, (clients, size) = logits.shape[-1], batch.y.shape
    log_p = torch.log_softmax(logits.view(-1, classes), 1)
    y = batch.y.reshape(-1)
    each = _aten.nll_loss_forward(log_p, y, None, 0, -100)[0].view(clients, size)
    back = _aten.nll_loss_backward(share.reshape(-1), log_p, y, None, 0, -100, log_p.new_zeros(()))
    delta = _aten._log_softmax_backward_data(back, log_p, 1, log_p.dtype)
    sums = each.sum(1) if batch.weight is None else (each * batch.weight).sum(1)
    return sums, delta.view(logits.shape)


def _zeroed(x: Tensor, fine: Tensor | None) -> Tensor:
    """``x`` [a, b, …] with 0 where ``fine`` [a, b] does not hold: 0 · NaN would be NaN."""
    return x if fine is None else torch.where(fine.view(*fine.shape, *[1] * (x.ndim - 2)), x, 0.0)


class _ClippedSum(torch.autograd.Function):
    """``clipped_sum`` as an operation that ``torch.vmap`` takes as a whole. It has no derivative."""

    @staticmethod
    def forward(
        chain: Chain, clip: float, names: tuple[str, ...], x: Tensor, y: Tensor, weight: Tensor | None, *params: Tensor
    ) -> Any:
        batch = Batch(x[None], y[None], None if weight is None else weight[None])
        total = chain.clipped_sums({n: p[None] for n, p in zip(names, params, strict=True)}, batch, clip)
        return tuple(g[0] for g in total.values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: clipped gradients are not differentiated again."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError("a clipped sum of gradients has no derivative here")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], chain: Chain, clip: float, names: tuple[str, ...], *tensors: Any
    ) -> Any:
        def stack(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

        x, y, weight, *params = (None if t is None else stack(t, d) for t, d in zip(tensors, in_dims[3:], strict=True))
        assert x is not None and y is not None
        own = {n: p for n, p in zip(names, params, strict=True) if p is not None}
        total = chain.clipped_sums(own, Batch(x, y, weight), clip)
        return tuple(total.values()), (0,) * len(total)


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
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    return Chain(layers, frozenset(layer.weight for layer in layers if isinstance(layer, Conv)), widest, size)


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
        elif isinstance(part, nn.Flatten) and kind is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1):
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
