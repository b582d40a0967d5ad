"""A hypernetwork: one network h(v; φ) that generates the parameters θ of another, by their names.

    a = trunk(e(v))                    fully connected, a nonlinearity after each layer
    θ_k = reshape(W_k a + b_k)         for each tensor k of θ                            (head "dense")
        W_k = U_k V_k                  U (|θ_k|, r), V (r, H)                            ("lowrank")
        W_k = rows of A_k ⊗ rows of B_k,  i.e. θ_k = A_k diag(a) B_kᵀ + b_k              ("kronecker")

The last one is a row-wise Kronecker (face-splitting) product: with θ_k an m × n matrix it has (m + n) H weights instead
of m n H; tensors of one dimension stay dense.

Magnitude-invariant parametrisation, MIP (Gonzalez Ortiz, Guttag and Dalca 2024, arXiv:2304.07645). With zero biases and
a homogeneous nonlinearity ‖h(c v)‖ = c ‖h(v)‖: the scale of θ, and of its gradients, is that of the input. MIP encodes
the input at constant norm and adds the output to ordinary parameters:

    e(γ) = [cos(π γ/2), sin(π γ/2)]  for γ ∈ [0, 1]^D, ‖e(γ)‖ = √D         ("input")
    θ_k = θ⁰_k + W_k a,  θ⁰ learned and initialised as an ordinary network   ("output")
    both, ω Kaiming fan-out with zero biases                                 ("mip")

θ⁰ is b. An unbounded v is squashed first, γ = sigmoid(v), and e divided by √D.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.types import Tree

Parametrization = Literal["default", "kaiming", "input", "output", "mip"]
Form = Literal["dense", "lowrank", "kronecker"]
SLOPE = 0.01  # of the LeakyReLU that goes with Kaiming initialisation


class Hypernet(NamedTuple):
    """``init(generator, θ⁰) -> φ`` and ``generate(φ, v) -> θ`` with v of shape (D,). Pure, and vmappable in both."""

    init: Callable[[torch.Generator, Tree], Tree]
    generate: Callable[[Tree, Tensor], Tree]


def encode(gamma: Tensor) -> Tensor:
    """γ (…, D) in [0, 1] -> (…, 2D), of norm √D."""
    angle = gamma * (math.pi / 2)
    return torch.cat([angle.cos(), angle.sin()], -1)


def hypernet(
    shapes: Mapping[str, torch.Size],
    inputs: int,
    hidden: Sequence[int] = (128,),
    parametrization: Parametrization = "default",
    head: Form = "dense",
    rank: int = 8,
    squash: bool = True,
) -> Hypernet:
    """A hypernetwork for tensors of these shapes, with ``inputs`` = D.

    default: PyTorch's initialisation of linear layers, biases included, and ReLU. The others are Kaiming fan-out, zero
    biases and LeakyReLU: "kaiming" without, "input" and "output" with one, "mip" with both encodings.
    ``squash``: whether an encoded v is unbounded, and goes through a sigmoid first.
    """
    encoded, residual = parametrization in ("input", "mip"), parametrization in ("output", "mip")
    torch_init = parametrization == "default"
    widths = [2 * inputs if encoded else inputs, *hidden]
    width = widths[-1]

    def factored(shape: torch.Size) -> Form:
        return "dense" if head == "kronecker" and len(shape) < 2 else head

    def init(generator: torch.Generator, theta: Tree) -> Tree:
        dtype = next(iter(theta.values())).dtype

        def draw(*size: int, var: float) -> Tensor:
            """Entries of this variance: uniform as PyTorch's linear layers, or normal as Kaiming's."""
            empty = torch.empty(size, dtype=torch.float32, device=generator.device)
            if torch_init:
                return empty.uniform_(-math.sqrt(3 * var), math.sqrt(3 * var), generator=generator).to(dtype)
            return empty.normal_(0, math.sqrt(var), generator=generator).to(dtype)

        def bias(size: int, fan_in: int) -> Tensor:
            zero = torch.zeros(size, dtype=dtype, device=generator.device)
            return draw(size, var=1 / (3 * fan_in)) if torch_init else zero

        gain = 2 / (1 + SLOPE**2)
        phi: Tree = {}
        for i, (before, after) in enumerate(pairwise(widths)):
            phi[f"trunk.{i}.weight"] = draw(after, before, var=1 / (3 * before) if torch_init else gain / after)
            phi[f"trunk.{i}.bias"] = bias(after, before)
        for name, shape in shapes.items():
            size = shape.numel()
            var = 1 / (3 * width) if torch_init else gain / size  # of an entry of W, however it is factored
            match factored(shape):
                case "dense":
                    phi[f"head.{name}.weight"] = draw(size, width, var=var)
                case "lowrank":
                    phi[f"head.{name}.left"] = draw(size, rank, var=1 / rank)
                    phi[f"head.{name}.right"] = draw(rank, width, var=var)
                case "kronecker":
                    phi[f"head.{name}.rows"] = draw(shape[0], width, var=var)
                    phi[f"head.{name}.columns"] = draw(size // shape[0], width, var=1.0)
            phi[f"head.{name}.bias"] = theta[name].flatten().clone() if residual else bias(size, width)
        return phi

    def generate(phi: Tree, v: Tensor) -> Tree:
        a = v
        if encoded:
            a = encode(v.sigmoid()) / math.sqrt(inputs) if squash else encode(v)
        for i in range(len(widths) - 1):
            a = F.linear(a, phi[f"trunk.{i}.weight"], phi[f"trunk.{i}.bias"])
            a = F.relu(a) if torch_init else F.leaky_relu(a, SLOPE)
        theta: Tree = {}
        for name, shape in shapes.items():
            match factored(shape):
                case "dense":
                    flat = phi[f"head.{name}.weight"] @ a
                case "lowrank":
                    flat = phi[f"head.{name}.left"] @ (phi[f"head.{name}.right"] @ a)
                case "kronecker":
                    flat = ((phi[f"head.{name}.rows"] * a) @ phi[f"head.{name}.columns"].T).flatten()
            theta[name] = (flat + phi[f"head.{name}.bias"]).reshape(shape)
        return theta

    return Hypernet(init, generate)
