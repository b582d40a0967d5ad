"""What a private run would cost, before it is run: σ, ε over the rounds, and what other choices would come to."""

from collections.abc import Callable, Iterator
from pathlib import Path

from fedsim import files
from fedsim.config import MAX_NOISE, MIN_NOISE
from fedsim.errors import ConfigError
from fedsim.privacy import Account, Private
from fedsim.report import figures
from server import ledger
from server.ledger import EMPTY, Accountant, History, Ledger

ACCOUNTANTS: tuple[Accountant, ...] = ("rdp", "prv", "pld")
TARGETS = (0.5, 1.0, 2.0, 4.0, 8.0)
POINTS = 10


def lines(private: Private) -> Iterator[str]:
    """The plan as text."""
    c = private.config
    end = private.after(private.rounds)
    yield f"mode              {c.mode}"
    yield f"rounds            {private.rounds}"
    yield f"noise multiplier  {private.sigma:.6g}" + (" (found for the target)" if c.target_epsilon else "")
    yield f"delta             {c.delta:g}"
    if c.noise == "seeded":
        yield "claim             none: the noise is seeded. What follows is for secret noise"
    budget = private.budget
    if budget is not None:
        last = Account(private, EMPTY).affordable(0, private.rounds)
        stop = "all rounds are affordable" if last == private.rounds else f"the run will stop after round {last}"
        yield f"budget            epsilon {budget:g}: {stop}"
    yield ""
    yield "epsilon           " + "".join(f"{name:>12}" for name in ACCOUNTANTS)
    for round in rounds(private.rounds):
        spent = private.after(round)
        yield f"  round {round:<10}" + "".join(f"{_or_dash(spent, c.delta, name):>12}" for name in ACCOUNTANTS)
    yield ""
    yield f"to spend          noise multiplier over {private.rounds} rounds ({c.accountant})"
    for target in TARGETS:
        yield f"  epsilon {target:<8g}{noise_for(end, private, target):>12}"
    yield ""
    least = at(end, MAX_NOISE).epsilon(c.delta, c.accountant)
    yield f"smallest reachable epsilon: {least:.4g}, at noise multiplier {MAX_NOISE:g}, the largest accounted for"


def rounds(last: int) -> list[int]:
    """At most POINTS rounds, evenly spread, the last one among them."""
    return sorted({max(1, round(last * i / POINTS)) for i in range(1, POINTS + 1)})


def at(spent: Ledger, sigma: float) -> Ledger:
    """The same releases with another noise multiplier."""
    return Ledger({unit: tuple(e._replace(sigma=sigma) for e in h) for unit, h in spent.histories.items()})


def noise_for(spent: Ledger, private: Private, target: float) -> str:
    """σ that makes these releases cost ``target``; a word where there is none."""
    c = private.config

    def histories(sigma: float) -> list[History]:
        return list(at(spent, sigma).histories.values())

    try:
        return f"{ledger.calibrate(histories, target, c.delta, c.accountant):.4g}"
    except ConfigError:
        reachable = at(spent, MIN_NOISE).epsilon(c.delta, "rdp") > target
        return "unreachable" if reachable else f"below {MIN_NOISE}"


def _or_dash(spent: Ledger, delta: float, accountant: Accountant) -> str:
    try:
        return f"{spent.epsilon(delta, accountant):.4f}"
    except ConfigError:  # what this accountant cannot hold in memory
        return "-"


def picture(private: Private, path: Path) -> None:
    """ε over the rounds: of the run, and with half and twice its noise."""
    c, where = private.config, rounds(private.rounds)

    def curve(label: str, of: Callable[[Ledger], Ledger]) -> figures.Curve:
        return figures.Curve(label, where, [of(private.after(r)).epsilon(c.delta, c.accountant) for r in where])

    curves = [curve(f"σ = {private.sigma:.3g}", lambda spent: spent)]
    for factor in (0.5, 2.0):
        sigma = private.sigma * factor
        if MIN_NOISE <= sigma <= MAX_NOISE:
            curves.append(curve(f"σ = {sigma:.3g}", lambda spent, sigma=sigma: at(spent, sigma)))  # type: ignore[misc]
    svg = figures.chart("epsilon", f"Privacy loss ε at δ = {c.delta:g} ({c.accountant})", curves, wide=True)
    files.write(path, figures.standalone(svg).encode())
