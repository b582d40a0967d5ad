"""A surrogate of a function that can only be queried, made of its past queries (Shu et al. 2023, arXiv:2308.04077, §4).

A Gaussian process with k(u, u′) = exp(−‖u − u′‖²/2l²) on the n points x_τ that were queried, A = (K + σ²I)⁻¹ and
J_τ = k(u, x_τ)(x_τ − u)/l². The gradient of its mean, and that gradient's covariance, are

    ∇μ(u) = Jᵀ A y            ∂σ²(u) = I/l² − Jᵀ A J

Random Fourier features (Rahimi and Recht 2007) make of it a vector w of M numbers that can be averaged over clients:

    φ(u)_j = √(2/M) cos(v_j·u + b_j),   v_j ~ N(0, I/l²),   b_j ~ U[0, 2π)
    w = Φ(ΦᵀΦ + σ²I)⁻¹ y,   ∇μ̂(u) = ∇φ(u)ᵀ w = −√(2/M) Vᵀ(sin(Vu + b) ∘ w)

Values are scaled to [0, 1] before a fit, as in the authors' code, and the scale is put back into gradients and weights.
Everything here is a function of tensors with fixed shapes: under ``torch.vmap`` it works for a block of clients.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedsim.rng import Key


class History(NamedTuple):
    """A client's latest queries, in a ring. ``x`` (H, d), ``y`` (H,), ``made`` (), int64: all queries ever made."""

    x: Tensor
    y: Tensor
    made: Tensor


def no_history(size: int, like: Tensor) -> History:
    """Room for ``size`` queries at points like ``like`` (d,)."""
    return History(like.new_zeros(size, len(like)), like.new_zeros(size), like.new_zeros((), dtype=torch.int64))


def noted(history: History, x: Tensor, y: Tensor) -> History:
    """The history with queries x (m, d) and y (m,) in the place of the oldest ones."""
    at = (history.made + torch.arange(len(y), device=y.device)) % len(history.y)
    return History(history.x.index_put((at,), x), history.y.index_put((at,), y), history.made + len(y))


def nearest(history: History, u: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` queries nearest to u (d,): x (count, d), y (count,), and 1, or 0 for room left over; float64."""
    distance = squares(history.x.double(), u.double()[None])[:, 0]
    distance = torch.where(torch.arange(len(distance), device=u.device) < history.made, distance, math.inf)
    at = distance.topk(count, largest=False)
    on = at.values.isfinite().double()
    return history.x[at.indices].double() * on[:, None], history.y[at.indices].double() * on, on


def squares(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² for a (n, d) and b (m, d), shape (n, m); exact to the last bits where points are close together."""
    a, b = a - b[0], b - b[0]
    return ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T).clamp(min=0)


class Surrogate(NamedTuple):
    """A Gaussian process on at most n points, float64. Rows that are not ``on`` are room for more."""

    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    on: Tensor  # (n,) 1 or 0
    factor: Tensor  # (n, n) Cholesky factor of K + σ²I; the identity where there is no point
    inverse: Tensor  # (n, n) A; 0 where there is no point
    square: Tensor  # (n, n) ‖x_τ − x_σ‖²


def fit(x: Tensor, y: Tensor, on: Tensor, length: float, noise: float) -> Surrogate:
    """Fit to points x (n, d) with values y (n,), those with ``on`` = 1."""
    square, both = squares(x, x), on[:, None] * on
    k = torch.exp(square / (-2 * length**2)) * both
    factor = torch.linalg.cholesky(k + torch.diag(noise * on + (1 - on)))
    half: Tensor = torch.linalg.solve_triangular(factor, torch.diag(on), upper=False)
    return Surrogate(x, y, on, factor, half.T @ half, square)


def room(gp: Surrogate, more: int) -> Surrogate:
    """The same surrogate with ``more`` empty rows at its end."""

    def grow(a: Tensor, diagonal: float) -> Tensor:
        n = len(a)
        out = pad(a, (0, more, 0, more))
        return out + torch.diag(pad(a.new_full((more,), diagonal), (n, 0)))

    x, y, on = pad(gp.x, (0, 0, 0, more)), pad(gp.y, (0, more)), pad(gp.on, (0, more))
    return Surrogate(x, y, on, grow(gp.factor, 1.0), grow(gp.inverse, 0.0), grow(gp.square, 0.0))


def learned(gp: Surrogate, first: Tensor, x: Tensor, y: Tensor, length: float, noise: float) -> Surrogate:
    """The surrogate with m more points in its empty rows from ``first``, shape (), on: O(n² m), not O(n³).

    With S = k(x, x) + σ²I − kᵀAk for the new points, the factor gains the rows [(L⁻¹k)ᵀ, chol S], and the inverse gains
    R S⁻¹ Rᵀ with R = [−Ak; I]: only positive terms are ever added to it.
    """
    m = len(y)
    x, y, rows = x.double(), y.double(), first + torch.arange(m, device=x.device)
    far = squares(gp.x, x)
    k = torch.exp(far / (-2 * length**2)) * gp.on[:, None]
    half = torch.linalg.solve_triangular(gp.factor, k, upper=False)
    among, eye = squares(x, x), torch.eye(m, dtype=x.dtype, device=x.device)
    new = torch.linalg.cholesky(torch.exp(among / (-2 * length**2)) + noise * eye - half.T @ half)
    back = torch.linalg.solve_triangular(gp.factor.T, half, upper=True)
    z = torch.linalg.solve_triangular(new, (-back).index_put((rows,), eye).T, upper=False)
    far = far.index_put((rows,), among)
    return Surrogate(
        gp.x.index_put((rows,), x),
        gp.y.index_put((rows,), y),
        gp.on.index_put((rows,), torch.ones_like(y)),
        gp.factor.index_put((rows,), half.index_put((rows,), new.T).T),
        gp.inverse + z.T @ z,
        gp.square.index_put((rows,), far.T).T.index_put((rows,), far.T).T,
    )


def scaled(y: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Values (n,) mapped to [0, 1], 0 where there is none, and the range, shape (), that they were divided by."""
    low, high = torch.where(on > 0, y, math.inf).amin(), torch.where(on > 0, y, -math.inf).amax()
    scale = (high - low).clamp(min=torch.finfo(y.dtype).tiny)
    return torch.where(on > 0, (y - low) / scale, 0.0), high - low


def slope(gp: Surrogate, u: Tensor, length: float) -> Tensor:
    """∇μ(u), shape (d,), at u (d,)."""
    y, scale = scaled(gp.y, gp.on)
    k = torch.exp(squares(gp.x, u[None])[:, 0] / (-2 * length**2)) * gp.on
    weight = torch.cholesky_solve(y[:, None], gp.factor)[:, 0] * k
    gradient: Tensor = scale * (weight @ (gp.x - u)) / length**2
    return gradient


def mean(gp: Surrogate, u: Tensor, length: float) -> Tensor:
    """μ(u), shape (), up to the lowest value among the points, which a gradient does not see."""
    y, scale = scaled(gp.y, gp.on)
    k = torch.exp(squares(gp.x, u[None])[:, 0] / (-2 * length**2)) * gp.on
    value: Tensor = scale * (torch.cholesky_solve(y[:, None], gp.factor)[:, 0] @ k)
    return value


def covariance(gp: Surrogate, u: Tensor, length: float) -> Tensor:
    """∂σ²(u), shape (d, d)."""
    k = torch.exp(squares(gp.x, u[None])[:, 0] / (-2 * length**2)) * gp.on
    j = torch.linalg.solve_triangular(gp.factor, k[:, None] * (gp.x - u) / length**2, upper=False)
    left: Tensor = torch.eye(len(u), dtype=u.dtype, device=u.device) / length**2 - j.T @ j
    return left


def doubt(gp: Surrogate, points: Tensor, length: float) -> Tensor:
    """The trace of ∂σ², shape (c,), at points (c, d), without forming a d × d matrix.

    With r_τ = ‖x_τ − u‖², (x_τ − u)·(x_σ − u) = (r_τ + r_σ − ‖x_τ − x_σ‖²)/2, so two products with n × n matrices serve
    all candidates.
    """
    r = squares(gp.x, points)
    k = torch.exp(r / (-2 * length**2)) * gp.on[:, None]
    known = (k * r * (gp.inverse @ k) - k * ((gp.inverse * gp.square) @ k) / 2).sum(0)
    return points.shape[1] / length**2 - known / length**4


class Features(NamedTuple):
    """``v`` (M, d) and ``b`` (M,): everybody with the seed has the same ones, so they never travel."""

    v: Tensor
    b: Tensor


def features(seed: int, count: int, dimension: int, length: float, like: Tensor) -> Features:
    """M = ``count`` features on R^d, in the dtype and on the device of ``like``."""
    return _features(seed, count, dimension, length, like.dtype, like.device)


@lru_cache(maxsize=2)
def _features(
    seed: int, count: int, dimension: int, length: float, dtype: torch.dtype, device: torch.device
) -> Features:
    g = Key.root(seed).at("features").wide()
    v = torch.randn(count, dimension, generator=g, dtype=torch.float64) / length
    b = torch.rand(count, generator=g, dtype=torch.float64) * (2 * math.pi)
    return Features(v.to(device, dtype), b.to(device, dtype))


def mapped(f: Features, x: Tensor) -> Tensor:
    """φ at points x (n, d), shape (n, M)."""
    waves = torch.cos(x.to(f.v.dtype) @ f.v.T + f.b)
    return waves * math.sqrt(2 / len(f.b))


def weights(f: Features, x: Tensor, y: Tensor, on: Tensor, noise: float) -> Tensor:
    """w (M,), float64, of points x (n, d) with values y (n,), those with ``on`` = 1."""
    y, scale = scaled(y, on)
    # The Gram matrix is as ill-conditioned as σ² is small: it is summed in float64, whatever the cosines are.
    phi = mapped(f, x).double() * on[:, None]
    gram = phi @ phi.T + torch.diag(noise * on + (1 - on))
    return scale * (phi.T @ torch.cholesky_solve(y[:, None], torch.linalg.cholesky(gram))[:, 0])


def surface(f: Features, w: Tensor, u: Tensor) -> Tensor:
    """∇φ(u)ᵀ w, shape (d,) in the dtype of u (d,), for weights w (M,)."""
    wave = torch.sin(f.v @ u.to(f.v.dtype) + f.b) * w.to(f.v.dtype)
    return (-math.sqrt(2 / len(f.b)) * (wave @ f.v)).to(u.dtype)
