"""Does the noise do what the ledger says? Canaries through the real path, and what they can be told apart by.

A canary is a contribution of ten times the clipping norm along a direction that only it has. Half of the directions are
sent and half are not; whoever sees every release and knows the directions (as the adversary of the definition does)
projects the releases on them. Under the Gaussian mechanism the projections of those that were sent are shifted by

    μ = √T / σ        standard deviations after T releases with every canary in each

(Nasr et al. 2023, arXiv:2302.07956; Andrew et al. 2023, arXiv:2302.03098). A smaller noise, a norm that is clipped per
tensor, weights that are not uniform, a wrong denominator: all of them show as μ̂ > μ. Beside it stand what μ̂ cannot see:
noise that repeats itself, noise that is missing where nobody came, and a sampler that is not the accountant's.

Rounds, blocks, the fold, the screen and the noise are those of a run; only the clients' work is the canaries'.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients import dp_sgd
from clients.sgd import SgdConfig, sgd
from fedsim import block, tree
from fedsim.block import Work
from fedsim.config import EngineConfig
from fedsim.data.dataset import Dataset, Federation, Split
from fedsim.grids.inline import InlineGrid
from fedsim.memory import Memory
from fedsim.privacy import Private
from fedsim.rng import Key
from fedsim.types import Batch, Done, Local, Mean, Payload, Phase, Schedule, Strategy, Task, Tree, Visit
from server import wrap
from server.loop import run_round
from server.reduce import collect, weighted_mean
from server.wrap import Mechanism

Floats = npt.NDArray[np.float64]

SIDE = 400  # directions of one trial, half of them sent
PARTS = (("first", 7), ("second", 143), ("third", 250))  # tensors of very different sizes, which each direction crosses
LOUD = 10.0  # canaries are so many times the clipping norm
LIMIT = 4.0  # standard errors that count as a finding: about one false alarm in 30,000


class Check(NamedTuple):
    """One thing that was measured: what it should be, what it was, and how many standard errors lie between them."""

    name: str
    claimed: float
    found: float
    z: float

    @property
    def passed(self) -> bool:
        return self.z <= LIMIT


def run(private: Private, trials: int = 50, seed: int = 0) -> list[Check]:
    """All checks for a prepared run; ``trials`` of 400 canaries each (50: a standard error of 1.6 % where σ is 2)."""
    key = Key.root(seed).at("audit")
    c = private.config
    if c.mode == "client":
        mechanism = Mechanism(private.sigma, c.clip or 1.0, SIDE // 2, None, c.adaptive)
        if c.adaptive:  # C must stand still for the canaries; its bits are released all the same
            mechanism = Mechanism(
                private.sigma, c.clip or 1.0, SIDE // 2, None,
                c.adaptive.model_copy(update={"rate": 1e-12, "bit_noise": max(SIDE / 40, private.sigma)}),
            )  # fmt: skip
        found = client_level(mechanism, trials, key)
        return [*found, *sampler(private.choose, private.population, private.cohort / private.population)]
    # The canaries' model is not the run's, and has no module: Opacus's own clipping is compared with this in the tests.
    return example_level(private.sigma, c.max_grad_norm or 1.0, "batched", trials, key)


def releases(sigma: float) -> int:
    """How many releases a trial has: enough for μ ≈ 1.6, at most 16."""
    return max(2, min(16, round((1.6 * sigma) ** 2)))


def directions(key: Key) -> Tensor:
    """SIDE orthonormal directions, one a row."""
    return torch.from_numpy(np.linalg.qr(key.numpy().standard_normal((SIDE, SIDE)))[0])


def split(rows: Tensor) -> Tree:
    """Vectors as named tensors, along the last axis."""
    return dict(zip((n for n, _ in PARTS), torch.split(rows, [k for _, k in PARTS], dim=-1), strict=True))


def joined(parts: Tree) -> Tensor:
    return torch.cat([parts[n].double() for n, _ in PARTS], dim=-1)


def verdict(name: str, sent: Floats, kept: Floats, mu: float) -> Check:
    """μ̂ = (mean of the projections that were sent − of those that were not) / the standard deviation of the latter."""
    sd = float(kept.std(ddof=1))
    found = float(sent.mean() - kept.mean()) / sd if sd > 0 else math.inf
    error = math.sqrt(1 / sent.size + 1 / kept.size + mu**2 / (2 * kept.size))
    return Check(name, mu, found, (found - mu) / error)


def spread(name: str, values: Floats, deviation: float) -> Check:
    """Noise that is too small. Noise that is too large costs accuracy and no privacy, and is no finding."""
    found = float(np.sqrt(np.mean(values**2)))
    return Check(name, deviation, found, (deviation - found) / (deviation / math.sqrt(2 * values.size)))


def thinnest(name: str, rows: Floats, deviation: float) -> Check:
    """The tensor with the least noise for its size; ``rows`` are whole releases."""
    parts = np.split(rows, np.cumsum([k for _, k in PARTS])[:-1], axis=1)
    return max((spread(name, part, deviation) for part in parts), key=lambda check: check.z)


def apart(name: str, rows: Floats) -> Check:
    """The largest correlation between rows of noise; they must be independent. By Bonferroni, over all pairs."""
    n, pairs = rows.shape[1], len(rows) * (len(rows) - 1) / 2
    unit = rows / np.sqrt((rows**2).sum(1, keepdims=True).clip(min=1e-300))
    largest = float(np.abs(unit @ unit.T - np.diag(np.ones(len(rows)))).max()) if len(rows) > 1 else 0.0
    return Check(name, 0.0, largest, largest * math.sqrt(n) - math.sqrt(2 * math.log(max(pairs, 1.0))))


def client_level(mechanism: Mechanism, trials: int, key: Key) -> list[Check]:
    """Canary clients of unequal sizes in every round, through ``run_round`` and the wrapper."""
    t, sigma, c = releases(mechanism.sigma), mechanism.value_sigma, mechanism.clip
    sent, kept, noise, empty = [], [], [], []
    for trial in range(trials):
        own = key.at("trial", trial)
        q = directions(own.at("directions"))
        federation = _unequal(SIDE // 2)
        strategy = wrap.client_level(_canaries(), _keyed(mechanism, own))
        rows = split(q[: SIDE // 2] * LOUD * c)
        memory = Memory({k: {"row": {n: x[k] for n, x in rows.items()}} for k in range(SIDE // 2)})
        grid, state = InlineGrid(federation, EngineConfig(block=64), memory), strategy.init(own.torch())
        everybody, seen = list(range(SIDE // 2)), []
        for round in range(1, t + 2):
            before = joined(strategy.params(state))
            # In the last round nobody comes: what is released then is noise alone.
            state, _ = run_round(strategy, state, round, everybody if round <= t else [], grid, own)
            seen.append(((joined(strategy.params(state)) - before) * mechanism.cohort / c).numpy())
        total = q.numpy() @ np.sum(seen[:-1], axis=0)
        sent.append(total[: SIDE // 2])
        kept.append(total[SIDE // 2 :])
        noise.append(np.stack([(q.numpy() @ x)[SIDE // 2 :] for x in seen[:-1]]))
        empty.append(seen[-1])
    out, mu = np.stack(kept), math.sqrt(t) / sigma
    large = np.stack(sent)[:, (np.arange(SIDE // 2) % 40) >= 30]
    return [
        verdict("canaries told apart (mu)", np.stack(sent), out, mu),
        verdict("those of the largest clients (mu)", large, out, mu),
        thinnest("noise where nobody came", np.stack(empty), sigma),
        apart("noise of two rounds (correlation)", np.concatenate(noise, axis=1)),
        apart("noise of two tensors (correlation)", _tensors(np.stack(empty))),
    ]


def _keyed(mechanism: Mechanism, key: Key) -> Mechanism:
    return Mechanism(mechanism.sigma, mechanism.clip, mechanism.cohort, key.at("noise"), mechanism.adaptive)


def _tensors(rows: Floats) -> Floats:
    """The first seven numbers of each tensor over all trials: one row a tensor."""
    starts = np.cumsum([0, *(k for _, k in PARTS)])[:-1]
    return np.stack([rows[:, s : s + PARTS[0][1]].ravel() for s in starts])


def _unequal(clients: int) -> Federation:
    """Clients with 1, 2, … 40 examples, whose numbers are all zero: canaries do not look at them."""
    sizes = 1 + np.arange(clients) % 40
    ends = np.cumsum([0, *sizes])
    data = Split(torch.zeros(int(ends[-1]), 1, dtype=torch.float64), torch.zeros(int(ends[-1]), dtype=torch.int64))
    parts = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    return Federation(Dataset("canaries", data, data, 2), parts, 0.0, Key.root(0))


def _canaries() -> Strategy[Tree]:
    """FedAvg whose clients always send what they remember."""
    zero = split(torch.zeros(SIDE, dtype=torch.float64))

    def init(shared: Payload, memory: Payload, visit: Visit) -> Tree:
        return memory["row"]

    def final(shared: Payload, row: Tree) -> Done:
        return Done({"delta": row}, {}, {})

    def finish(w: Tree, mean: Mean) -> Tree:
        return tree.add(w, mean.value["delta"])

    local = Local(init, (), final, lambda shared, generator: {"row": zero})
    phase = Phase(lambda w: {"params": w}, local, weighted_mean("uniform"), finish)
    return Strategy(lambda generator: zero, (phase,), lambda w: w, (frozenset({"delta"}),))


def example_level(sigma: float, clip: float, way: dp_sgd.Way, trials: int, key: Key) -> list[Check]:
    """Canary examples at one client a trial, through the block engine and ``clients.sgd``."""
    t = releases(sigma)
    task = _linear()
    q = directions(key.at("directions"))
    # One client a trial; all hold the same examples, and differ in their noise.
    x = (q[: SIDE // 2] * LOUD * clip).to(torch.float64)
    data = Split(x, torch.zeros(len(x), dtype=torch.int64))
    federation = Federation(
        Dataset("canaries", data, data, 2), [np.arange(len(x)) for _ in range(trials)], 0.0, Key.root(0)
    )

    def updates(batch_size: int, steps: int, name: str) -> Floats:
        config = SgdConfig(name="audit", lr=1.0, steps=steps, batch_size=batch_size)
        local = sgd(dp_sgd.private(task, sigma, clip, batch_size, way), config)
        work = Work(1, 0, local, {"params": task.init(key.torch())}, key.at(name))
        reports = InlineGrid(federation, EngineConfig(block=8, execution="batched"), Memory()).map(
            work, list(range(trials)), collect()
        )
        rows = torch.stack([joined(r.value["delta"]) for r in reports.folded])
        return np.asarray((-rows * min(batch_size, len(x)) / clip).numpy() @ q.numpy().T)

    whole = updates(len(x), t, "whole")
    # B = 1 of n: a third of the batches is empty, and each of them must be noised.
    rare = updates(1, 25, "rare")[:, SIDE // 2 :]
    first = updates(len(x), 1, "one")[:, SIDE // 2 :]
    return [
        verdict("canaries told apart (mu)", whole[:, : SIDE // 2], whole[:, SIDE // 2 :], math.sqrt(t) / sigma),
        spread("noise over batches that may be empty", rare, sigma * 5),
        spread("noise of one step", first, sigma),
        apart("noise of two clients (correlation)", first),
        *batches(key),
    ]


def _linear() -> Task:
    """F(w; i) = ⟨w, x_i⟩: the gradient of example i is x_i, and an update of rate 1 is −Σ x_i."""

    def predict(params: Tree, x: Tensor) -> Tensor:
        return x @ torch.cat([params[n] for n, _ in PARTS])

    def loss(params: Tree, batch: Batch) -> Tensor:
        each = predict(params, batch.x)
        return each.mean() if batch.weight is None else (batch.weight * each).sum() / batch.weight.sum().clamp(min=1)

    zero = split(torch.zeros(SIDE, dtype=torch.float64))
    return Task(lambda generator: dict(zero), predict, loss, lambda p, b: {}, 2, 1)


def sampler(choose: Callable[[int], Sequence[int]], population: int, rate: float, rounds: int = 2000) -> list[Check]:
    """Cohorts must be Poisson samples: their sizes binomial, each client in on its own, whoever it is."""
    cohorts = [choose(round) for round in range(1, rounds + 1)]
    return _poisson("cohort", cohorts, population, rate)


def batches(key: Key, examples: int = 40, size: int = 8, steps: int = 4000) -> list[Check]:
    """Batches must be Poisson samples at the rate that is accounted for."""
    drawn = block.batches(Schedule(size, steps=steps, sampling="poisson"), examples, key.at("batches"))
    return _poisson("batch", [b.tolist() for b in drawn], examples, size / examples)


def _poisson(what: str, samples: Sequence[Sequence[int]], population: int, rate: float) -> list[Check]:
    sizes, n = np.array([len(s) for s in samples], dtype=np.float64), len(samples)
    mean, variance = population * rate, population * rate * (1 - rate)
    checks = []
    if rate < 1:
        error = math.sqrt(variance / n)
        checks.append(
            Check(f"mean size of a {what}", mean, float(sizes.mean()), abs(float(sizes.mean()) - mean) / error)
        )
        # Fourth moment of the binomial: the variance of a sample variance.
        kurtosis = (1 - 6 * rate * (1 - rate)) / variance if variance else 0.0
        error = variance * math.sqrt((2 + kurtosis) / n)
        found = float(((sizes - mean) ** 2).mean())
        checks.append(Check(f"variance of a {what}'s size", variance, found, abs(found - variance) / error))
        overlap = np.array(
            [len(set(a) & set(b)) for a, b in zip(samples[::2], samples[1::2], strict=False)], dtype=float
        )
        both = population * rate**2
        error = math.sqrt(max(both * (1 - rate**2), 1e-12) / len(overlap))
        checks.append(
            Check(
                f"members that two {what}s share",
                both,
                float(overlap.mean()),
                abs(float(overlap.mean()) - both) / error,
            )
        )
    else:
        checks.append(
            Check(f"mean size of a {what}", mean, float(sizes.mean()), 0.0 if (sizes == mean).all() else math.inf)
        )
    return checks


def report(private: Private, trials: int = 50, seed: int = 0) -> tuple[list[str], bool]:
    """The checks as lines of text, and whether all passed."""
    checks = run(private, trials, seed)
    lines = [f"{'':<8}{'':<42}{'claimed':>10}{'found':>10}{'z':>8}"]
    for check in checks:
        word = "passed" if check.passed else "FAILED"
        lines.append(f"{word:<8}{check.name:<42}{check.claimed:>10.4f}{check.found:>10.4f}{check.z:>8.2f}")
    lines.append(f"{trials * SIDE} canaries, noise multiplier {private.sigma:.6g}, mode '{private.config.mode}'")
    return lines, all(check.passed for check in checks)
