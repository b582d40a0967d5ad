"""Middleware: functions Phase → Phase and Strategy → Strategy, put around a strategy that need not know of them.

Client-level differential privacy (McMahan et al. 2018, arXiv:1710.06963), add/remove adjacency of one client:

    cohort   each of N clients on its own with probability q               (``sampling.poisson``)
    client   Δ_k ← Δ_k · min(1, C/‖Δ_k‖)          the norm over all tensors of all channels that travel
    server   Δ  ← (Σ Δ_k + N(0, (σ C)² I)) / (q N)    uniform weights, a fixed denominator, noise also on an empty sum

With adaptive clipping (Andrew et al. 2021, arXiv:1905.03871) each client's bit b_k = [‖Δ_k‖ ≤ C] is summed too:

    b ← ½ + (Σ (b_k − ½) + N(0, σ_b²)) / (q N),   C ← C exp(−η_C (b − γ)),   σ_Δ = (σ⁻² − (2σ_b)⁻²)^(−½)

so that sum and bits together are one Gaussian mechanism with noise multiplier σ: that is what the ledger gets.

Floating point. Norms, sums and noise are in float64; the noisy sum is rounded to a grid of 2⁻²⁰ standard deviations
before it is cast, once, to the model's dtype. This takes the low bits away through which the noise of a float32 sum can
be told apart (Mironov 2012; Jin et al. 2021, arXiv:2112.05307). It is a mitigation, not a proof.
"""

import math
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fedsim import tree
from fedsim.config import AdaptiveClip
from fedsim.errors import ConfigError
from fedsim.rng import Key
from fedsim.types import Done, Local, Mean, Payload, Phase, Reducer, Report, Strategy, Visit

S = TypeVar("S")

CHANNEL = "privacy"  # of the broadcast: the norm that this round's updates are clipped to
GRID = 2.0**-20  # of a standard deviation


def silent(strategy: Strategy[S], secret: bool) -> Strategy[S]:
    """The strategy without its clients' metrics; ``secret``: its draws protect somebody.

    A training loss is a function of raw examples, and has no noise.
    """
    phases = tuple(phase._replace(local=_silent(phase.local, secret)) for phase in strategy.phases)
    return strategy._replace(phases=phases)


def _silent(local: Local, secret: bool) -> Local:
    def final(shared: Payload, carry: Any) -> Done:
        return local.final(shared, carry)._replace(metrics={})

    return local._replace(final=final, secret=secret)


@dataclass(frozen=True)
class Mechanism:
    """What the server does to a cohort's updates. ``key`` names the noise; without it, no round can be finished."""

    sigma: float  # σ, what the ledger counts
    clip: float  # C, or the first C where it is adaptive
    cohort: int  # q N, the expected number of clients: the denominator
    key: Key | None
    adaptive: AdaptiveClip | None = None
    repeatable: bool = False  # the noise follows from round and phase alone, and protects nobody

    @property
    def bit_sigma(self) -> float:
        """σ_b."""
        assert self.adaptive
        return self.adaptive.bit_noise or self.cohort / 20

    @property
    def value_sigma(self) -> float:
        """σ_Δ; σ where no bits are released."""
        if self.adaptive is None:
            return self.sigma
        rest = self.sigma**-2 - (2 * self.bit_sigma) ** -2
        if rest <= 0:
            raise ConfigError(
                f"privacy.adaptive.bit_noise: must be greater than {self.sigma / 2:g}, half the noise multiplier "
                f"(got {self.bit_sigma:g})"
            )
        return float(rest**-0.5)


class Guarded(NamedTuple, Generic[S]):
    """The state of a strategy under client-level privacy."""

    inner: S
    round: int  # rounds finished
    clip: float  # C of the next round


class Clipped(NamedTuple):
    """A client's update after clipping, in float64, and b_k − ½; also their sum."""

    value: Payload
    bit: float


def client_level(strategy: Strategy[S], mechanism: Mechanism) -> Strategy[Guarded[S]]:
    """The strategy under client-level privacy: every phase releases one noisy sum a round.

    Raises ``ConfigError`` where a reduction is not a uniform mean, nothing is sent, or the model itself is.
    """
    _ = mechanism.value_sigma
    if mechanism.adaptive and len(strategy.phases) > 1:
        raise ConfigError("privacy.adaptive: needs a strategy of one exchange a round; phases differ in their norms")
    quiet = silent(strategy, not mechanism.repeatable)
    state, memory = strategy.init(Key.root(0).at("template").torch()), Payload()
    phases: list[Phase[Guarded[S]]] = []
    for i, phase in enumerate(quiet.phases):
        # One round of nothing, in which nobody's data is seen: it gives the shapes, and finds what cannot work.
        done = rehearse(phase, i, state, memory)
        phases.append(noisy(phase, i, len(quiet.phases), mechanism, done.value))
        state, memory = rehearsed(phase, state, done.value, mechanism), done.memory or memory

    def gauges(state: Guarded[S]) -> dict[str, float]:
        own = strategy.gauges(state.inner) if strategy.gauges else {}
        return own | ({"clip": state.clip} if mechanism.adaptive else {})

    export, change = strategy.export, cast(Any, strategy)._replace  # a state of another type, all else as it was
    guarded: Strategy[Guarded[S]] = change(
        init=lambda generator: Guarded(strategy.init(generator), 0, mechanism.clip),
        phases=tuple(phases),
        params=lambda state: strategy.params(state.inner),
        gauges=gauges,
        export=(lambda state: export(state.inner)) if export else None,
    )
    return guarded


def noisy(phase: Phase[S], i: int, phases: int, mechanism: Mechanism, template: Payload) -> Phase[Guarded[S]]:
    """Phase ``i`` of ``phases`` with its mean replaced by the mechanism. ``template``: an example of what is sent."""

    def broadcast(state: Guarded[S]) -> Payload:
        return {**phase.broadcast(state.inner), CHANNEL: {"clip": torch.tensor(state.clip, dtype=torch.float64)}}

    def screen(shared: Payload, report: Report) -> Clipped:
        return clip(conform(report.value, template), float(shared[CHANNEL]["clip"]))

    def lift(clipped: Clipped) -> Clipped:
        if not isinstance(clipped, Clipped):
            raise TypeError("an update that was not screened cannot be summed under privacy")
        return clipped

    def finish(state: Guarded[S], total: Clipped) -> Guarded[S]:
        key = stream(mechanism, state.round, i, total)
        value = release(total, template, mechanism, state.clip, key)
        inner = phase.finish(state.inner, Mean(value, {}, mechanism.cohort, 0))
        last = i == phases - 1
        bound = next_clip(state.clip, total.bit, mechanism, key.at("clip")) if mechanism.adaptive else state.clip
        return Guarded(inner, state.round + last, bound)

    nothing = Clipped({}, 0.0)
    reduce = Reducer(lift, add, lambda total: nothing if total is None else total, screen, "uniform")
    return Phase(broadcast, phase.local, reduce, finish)


def refuse(phase: Phase[Any], i: int) -> None:
    """Refuse a reduction whose result one clipped client could still change by more than C."""
    if phase.reduce.mean == "examples":
        raise ConfigError(
            "strategy.weighting: must be 'uniform' under privacy.mode = 'client': a client with many examples would "
            "move a mean weighted by examples by more than its share (got 'examples')"
        )
    if phase.reduce.mean is None:
        raise ConfigError(
            f"privacy.mode: 'client' needs a strategy that reduces by a mean alone; exchange {i + 1} of this one looks "
            "at every client's update (a median, Krum, a norm of each), which clipping and noise do not cover"
        )


def rehearse(phase: Phase[S], i: int, state: S, memory: Payload) -> Done:
    """What a client sends and remembers after a visit without any data: its names, shapes and dtypes.

    Raises ``ConfigError`` where nothing is sent, or a channel is the model and not a change of it, which clipping would
    pull to zero.
    """
    refuse(phase, i)
    shared, device = phase.broadcast(state), "cpu"
    for part in shared.values():
        for x in part.values():
            device = str(x.device)
    one = torch.ones((), device=device)
    if not memory and phase.local.remember:
        memory = phase.local.remember(shared, Key.root(0).torch())
    done = phase.local.final(shared, phase.local.init(shared, memory, Visit(1, one.long(), one.long())))
    if not any(done.value.values()):
        raise ConfigError("privacy.mode: 'client' protects what clients send, and this strategy's send nothing")
    model = shared.get("params", {})
    moved = any(x.any() for x in model.values())
    for channel, part in done.value.items():
        if moved and part.keys() == model.keys() and all(torch.equal(part[n], model[n]) for n in model):
            raise ConfigError(
                f"privacy.mode: 'client' clips a change of the model, and '{channel}' is the model itself"
            )
    return done


def rehearsed(phase: Phase[S], state: S, value: Payload, mechanism: Mechanism) -> S:
    """The state after a mean of zeros. ``ConfigError`` where the server reads a metric of its clients."""
    zeros = {c: {n: torch.zeros_like(x) for n, x in part.items()} for c, part in value.items()}
    try:
        return phase.finish(state, Mean(zeros, {}, mechanism.cohort, 0))
    except KeyError as e:
        raise ConfigError(
            f"privacy.mode: 'client' gives the server no metrics of its clients, and this strategy's reads {e}"
        ) from e
    except ArithmeticError:  # nothing is divided by nothing in a run: there, the mean has noise
        return state


def conform(value: Payload, template: Payload) -> Payload:
    """The update in float64, if it has the names and shapes that are expected; else ``ValueError``."""
    if {c: set(part) for c, part in value.items()} != {c: set(part) for c, part in template.items()}:
        raise ValueError("its update has other tensors than expected")
    for channel, part in template.items():
        for name, x in part.items():
            if value[channel][name].shape != x.shape:
                got = tuple(value[channel][name].shape)
                raise ValueError(f"its update has shape {got} where {tuple(x.shape)} is expected ({channel}: {name})")
    return {c: {n: value[c][n].to(torch.float64) for n in part} for c, part in template.items()}


def clip(value: Payload, bound: float) -> Clipped:
    """Scale an update to a norm of at most ``bound``. ``ValueError`` for one with an element that is not finite."""
    size = norm(value)
    if math.isnan(size):
        raise ValueError("NaN or Inf in its update")
    if size == math.inf:  # its elements are finite, and their norm is beyond float64: bring both into range
        small = {c: {n: x * 2.0**-600 for n, x in part.items()} for c, part in value.items()}
        return clip(small, bound)._replace(bit=-0.5)
    factor = min(1.0, bound / size) if size > 0 else 1.0
    scaled = {c: {n: x * factor for n, x in part.items()} for c, part in value.items()}
    return Clipped(scaled, 0.5 if size <= bound else -0.5)


def norm(value: Payload) -> float:
    """‖value‖ over every tensor of every channel, in float64; NaN where an element is not finite."""
    tensors = [x for part in value.values() for x in part.values() if x.numel()]
    plain = math.fsum(float(x.square().sum()) for x in tensors)
    if 1e-250 < plain < 1e250:
        return math.sqrt(plain)
    # Squares that left the range of float64: scaled by the largest element they cannot.
    if not all(bool(x.isfinite().all()) for x in tensors):
        return math.nan
    largest = max((float(x.abs().max()) for x in tensors), default=0.0)
    if largest == 0:
        return 0.0
    return largest * math.sqrt(math.fsum(float((x / largest).square().sum()) for x in tensors))


def add(a: Clipped, b: Clipped) -> Clipped:
    """The sum of two, formed in the first."""
    for channel, part in a.value.items():
        for name, x in part.items():
            x.add_(b.value[channel][name])
    return Clipped(a.value, a.bit + b.bit)


def stream(mechanism: Mechanism, round: int, phase: int, total: Clipped) -> Key:
    """The noise of this sum in this round and phase, and of no other.

    A round that is run again gives the same sum, and is then the same release; but if somebody is missing this time,
    the same noise would cancel out of the difference, and leave what the missing one had sent. To who does not have
    the key, streams of different names are unrelated.
    """
    if mechanism.key is None:
        raise ValueError("only the server has the key that the noise is drawn from")
    key = mechanism.key.at("noise", round, "phase", phase)
    if mechanism.repeatable:
        return key
    bits = {"bits": {"sum": torch.tensor(total.bit, dtype=torch.float64)}}
    return key.at("sum", tree.payload_digest({**total.value, **bits}))


def release(total: Clipped, template: Payload, mechanism: Mechanism, bound: float, key: Key) -> Payload:
    """(Σ + N(0, (σ_Δ C)²)) / (q N), in the dtypes of ``template``; without any client too, where the sum is 0."""
    deviation = mechanism.value_sigma * bound
    return {
        channel: {
            name: noised(total.value.get(channel, {}).get(name), x, deviation, mechanism.cohort, key.at(channel, name))
            for name, x in part.items()
        }
        for channel, part in template.items()
    }


def noised(total: Tensor | None, like: Tensor, deviation: float, denominator: int, key: Key) -> Tensor:
    """One tensor of a release."""
    noise = torch.from_numpy(np.asarray(gaussian(key, deviation, tuple(like.shape)))).to(like.device)
    noisy = noise if total is None else total + noise
    grid = 2.0 ** math.floor(math.log2(deviation * GRID))  # a power of two: dividing by it is exact
    return (torch.round(noisy / grid) * grid / denominator).to(like.dtype)


def gaussian(key: Key, deviation: float, shape: tuple[int, ...]) -> Any:
    """N(0, deviation²) in float64, from the Philox stream of this name."""
    return key.numpy().standard_normal(shape) * deviation


def next_clip(bound: float, bits: float, mechanism: Mechanism, key: Key) -> float:
    """C after a round in which Σ (b_k − ½) = ``bits``."""
    assert mechanism.adaptive
    noise = float(gaussian(key, mechanism.bit_sigma, ()))
    share = 0.5 + (bits + noise) / mechanism.cohort
    return bound * math.exp(-mechanism.adaptive.rate * (share - mechanism.adaptive.quantile))
