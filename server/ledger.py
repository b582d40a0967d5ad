"""What privacy has cost: the releases of a run, and the ε that they come to. A ledger is a value.

An entry (σ, q, steps) says: ``steps`` times, a Poisson sample at rate q was summed after each unit's contribution had
been clipped to C, and Gaussian noise of deviation σ C was added. A history is a unit's entries. ε is for add/remove
adjacency, and that of the ledger is that of its worst unit.

    rdp   Rényi DP (Mironov 2017, arXiv:1702.07476; Mironov et al. 2019, arXiv:1908.10530), by Opacus, converted as in
          Balle et al. 2020 (arXiv:1905.09982), Theorem 21
    prv   the privacy loss's distribution by FFT (Gopi et al. 2021, arXiv:2106.02848), by Opacus; its upper bound
    pld   the same, discretised pessimistically (Koskela et al. 2020, arXiv:1906.03049), by dp-accounting

All three are upper bounds. The central-limit accountant ("gdp") is not one, so it is not here. The only file of the
server that imports opacus and dp_accounting; both are loaded when they are first asked for.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.config import MAX_NOISE, MAX_STEPS, MIN_NOISE
from fedsim.errors import ConfigError, FedsimError

Accountant = Literal["rdp", "prv", "pld"]

# Those of dp-accounting. Opacus's own grid is finer below 11 and ends at 63, which costs up to 80 % at small q.
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
PRV_ERROR = 0.01  # Opacus's own
PLD_INTERVAL = 1e-3
MAX_POINTS = 1 << 23  # of a discretised distribution: about a dozen arrays of 64 MiB at the peak
CLOSE = 0.995  # a calibrated σ spends at least this share of its target


class Entry(NamedTuple):
    """``steps`` releases with noise multiplier ``sigma``, each on a Poisson sample at rate ``q``."""

    sigma: float
    q: float
    steps: int


History = tuple[Entry, ...]


class Ledger(NamedTuple):
    """The history of each unit that spends on its own: of each client's examples, or the one of all clients."""

    histories: dict[int, History]

    def spend(self, costs: Mapping[int, History]) -> "Ledger":
        """The ledger after these units have spent so much more."""
        return Ledger(self.histories | {unit: merge((*self.histories.get(unit, ()), *c)) for unit, c in costs.items()})

    def epsilon(self, delta: float, accountant: Accountant) -> float:
        """The worst unit's ε; 0 where nothing was released."""
        return worst(set(self.histories.values()), delta, accountant)[0]

    def releases(self) -> int:
        """How often the unit that took part most often was summed and noised."""
        return max((sum(e.steps for e in h) for h in self.histories.values()), default=0)

    def dump(self) -> dict[str, Any]:
        """As JSON, which keeps every bit of a number."""
        return {str(unit): [list(entry) for entry in history] for unit, history in self.histories.items()}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> "Ledger":
        return cls({int(unit): tuple(Entry(*entry) for entry in history) for unit, history in dumped.items()})


EMPTY = Ledger({})


def merge(entries: Iterable[Entry]) -> History:
    """Entries that differ in steps alone become one; in order of first appearance."""
    steps: dict[tuple[float, float], int] = {}
    for sigma, q, n in entries:
        steps[sigma, q] = steps.get((sigma, q), 0) + n
    return tuple(Entry(sigma, q, n) for (sigma, q), n in steps.items() if n)


def epsilon(history: History, delta: float, accountant: Accountant) -> float:
    """ε of one history at δ; 0 for none. Raises ``ConfigError`` for what the accountant cannot be asked."""
    check(history, delta)
    if not history:
        return 0.0
    value = _ACCOUNTANTS[accountant](history, delta)
    if not value >= 0 and not math.isnan(value):
        return 0.0  # tiny budgets: the conversion's formula goes below zero
    if math.isnan(value):
        raise ConfigError(f"privacy.accountant: '{accountant}' has no answer for {history} at delta {delta}")
    return value


def worst(histories: Iterable[History], delta: float, accountant: Accountant) -> tuple[float, History]:
    """The largest ε, and a history that has it.

    RDP is an upper bound of what the other accountants give, and cheap; so they are only asked about histories whose
    RDP lies above the largest answer so far.
    """
    first = sorted(((epsilon(h, delta, "rdp"), h) for h in histories), reverse=True)
    if accountant == "rdp":
        return first[0] if first else (0.0, ())
    best: tuple[float, History] = (0.0, ())
    for bound, history in first:
        if best[1] and bound <= best[0]:
            break
        best = max(best, (epsilon(history, delta, accountant), history))
    return best


def check(history: History, delta: float) -> None:
    """Refuse, before a library is asked, what it would answer with nonsense or with all of the memory."""
    if not 1e-16 <= delta < 1:
        raise ConfigError(f"privacy.delta: must be at least 1e-16 and less than 1 (got {delta})")
    for sigma, q, _ in history:
        if not MIN_NOISE <= sigma <= MAX_NOISE:
            raise ConfigError(f"privacy.noise_multiplier: must be in {MIN_NOISE}..{MAX_NOISE:g} (got {sigma})")
        if not 0 < q <= 1:
            raise ConfigError(f"privacy: a sampling rate must be in 0..1 (got {q})")
    if (steps := sum(entry.steps for entry in history)) > MAX_STEPS:
        raise ConfigError(f"rounds: {steps} noisy steps; accountants are asked for at most {MAX_STEPS}")


@lru_cache(maxsize=100_000)
def _rdp_of_a_step(sigma: float, q: float) -> npt.NDArray[np.float64]:
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.asarray(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=ORDERS))


def _rdp(history: History, delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(_rdp_of_a_step(sigma, q) * steps for sigma, q, steps in history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "optimal order is the largest": it is a bound all the same
        return float(get_privacy_spent(orders=ORDERS, rdp=total, delta=delta)[0])


@lru_cache(maxsize=4096)
def _prv(history: History, delta: float) -> float:
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV
    from opacus.accountants.analysis.prv.domain import compute_safe_domain_size

    steps = [entry.steps for entry in history]
    prvs = [PoissonSubsampledGaussianPRV(q, sigma) for sigma, q, _ in history]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = compute_safe_domain_size(prvs, steps, PRV_ERROR, delta / 1000)
        points = 2 * half / (PRV_ERROR / math.sqrt(sum(steps) * math.log(12_000 / delta) / 2))
        if points > MAX_POINTS:
            need = points * 8 * 12 / 2**30
            raise ConfigError(f"privacy.accountant: 'prv' would need {need:.1f} GiB here; 'rdp' needs nothing")
        accountant = PRVAccountant()
        accountant.history = [tuple(entry) for entry in history]
        return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))


@lru_cache(maxsize=256)
def _pld_of_a_step(sigma: float, q: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=PLD_INTERVAL)


@lru_cache(maxsize=4096)
def _pld(history: History, delta: float) -> float:
    # RDP bounds how far the distribution reaches, and so what it takes to hold it.
    if (points := 2 * _rdp(history, 1e-15) / PLD_INTERVAL) > MAX_POINTS:
        need = points * 8 * 12 / 2**30
        raise ConfigError(f"privacy.accountant: 'pld' would need {need:.1f} GiB here; 'rdp' needs nothing")
    composed = None
    for sigma, q, steps in history:
        part = _pld_of_a_step(sigma, q).self_compose(steps)
        composed = part if composed is None else composed.compose(part)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


_ACCOUNTANTS: dict[str, Callable[[History, float], float]] = {"rdp": _rdp, "prv": _prv, "pld": _pld}


@cache
def title(accountant: Accountant) -> str:
    """The accountant by name, with the library and its version."""
    package = "dp-accounting" if accountant == "pld" else "opacus"
    names = {"rdp": "Rényi DP", "prv": "privacy random variables", "pld": "privacy loss distributions"}
    return f"{names[accountant]} ({accountant}, {package} {version(package)})"


def calibrate(
    histories: Callable[[float], Sequence[History]], target: float, delta: float, accountant: Accountant
) -> float:
    """The smallest σ, to within 0.5 % of ε, at which ``histories(σ)`` cost at most ``target``: never more.

    Raises ``ConfigError`` for a target that no noise in the allowed range meets; it says which ones can be met.
    """
    # One history is followed, the worst; the others are looked at again when its σ is found.
    units = list(histories(1.0))
    at = units.index(worst(set(units), delta, accountant)[1])
    for _ in range(len(units) + 1):
        sigma = _solve(lambda s, at=at: epsilon(histories(s)[at], delta, accountant), target)  # type: ignore[misc]
        units = list(histories(sigma))
        cost, leader = worst(set(units), delta, accountant)
        if cost <= target:
            return sigma
        at = units.index(leader)
    raise FedsimError(f"privacy.target_epsilon: no noise multiplier was found for {target:g}")


def _solve(cost: Callable[[float], float], target: float) -> float:
    """σ with CLOSE · target ≤ cost(σ) ≤ target; ``cost`` falls as σ grows, about like a power of it."""
    if (least := cost(MAX_NOISE)) > target:
        raise ConfigError(f"privacy.target_epsilon: must be at least {least:.4g} for these rounds (got {target:g})")
    low: tuple[float, float] | None = None  # (σ, its cost), above the target
    high, high_cost, sigma = MAX_NOISE, least, 1.0
    for attempt in itertools.count():
        found = cost(sigma)
        if CLOSE * target <= found <= target:
            return sigma
        if found > target:
            low = sigma, found
        else:
            high, high_cost = sigma, found
            if sigma == MIN_NOISE:
                raise ConfigError(
                    f"privacy.target_epsilon: must be at most {found:.4g}, which is what the smallest noise multiplier "
                    f"that is accounted for ({MIN_NOISE}) costs (got {target:g})"
                )
        if low is None:
            sigma = max(sigma / 2, MIN_NOISE)
        elif high == MAX_NOISE:
            sigma = min(sigma * min(max(found / target, 1.2), 8.0), MAX_NOISE * 0.999)
        elif high / low[0] < 1 + 1e-9:
            return high
        else:
            sigma = _between(low, (high, high_cost), (1 + CLOSE) / 2 * target if attempt % 4 else None)
    raise AssertionError


def _between(low: tuple[float, float], high: tuple[float, float], aim: float | None) -> float:
    """The next σ to try: where a power law through both ends has ``aim``, or the middle."""
    middle = math.sqrt(low[0] * high[0])
    if aim is None or high[1] <= 0:
        return middle
    share = math.log(low[1] / aim) / math.log(low[1] / high[1])
    sigma = low[0] * (high[0] / low[0]) ** share
    return sigma if low[0] < sigma < high[0] else middle
