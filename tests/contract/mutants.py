"""Strategies that break the contract, each in one way; the suite must catch each by the rule meant for it."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from pydantic import ConfigDict

from clients.sgd import Carry, send_delta
from fedsim import Batch, Done, Mean, Pass, Payload, Reducer, Report, Strategy, StrategyConfig, Task, Tree, tree
from server.reduce import weighted_mean
from strategies import fedavg, local, scaffold
from strategies.fedavg import Config, State

Alter = Callable[[Strategy[Any], Task], Strategy[Any]]


def altered(alter: Alter, base: Any = fedavg, config: type[StrategyConfig] | None = None) -> SimpleNamespace:
    """``base`` with one thing wrong."""
    return SimpleNamespace(
        __doc__="A mutant.",
        Config=config or base.Config,
        build=lambda config, task: alter(base.build(config, task), task),
    )


def with_local(**changes: Any) -> Alter:
    def alter(s: Strategy[Any], task: Task) -> Strategy[Any]:
        return s._replace(phases=(s.phases[0]._replace(local=s.phases[0].local._replace(**changes)),))

    return alter


def with_phase(**changes: Any) -> Alter:
    return lambda s, task: s._replace(phases=(s.phases[0]._replace(**changes),))


def with_final(final: Callable[[Payload, Carry], Done]) -> SimpleNamespace:
    return altered(with_local(final=final))


# The config


class OpenConfig(Config):
    model_config = ConfigDict(extra="allow")


class ThawedConfig(Config):
    model_config = ConfigDict(frozen=False)


class NeedyConfig(Config):
    secret: float


open_config = altered(lambda s, task: s, config=OpenConfig)
thawed_config = altered(lambda s, task: s, config=ThawedConfig)
needy_config = altered(lambda s, task: s, config=NeedyConfig)
undocumented = SimpleNamespace(Config=Config, build=fedavg.build, __doc__="")


# The state


class Grown(NamedTuple):
    w: Tree
    history: Any


def _opaque(s: Strategy[Any], task: Task) -> Strategy[Any]:
    return s._replace(
        init=lambda g: Grown(task.init(g), object()),
        phases=(s.phases[0]._replace(finish=lambda state, mean: Grown(state.w, state.history)),),
    )


opaque_state = altered(_opaque)


def _hidden(s: Strategy[Any], task: Task) -> Strategy[Any]:
    """Momentum in a closure: right until the first resume."""
    kept: list[Tree] = []

    def finish(state: State, mean: Mean) -> State:
        kept.append(mean.value["delta"] if not kept else tree.add(mean.value["delta"], tree.scale(0.5, kept[-1])))
        return State(tree.add(state.w, kept[-1]))

    return s._replace(phases=(s.phases[0]._replace(finish=finish),))


hidden_state = altered(_hidden)


def _in_place(state: State, mean: Mean) -> State:
    for name, x in state.w.items():
        x.add_(mean.value["delta"][name])
    return state


changes_state = altered(with_phase(finish=_in_place))


def _changes_shared(shared: Payload, carry: Carry) -> Done:
    done = send_delta(shared, carry)
    for x in shared["params"].values():
        x.mul_(0.999)
    return done


changes_shared = with_final(_changes_shared)


# Randomness


def _global_torch(state: State, mean: Mean) -> State:
    noise = tree.map(lambda x: 1e-3 * torch.randn(x.shape, dtype=x.dtype), state.w)
    return State(tree.add(tree.add(state.w, mean.value["delta"]), noise))


global_torch = altered(with_phase(finish=_global_torch))


def _global_python(state: State, mean: Mean) -> State:
    return State(tree.axpy(1.0 + 1e-3 * random.random(), mean.value["delta"], state.w))


global_python = altered(with_phase(finish=_global_python))
deaf_to_the_seed = altered(
    lambda s, task: s._replace(
        init=lambda g: State(task.init(torch.Generator().manual_seed(1))),
        phases=(s.phases[0]._replace(finish=lambda state, mean: state),),
    )
)


# What travels


def _extra_channel(shared: Payload, carry: Carry) -> Done:
    done = send_delta(shared, carry)
    return done._replace(value=done.value | {"spy": carry.params})


extra_channel = with_final(_extra_channel)


def _leaky(s: Strategy[Any], task: Task) -> Strategy[Any]:
    """Sends the very tensors that it remembers."""

    def final(shared: Payload, carry: Carry) -> Done:
        return Done({"model": carry.params}, {"params": carry.params}, {})

    return with_local(final=final)(s, task)._replace(sends=(frozenset({"model"}),))


shares_memory = altered(_leaky, base=local)


# Engines


def _sees_the_block(shared: Payload, carry: Carry) -> Done:
    """Asks whether it runs as one of many."""
    done = send_delta(shared, carry)
    one = not torch._C._functorch.is_batchedtensor(carry.step)
    return done._replace(value={"delta": tree.scale(1.0 if one else 1.01, done.value["delta"])})


sees_the_block = with_final(_sees_the_block)


def _asks_for_numbers(shared: Payload, carry: Carry) -> Done:
    if float(carry.step) > 100:
        raise RuntimeError("too long")
    return send_delta(shared, carry)


asks_for_numbers = with_final(_asks_for_numbers)  # .item() inside a block, and no `unbatchable`


def _first_come(s: Strategy[Any], task: Task) -> Strategy[Any]:
    """Weighs a client by the order in which it arrived."""
    seen: list[int] = []
    mean = weighted_mean()

    def lift(report: Report) -> Any:
        seen.append(report.client)
        return mean.lift(report._replace(examples=len(seen)))

    return s._replace(phases=(s.phases[0]._replace(reduce=Reducer(lift, mean.merge, mean.finish)),))


first_come = altered(_first_come)


def _unordered(s: Strategy[Any], task: Task) -> Strategy[Any]:
    """Sums in float32, in the order of arrival: not in the engine's fold."""
    total: list[Any] = []

    def lift(report: Report) -> int:
        delta = tree.scale(float(report.examples), report.value["delta"])
        total[:] = [tree.add(total[0], delta), total[1] + report.examples] if total else [delta, report.examples]
        return 1

    def finish(count: int | None) -> Mean | None:
        if count is None:
            return None
        (delta, n), total[:] = tuple(total), []
        return Mean({"delta": tree.scale(1 / n, delta)}, {}, count, n)

    return s._replace(phases=(s.phases[0]._replace(reduce=Reducer(lift, lambda a, b: a + b, finish)),))


order_of_arrival = altered(_unordered)


# Failures


def _hides_nan(s: Strategy[Any], task: Task) -> Strategy[Any]:
    """Marks a client's sickness in the state by another way than its update: as a count that becomes Inf."""

    def final(shared: Payload, carry: Carry) -> Done:
        done = send_delta(shared, carry)
        sick = torch.stack([x.isnan().any() for x in done.value["delta"].values()]).any()
        clean = {n: torch.where(x.isfinite(), x, 1.0) for n, x in done.value["delta"].items()}
        return Done({"delta": clean, "sick": {"sick": sick.to(torch.float64)}}, {}, {})

    def finish(state: State, mean: Mean) -> State:
        infinite = 1e308 * 10 if float(mean.value["sick"]["sick"]) else 1.0
        return State(tree.scale(infinite, tree.add(state.w, mean.value["delta"])))

    phase = s.phases[0]
    return s._replace(
        phases=(phase._replace(local=phase.local._replace(final=final), finish=finish),),
        sends=(frozenset({"delta", "sick"}),),
    )


hides_nan = altered(_hides_nan)


def _forgives(s: Strategy[Any], task: Task) -> Strategy[Any]:
    """Goes on as if a step that raised had been taken."""
    step, schedule = s.phases[0].local.passes[0]

    def forgiving(shared: Payload, carry: Carry, batch: Batch, draw: Any) -> Carry:
        try:
            return step(shared, carry, batch, draw)
        except RuntimeError:
            return carry

    return with_local(passes=(Pass(forgiving, schedule),))(s, task)


forgives = altered(_forgives)


def _never_rests(s: Strategy[Any], task: Task) -> Strategy[Any]:
    """Takes a round without reports for one of updates 0, and moves by its weight decay all the same."""
    mean = weighted_mean()

    def finish_reports(folded: Any) -> Mean | None:
        return mean.finish(folded) or Mean({}, {}, 0, 0)

    def finish(state: State, mean: Mean) -> State:
        w = tree.add(state.w, mean.value["delta"]) if mean.value else state.w
        return State(tree.scale(0.999, w))

    return s._replace(
        phases=(s.phases[0]._replace(reduce=Reducer(mean.lift, mean.merge, finish_reports), finish=finish),)
    )


never_rests = altered(_never_rests)
climbs = altered(with_phase(finish=lambda state, mean: State(tree.axpy(-1.0, mean.value["delta"], state.w))))
logs_text = altered(lambda s, task: s._replace(gauges=lambda state: {"mood": "good"}))  # type: ignore[dict-item]
no_model = altered(lambda s, task: s._replace(is_global=False))


def _forgets(s: Strategy[Any], task: Task) -> Strategy[Any]:
    """SCAFFOLD that scribbles on its control variates in evaluation."""

    def personal(shared: Payload, memory: Payload) -> Tree:
        for x in memory["control"].values():
            x.add_(1.0)
        return shared["params"]

    return s._replace(personal=personal)


scribbles = altered(_forgets, base=scaffold)
