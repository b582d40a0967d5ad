"""What a server makes of its clients' adapters: pure functions of named factors.

Of each layer client k has B_k (rows, r_k) and A_k (r_k, columns), and a weight p_k with Σ p_k = 1. Averaging factors
gives B̄ Ā and not the average update:

    Σ p_k B_k A_k − B̄ Ā = Σ p_k (B_k − B̄)(A_k − Ā)            of rank at most (K − 1) r

which is 0 where all A_k, or all B_k, are equal. The mean of the products is what every exact method needs; it is formed
report by report, so the server never holds more than one client's. All of this is in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim import Payload, Reducer, Report, Tree, tree
from fedsim.tasks.adapters import Layer, increment


class Factors(NamedTuple):
    """B (rows, r) and A (r, columns)."""

    B: Tensor
    A: Tensor


def product(layer: Layer, factors: Tree) -> Tensor:
    """B A."""
    return factors[layer.B].double() @ factors[layer.A].double()


def with_products(reduce: Reducer[Any, Any], layers: Sequence[Layer]) -> Reducer[Any, Any]:
    """The reduction with a channel "product": B_k A_k by layer, of clients that send how they moved from "params"."""

    def screen(shared: Payload, report: Report) -> Report:
        mine = tree.add(shared["params"], report.value["delta"])
        products = {layer.name: product(layer, mine) for layer in layers}
        return report._replace(value={**report.value, "product": products})

    return reduce._replace(screen=screen, mean=None)


def only_products(reduce: Reducer[Any, Any], layers: Sequence[Layer], alpha: float) -> Reducer[Any, Any]:
    """The reduction of α/r_k B_k A_k by layer, of clients that send their "factors", of whatever rank.

    ``alpha`` is on the products, since r_k differs. A head that is trained is averaged as it is.
    """
    own = {name for layer in layers for name in (layer.A, layer.B)}

    def screen(shared: Payload, report: Report) -> Report:
        mine = tree.map(Tensor.double, report.value["factors"])
        products = {layer.name: increment(layer, alpha, mine) for layer in layers}
        head = {name: x for name, x in report.value["factors"].items() if name not in own}
        return report._replace(value={"product": products, "head": head})

    return reduce._replace(screen=screen, mean=None)


def moving(reduce: Reducer[Any, Any], layers: Sequence[Layer]) -> Reducer[Any, Any]:
    """Refuse the report of a private client whose adapters did not move: noise alone would have moved them.

    Hooks around a model that is wrapped in the wrong order are known to leave adapters untouched while the loss and ε
    look as ever (Opacus issue 820); a run must stop there. ``ValueError`` names the tensor.
    """
    inner, starts_at_0 = reduce.screen, {layer.B for layer in layers}

    def screen(shared: Payload, report: Report) -> Any:
        for channel, part in report.value.items() if report.examples else ():
            for name, x in part.items():
                if (channel == "delta" or name in starts_at_0) and not x.any():
                    raise ValueError(f"{name} did not move in private training, where noise alone moves every tensor")
        return inner(shared, report) if inner else report

    return reduce._replace(screen=screen)


def residual(mean_product: Tensor, layer: Layer, means: Tree) -> Tensor:
    """Σ p_k B_k A_k − B̄ Ā."""
    return mean_product - product(layer, means)


def stack(factors: Sequence[Factors], p: Sequence[float]) -> Factors:
    """[B_1 … B_K] and [p_1 A_1; …; p_K A_K], whose product is Σ p_k B_k A_k."""
    return Factors(
        torch.cat([f.B for f in factors], 1), torch.cat([pk * f.A for f, pk in zip(factors, p, strict=True)])
    )


def svd(matrix: Tensor, rank: int) -> Factors:
    """B = U_r S_r and A = V_rᵀ: the nearest matrix of this rank, with orthonormal rows in A (0 beyond its own rank)."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _padded(U[:, :rank] * S[:rank], Vh[:rank], rank)


def resplit(B: Tensor, A: Tensor) -> Factors:
    """B A = U S Vᵀ as B' = U S and A' = Vᵀ of the same rank, without forming the product: A' A'ᵀ = I."""
    rank = len(A)
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return _padded(Qb @ U * S, Vh @ Qa.T, rank)


def corrected(mean_product: Tensor, B: Tensor, A: Tensor, ridge: float) -> Tensor:
    """B̄ + ΔB with ΔB = argmin ‖Σ p_k B_k A_k − (B̄ + ΔB) Ā‖² + λ‖ΔB‖² = (Σ p_k B_k A_k − B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹."""
    B, A = B.double(), A.double()
    gram = A @ A.T + ridge * torch.eye(len(A), dtype=A.dtype, device=A.device)
    dB: Tensor = torch.linalg.solve(gram, A @ (mean_product - B @ A).T).T
    return B + dB


def by_layer(layers: Sequence[Layer], like: Tree, of: Callable[[Layer], Factors]) -> Tree:
    """Factors of every layer under their names, in the dtypes of ``like``."""
    out: Tree = {}
    for layer in layers:
        B, A = of(layer)
        out[layer.A], out[layer.B] = A.to(like[layer.A].dtype), B.to(like[layer.B].dtype)
    return out


def grown(change: Tree, layers: Sequence[Layer], base: Tree, of: Callable[[Layer], Tensor]) -> Tree:
    """What W₀ of every layer has become: ``change`` and some more, in W₀'s dtype."""
    more = {layer.weight: of(layer).to(base[layer.weight].dtype) for layer in layers}
    return tree.add(change, more) if change else more


def _padded(B: Tensor, A: Tensor, rank: int) -> Factors:
    missing = rank - len(A)
    return Factors(F.pad(B, (0, missing)).contiguous(), F.pad(A, (0, 0, 0, missing)).contiguous())
