"""`fzoos`: what a local step of FZooS costs beside the queries, against scikit-learn doing the same work.

A "round" is a visit of ten local steps at d = 300, n = 500 points and M = 10,000 features: in each step 5 of 100
candidates are chosen, 6 points are learned, and the gradients of the surrogate and of the correction are taken. Ours is
``clients.surrogate``. The others fit a GaussianProcessRegressor before and after the choice; its gradient is a forward
difference of its mean. What they do in a step:

    scikit-learn            as the authors' released code: d + 1 calls, and the length of the kernel is fitted, though
                            from one start only (theirs: from 21, so that this is less than a tenth of its time)
    kernel given            the same without that fit
    kernel given, at once   all points of the difference in one call, which their code does not do

    python fzoos.py SPEC.json      SPEC's "arm" is one of these, or begins with "fedsim"
"""

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clients import surrogate
from clients.surrogate import doubt, learned, room, slope, surface
from fedsim.rng import Key

STEPS, ACTIVE, CANDIDATES, NOISE, H = 10, 5, 100, 1e-4, 1e-7


class World(NamedTuple):
    """What a visit begins with, and what its queries answer (there is no function behind it)."""

    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    u: Tensor  # (STEPS, d) where the steps are
    candidates: Tensor  # (STEPS, CANDIDATES, d)
    w: Tensor  # (M,) w − w_i
    features: surrogate.Features


def world(n: int, d: int, m: int) -> World:
    g = Key.root(0).at("bench", "fzoos").torch()
    x, u = (0.5 + 0.1 * torch.randn(count, d, generator=g, dtype=torch.float64) for count in (n, STEPS))
    near = u[:, None] + 0.02 * torch.rand(STEPS, CANDIDATES, d, generator=g, dtype=torch.float64) - 0.01
    w = torch.randn(m, generator=g, dtype=torch.float64)
    return World(x, answer(x), u, near, w, surrogate.features(0, m, d, 1.0, x))


def answer(x: Tensor) -> Tensor:
    """A quadratic, for queries (n, d)."""
    return ((x - 0.3) ** 2).sum(1)


def ours(of: World) -> Iterator[tuple[Tensor, Tensor]]:
    """Each step's two gradients."""
    more = STEPS * (ACTIVE + 1)
    on = torch.ones(len(of.y) - more, dtype=torch.float64)
    gp = room(surrogate.fit(of.x[more:], of.y[more:], on, 1.0, NOISE), more)
    row = torch.tensor(len(on))
    for u, near in zip(of.u, of.candidates, strict=True):
        points = torch.cat([near[doubt(gp, near, 1.0).topk(ACTIVE).indices], u[None]])
        gp, row = learned(gp, row, points, answer(points), 1.0, NOISE), row + len(points)
        yield slope(gp, u, 1.0), surface(of.features, of.w, u)


def theirs(of: World, way: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same with scikit-learn."""
    from scipy.optimize import approx_fprime
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    more, d = STEPS * (ACTIVE + 1), of.x.shape[1]
    x, y = of.x[more:].numpy(), of.y[more:].numpy()
    v, b, w = of.features.v.numpy(), of.features.b.numpy(), of.w.numpy()

    def fit(given: bool = True) -> Any:
        kernel, optimizer = (RBF(1.0, "fixed"), None) if given else (RBF(1.0), "fmin_l_bfgs_b")
        return GaussianProcessRegressor(kernel, alpha=NOISE, optimizer=optimizer).fit(x, (y - y.min()) / np.ptp(y))

    def gradient(gp: Any, u: Any) -> Any:
        if way != "kernel given, at once":
            return approx_fprime(u, lambda p: gp.predict(p[None]).item(), H)
        f = gp.predict(np.concatenate([u[None], u + H * np.eye(d)]))
        return (f[1:] - f[0]) / H

    for u, near in zip(of.u.numpy(), of.candidates.numpy(), strict=True):
        _, deviation = fit().predict(near, return_std=True)
        points = np.concatenate([near[np.argsort(-deviation)[:ACTIVE]], u[None]])
        x, y = np.concatenate([x, points]), np.concatenate([y, answer(torch.from_numpy(points)).numpy()])
        shared = -np.sqrt(2 / len(b)) * ((np.sin(v @ u + b) * w) @ v)
        yield torch.from_numpy(gradient(fit(way != "scikit-learn"), u) * np.ptp(y)), torch.from_numpy(shared)


def main(spec: dict[str, Any], rounds: int = 3) -> None:
    """Run an arm: the events that ``fedsim.benches.arms`` describes."""
    arm = spec["arm"].removesuffix("-fzoos")
    visit = ours if arm.startswith("fedsim") else partial(theirs, way=arm)
    of = world(500, 300, 10_000)
    for number in range(1, rounds + 1):
        for _ in visit(of):
            pass
        event = {"event": "round", "round": number, "cpu": time.process_time(), "time": time.monotonic()}
        print(json.dumps(event), flush=True)
    print(json.dumps({"event": "end", "accuracy": None}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
