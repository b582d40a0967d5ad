"""The contract of a strategy, as rules that anybody's can be tried against: ``fedsim check NAME``.

A rule is a function that raises ``Broken`` with one line for a person. Rules run on a world of their own: twelve
clients of different sizes, a model of 63 parameters, seconds of work. There are no exceptions by name: a strategy
declares what it is (``unbatchable``, ``is_global``, ``personal``, ``sends``), and is held to it.
"""

import logging
import random
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import tomli_w
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim import block, checkpoint, config, data, registry, tree
from fedsim.block import Guest, Work
from fedsim.config import DatasetConfig, Experiment, PartitionConfig, StrategyConfig
from fedsim.data.dataset import Dataset, Federation, Split
from fedsim.data.partition import Lists, Partitioner
from fedsim.errors import ClientError, ConfigError, FedsimError, where
from fedsim.grids.inline import InlineGrid, Order
from fedsim.memory import Memory
from fedsim.rng import Key
from fedsim.run import Session, assemble
from fedsim.types import Batch, Local, Pass, Payload, Phase, Strategy, Task, Tree
from fedsim.worker import reason
from server.foreign import Foreign
from server.loop import Trained, run_round

SIZES = (3, 5, 6, 7, 8, 9, 10, 11, 13, 14, 16, 21)  # examples of each client, all different
COHORT = 5
SEED = 11


class Broken(Exception):
    """A rule that does not hold; the text says how."""


# --- The world ---------------------------------------------------------------------------------------------------


class BlobsConfig(DatasetConfig):
    """No options."""

    name: Literal["fedsim.check:blobs"] = "fedsim.check:blobs"


def _blobs(of: BlobsConfig) -> Dataset:
    """Three overlapping clouds in five dimensions; x (N, 5), y (N,)."""
    n, rng = sum(SIZES), Key.root(0).at("check", "blobs").numpy()
    centres = rng.normal(size=(3, 5))

    def split(count: int) -> Split:
        y = rng.integers(3, size=count)
        x = centres[y] + 0.7 * rng.normal(size=(count, 5))
        return Split(torch.from_numpy(x), torch.from_numpy(y))

    return Dataset("blobs", split(n), split(60), classes=3)


class RaggedConfig(PartitionConfig):
    """No options."""

    name: Literal["fedsim.check:ragged"] = "fedsim.check:ragged"


def _ragged(of: RaggedConfig, dataset: Dataset, key: Key) -> Lists:
    return Lists(np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1]))


class DatasetPlugin(NamedTuple):
    Config: type[DatasetConfig]
    build: Callable[[Any], Dataset]


blobs = DatasetPlugin(BlobsConfig, _blobs)
ragged = Partitioner(RaggedConfig, _ragged)


class Subject(NamedTuple):
    """What is tried: a strategy's name, its plugin, and its settings in the world."""

    name: str
    plugin: Any
    settings: dict[str, Any]


class World(NamedTuple):
    """An experiment with its federation and task, still to be tampered with."""

    experiment: Experiment
    federation: Federation
    task: Task


def subject(name: str) -> Subject:
    """The strategy of this name. Raises ``ConfigError`` where there is none, or it cannot be loaded."""
    plugin = registry.load("strategies", name)
    settings: dict[str, Any] = {"name": name, "cohort": COHORT}
    fields = getattr(plugin.Config, "model_fields", {})
    # Several steps a visit, with a partial batch at the end, where the strategy has such settings. A plugin whose
    # defaults are made for larger problems says in CHECK with which settings it is tried here.
    more = {key: value for key, value in {"batch_size": 4, "epochs": 2}.items() if key in fields}
    more |= getattr(plugin, "CHECK", {})
    try:
        plugin.Config.model_validate(settings | more)
    except Exception:
        return Subject(name, plugin, settings)
    return Subject(name, plugin, settings | more)


def world(of: Subject, *, dtype: str = "float64", seed: int = SEED, **engine: Any) -> World:
    """The subject's experiment in the tiny world."""
    tables = {
        "name": "check",
        "seed": seed,
        "rounds": 1,
        "data": {"name": "fedsim.check:blobs", "partition": {"name": "fedsim.check:ragged"}, "holdout": 0.25},
        "task": {"model": "mlp", "hidden": [6], "dtype": dtype},
        "strategy": of.settings,
        "engine": {"execution": "plain", **engine},
    }
    experiment = config.parse(tables)
    federation = data.federation(experiment.data, seed).to(torch.device("cpu"), getattr(torch, dtype))
    population = len(federation)
    task: Task = registry.load("tasks", "mlp").build(experiment.task, federation.dataset, population)
    return World(experiment, federation, task)


class Play(NamedTuple):
    """Some rounds: the states before the first and after each, what clients remember, and what each round took."""

    states: list[Any]
    memory: dict[int, Any]
    trained: list[Trained]
    session: Session


def play(w: World, rounds: int = 2, order: Order | None = None) -> Play:
    """Run rounds exactly as ``fedsim run`` does."""
    session = assemble(*w, order)
    state = session.driver.begin()
    states, trained = [state], []
    for number in range(1, rounds + 1):
        state, took = session.driver.train(state, number)
        states.append(state)
        trained.append(took)
    return Play(states, _memory(session.memory), trained, session)


def _memory(memory: Memory) -> dict[int, Any]:
    """What clients remember, in one form for both paths: Flower's records are trees as well."""
    out = {}
    for client in memory:
        own = memory.get(client) or {}
        out[client] = {c: part["arrays"] if part.keys() == {"arrays"} else part for c, part in own.items()}
    return out


def strategy_of(of: Subject, w: World) -> Strategy[Any]:
    return cast(Strategy[Any], of.plugin.build(w.experiment.strategy, w.task))


def grid_of(w: World) -> InlineGrid:
    return InlineGrid(w.federation, w.experiment.engine, Memory())


def spoil(w: World, client: int, value: float) -> World:
    """The world in which the inputs of one client are ``value``."""
    split = w.federation.dataset.train
    x = split.x.clone()
    x[torch.from_numpy(np.asarray(w.federation.partition[client]))] = value
    dataset = w.federation.dataset._replace(train=split._replace(x=x))
    return w._replace(federation=replace(w.federation, dataset=dataset))


MARK = 7.0  # the input by which a client that must fail is known to its task


def failing(w: World, clients: Sequence[int]) -> World:
    """The world in which the code of these clients raises."""
    for client in clients:
        w = spoil(w, client, MARK)

    def trap(f: Callable[..., Any], x_of: Callable[[Any], Tensor]) -> Callable[..., Any]:
        def trapped(params: Tree, batch: Any) -> Any:
            if bool((x_of(batch) == MARK).any()):
                raise RuntimeError("out of luck")
            return f(params, batch)

        return trapped

    task = w.task._replace(
        loss=trap(w.task.loss, lambda b: b.x), predict=trap(w.task.predict, lambda x: x), score=w.task.score
    )
    return w._replace(task=task)


# --- Comparing ---------------------------------------------------------------------------------------------------


def leaves(value: Any) -> list[tuple[str, Any]]:
    """Every leaf of nested values with its path."""
    found, _ = pytree.tree_flatten_with_path(value)
    return [(pytree.keystr(path), leaf) for path, leaf in found]


def difference(a: Any, b: Any, tolerance: float | None = None) -> str | None:
    """Where two values differ: by a bit, or by more than ``tolerance`` · max(1, the largest number there)."""
    left, right = leaves(a), leaves(b)
    if [path for path, _ in left] != [path for path, _ in right]:
        odd = sorted({path for path, _ in left} ^ {path for path, _ in right})
        return f"only one of them has {odd[0]}" if odd else "the names are in another order"
    for (path, x), (_, y) in zip(left, right, strict=True):
        problem = _leaf(x, y, tolerance)
        if problem:
            return f"{path}: {problem}"
    return None


def _leaf(x: Any, y: Any, tolerance: float | None) -> str | None:
    if type(x) is not type(y):
        return f"{type(x).__name__} and {type(y).__name__}"
    if isinstance(x, np.ndarray):
        x, y = torch.from_numpy(x), torch.from_numpy(y)
    if isinstance(x, float):
        x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    if not isinstance(x, Tensor):
        return None if x == y else f"{x!r} and {y!r}"
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
    if torch.equal(x, y):
        return None
    gap = float((x.double() - y.double()).abs().max())
    if tolerance is not None and gap <= tolerance * max(1.0, float(x.double().abs().max())):
        return None
    return f"differs by {gap:.3g}"


def same(a: Any, b: Any, what: str, tolerance: float | None = None) -> None:
    """Raise ``Broken`` where two values are not the same."""
    problem = difference(a, b, tolerance)
    if problem:
        raise Broken(f"{what}: {problem}")


def fingerprint(value: Any) -> list[Any]:
    """Every number inside a value, for telling whether it was changed in place."""
    out: list[Any] = []
    for path, leaf in leaves(value):
        match leaf:
            case Tensor():
                out.append((path, tree.digest({"": leaf})))
            case np.ndarray():
                out.append((path, leaf.tobytes()))
            case torch.Generator():
                continue  # drawing from it is what it is for
            case _:
                out.append((path, repr(leaf)))
    return out


def finite(value: Any) -> str | None:
    """The path of the first NaN or Inf in a value."""
    for path, leaf in leaves(value):
        x = torch.as_tensor(leaf) if isinstance(leaf, Tensor | np.ndarray | float) else None
        if x is not None and not bool(x.isfinite().all()):
            return path
    return None


# --- The rules ---------------------------------------------------------------------------------------------------


def config_is_closed(of: Subject) -> None:
    """An unknown key is refused, nothing can be assigned, tables inside it are as strict."""
    cls = of.plugin.Config
    if not (isinstance(cls, type) and issubclass(cls, StrategyConfig)):
        raise Broken("Config is not a subclass of fedsim.StrategyConfig")
    try:
        cls.model_validate({"name": of.name, "no_such_key": 1})
    except ValidationError:
        pass
    else:
        raise Broken("Config accepts an unknown key")
    made = cls.model_validate({"name": of.name})
    try:
        setattr(made, "cohort", made.cohort + 1)  # noqa: B010 - a type checker knows that it must fail
    except ValidationError:
        pass
    else:
        raise Broken("a Config can be changed after it is made (frozen is off)")
    for model in _models(cls):
        if model.model_config.get("extra") != "forbid" or not model.model_config.get("frozen"):
            raise Broken(f"{model.__name__} is not closed and frozen: derive it from fedsim.config.Closed")


def _models(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The models inside a model."""

    def walk(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
            yield from _models(annotation)
        for arg in getattr(annotation, "__args__", ()):
            yield from walk(arg)

    for field in cls.model_fields.values():
        yield from walk(field.annotation)


def name_alone(of: Subject) -> None:
    """``name`` is the only setting without a default, and such a strategy runs."""
    try:
        of.plugin.Config.model_validate({"name": of.name})
    except ValidationError as e:
        raise Broken("; ".join(config.explain(e, of.plugin.Config, {"name": of.name}, "strategy"))) from None
    bare = of._replace(settings={"name": of.name})
    cohort = of.plugin.Config.model_validate(bare.settings).cohort
    if cohort > len(SIZES):
        bare = of._replace(settings={"name": of.name, "cohort": len(SIZES)})
    play(world(bare), 1)


def config_in_toml(of: Subject) -> None:
    """The resolved config, written as TOML and read again, is the same config."""
    experiment = world(of).experiment
    again = config.parse(tomllib.loads(tomli_w.dumps(config.dump(experiment))))
    if again != experiment:
        changed = config.differences(config.dump(again), config.dump(experiment))
        raise Broken(f"config.toml gives another config: {', '.join(changed)}")


def documented(of: Subject) -> None:
    """It says what it is: a docstring, from which ``fedsim cite`` and ``fedsim show`` print."""
    if not (getattr(of.plugin, "__doc__", None) or "").strip():
        raise Broken("no docstring: it should begin with the citation and the equations")


def state_is_a_value(of: Subject) -> None:
    """The state is a named tuple that a checkpoint can hold."""
    played = play(world(of), 2)
    for state in played.states:
        if not (isinstance(state, tuple) and hasattr(state, "_fields")):
            raise Broken(f"the state is a {type(state).__name__}, not a NamedTuple")
        try:
            checkpoint.pack(state)
        except (TypeError, ValueError) as e:
            raise Broken(f"the state cannot be put in a checkpoint: {reason(e)}") from None
    if [type(state) for state in played.states] != [type(played.states[0])] * 3:
        raise Broken("the state's type changes from round to round")


def seed_decides(of: Subject) -> None:
    """Equal seeds give equal bits, and another seed gives others."""
    first, second, other = play(world(of)), play(world(of)), play(world(of, seed=SEED + 1))
    same(first[:2], second[:2], "two runs with one seed")
    if difference(first[:2], other[:2]) is None:
        raise Broken("another seed gives the same numbers")


def batched_as_plain(of: Subject, dtype: str, tolerance: float) -> None:
    """A block of clients as stacked tensors gives the numbers of one client at a time, memories included."""
    w = world(of, dtype=dtype)
    for i, phase in enumerate(strategy_of(of, w).phases):
        if phase.local.unbatchable is None and w.task.unbatchable is None:
            try:
                _block(of, w, i)
            except Exception as e:
                raise Broken(f"a block of phase {i} fails: {reason(e)} (declare Local.unbatchable)") from e
    plain, stacked = play(w, 5), play(world(of, dtype=dtype, execution="batched", block=4), 5)
    for number, (a, b) in enumerate(zip(plain.states, stacked.states, strict=True)):
        same(a, b, f"batched and plain after round {number}", tolerance)
    same(plain.memory, stacked.memory, "batched and plain, clients' memories", tolerance)


def _block(of: Subject, w: World, phase: int) -> None:
    """Run phases up to this one on a few clients, the last one as a block; no fallback."""
    strategy, key, grid = strategy_of(of, w), Key.root(SEED), grid_of(w)
    state, cohort = strategy.init(key.at("init").torch()), list(range(4))
    for i, p in enumerate(strategy.phases[: phase + 1]):
        work = Work(1, i, p.local, p.broadcast(state), key)
        if i == phase:
            block.batched(work, w.federation, [Guest(c, grid.memory.get(c)) for c in cohort])
            return
        result = p.reduce.finish(grid.map(work, cohort, p.reduce).folded)
        state = state if result is None else p.finish(state, result)


def messages_as_fast(of: Subject, dtype: str) -> None:
    """Over real Flower messages, one a client, the bits are the same, memories included."""
    fast, slow = play(world(of, dtype=dtype)), play(world(of, dtype=dtype, paths="messages"))
    for number, (a, b) in enumerate(zip(fast.states, slow.states, strict=True)):
        same(a, b, f"Flower messages and the fast path after round {number}")
    same(fast.memory, slow.memory, "Flower messages and the fast path, clients' memories")


def order_is_irrelevant(of: Subject) -> None:
    """Neither the order in which blocks arrive nor their size changes a bit."""
    plain = play(world(of, dtype="float32"))
    reverse: Order = lambda starts: starts[::-1]  # noqa: E731
    for size, how, order in (
        (1, "reverse", reverse),
        (1, "random", Key.root(SEED).at("order").numpy().permutation),
        (2, "reverse", reverse),
    ):
        shuffled = play(world(of, dtype="float32", block=size), order=order)
        same(plain[:2], shuffled[:2], f"blocks of {size} in {how} order")


def cohort_is_a_set(of: Subject) -> None:
    """The order in which a cohort is drawn changes no bit."""
    w = world(of, dtype="float32")
    cohorts = [[2, 9, 4, 7, 11], [11, 7, 9, 4, 2], [4, 11, 2, 9, 7]]
    finals = []
    for cohort in cohorts:
        strategy, grid, key = strategy_of(of, w), grid_of(w), Key.root(SEED)
        state = strategy.init(key.at("init").torch())
        for number in (1, 2):
            state, _ = run_round(strategy, state, number, cohort, grid, key)
        finals.append((state, _memory(grid.memory)))
    for other in finals[1:]:
        same(finals[0], other, "the same cohort in another order")


def resume_is_bitwise(of: Subject) -> None:
    """A checkpoint of any round, read by a fresh build, goes on to the same bits."""
    w, rounds = world(of, dtype="float32"), 3
    straight = assemble(*w)
    state = straight.driver.begin()
    with tempfile.TemporaryDirectory() as folder:
        store = checkpoint.Store(Path(folder), keep=1)
        for number in range(1, rounds + 1):
            store.save(number - 1, {}, state, straight.memory, {})
            state, _ = straight.driver.train(state, number)
            fresh = assemble(*w)
            found = checkpoint.Store(Path(folder), keep=1).load(checkpoint.named_tuples(fresh.driver.begin()))
            fresh.memory.update(found.memory)
            resumed, _ = fresh.driver.train(found.state, number)
            # By induction over rounds it is enough that each next round is the same.
            same(state, resumed, f"round {number}, resumed from a checkpoint")
            same(_memory(straight.memory), _memory(fresh.memory), f"memories after round {number}, resumed")


def inputs_are_kept(of: Subject) -> None:
    """No function changes its arguments: state, payload, memory, data, report."""
    w = world(of)
    strategy, grid, key = strategy_of(of, w), grid_of(w), Key.root(SEED)
    guarded = strategy._replace(
        phases=tuple(_guarded(phase) for phase in strategy.phases),
        params=_kept("params", strategy.params),
        personal=_kept("personal", strategy.personal) if strategy.personal else None,
        gauges=_kept("gauges", strategy.gauges) if strategy.gauges else None,
    )
    state = strategy.init(key.at("init").torch())
    train = w.federation.dataset.train
    history = [(state, fingerprint(state))]
    examples = fingerprint((train.x, train.y))
    for number in (1, 2):
        state, _ = run_round(guarded, state, number, list(range(1, 7)), grid, key)
        guarded.params(state)
        if guarded.gauges:
            guarded.gauges(state)
        if guarded.personal:
            shared = strategy.phases[0].broadcast(state)
            guarded.personal(shared, grid.memory.get(1) or {})
        history.append((state, fingerprint(state)))
    for number, (old, before) in enumerate(history):
        if fingerprint(old) != before:
            raise Broken(f"the state after round {number} was changed later")
    if fingerprint((train.x, train.y)) != examples:
        raise Broken("the clients' data was changed")


F = TypeVar("F", bound=Callable[..., Any])


def _kept(name: str, f: F) -> F:
    """``f``, watched for changes to its arguments."""

    def watched(*args: Any) -> Any:
        before = fingerprint(args)
        out = f(*args)
        if fingerprint(args) != before:
            raise Broken(f"{name} changes its arguments")
        return out

    return cast(F, watched)


def _guarded(phase: Phase[Any]) -> Phase[Any]:
    local = phase.local
    watched = Local(
        _kept("Local.init", local.init),
        tuple(Pass(_kept("Local.step", p.step), p.schedule) for p in local.passes),
        _kept("Local.final", local.final),
        _kept("Local.remember", local.remember) if local.remember else None,
        _kept("Local.draw", local.draw) if local.draw else None,
        local.unbatchable,
    )
    reduce = phase.reduce._replace(lift=_kept("Reducer.lift", phase.reduce.lift))
    return Phase(_kept("broadcast", phase.broadcast), watched, reduce, _kept("finish", phase.finish))


def declared_channels_travel(of: Subject) -> None:
    """In each phase exactly the channels of ``sends`` leave a client, and none shares its storage with memory."""
    w = world(of)
    strategy, grid, key = strategy_of(of, w), grid_of(w), Key.root(SEED)
    if len(strategy.sends) != len(strategy.phases):
        raise Broken(f"sends has {len(strategy.sends)} entries for {len(strategy.phases)} phases")
    state = strategy.init(key.at("init").torch())
    for number in (1, 2):
        for i, phase in enumerate(strategy.phases):
            work = Work(number, i, phase.local, phase.broadcast(state), key)
            for client in (0, 5, 11):
                done, _ = block.one(work, w.federation, Guest(client, grid.memory.get(client)))
                if done.value.keys() != strategy.sends[i]:
                    sent, declared = sorted(done.value), sorted(strategy.sends[i])
                    raise Broken(f"phase {i} sends {sent}, declared are {declared}")
                if _storages(done.value) & _storages(done.memory):
                    raise Broken(f"phase {i}: what travels shares its storage with the client's memory")
            result = phase.reduce.finish(grid.map(work, [0, 5, 11], phase.reduce).folded)
            state = state if result is None else phase.finish(state, result)


def _storages(payload: Payload) -> set[int]:
    return {x.untyped_storage().data_ptr() for part in payload.values() for x in part.values() if x.numel()}


def global_generators_are_left_alone(of: Subject) -> None:
    """Neither are the global generators used, nor does anything depend on them."""
    plays, before = [], _globals()
    try:
        for salt in (1, 2):
            random.seed(salt)
            np.random.seed(salt)  # noqa: NPY002
            torch.default_generator.manual_seed(salt)
            start = _globals()
            plays.append(play(world(of)))
            for library, a, b in zip(("Python", "NumPy", "PyTorch"), start, _globals(), strict=True):
                if repr(a) != repr(b) if not isinstance(a, Tensor) else not torch.equal(a, b):
                    raise Broken(f"{library}'s global generator was used; draw from the generators that are given")
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
    same(plays[0][:2], plays[1][:2], "two seeds of the global generators")


def _globals() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _everybody(of: Subject) -> Subject:
    return of._replace(settings=of.settings | {"cohort": len(SIZES)})


def failure_is_named(of: Subject) -> None:
    """A client that raises stops the run under ``raise``, with client, round and seed."""
    w = failing(world(_everybody(of)), [3])
    try:
        play(w, 1)
    except ClientError as e:
        if (e.client, e.round, e.seed) != (3, 1, SEED) or "out of luck" not in e.reason:
            raise Broken(f"client 3 raised in round 1, and the error says: {e}") from None
    else:
        raise Broken("a client raised, and the run went on")


def failure_is_dropped(of: Subject) -> None:
    """Under ``drop`` the others' work counts; where all fail, the state stays as it is."""
    w = failing(world(_everybody(of), on_error="drop"), [3])
    played = play(w, 2)
    for took in played.trained:
        if [f.client for f in took.failures] != [3]:
            raise Broken(f"client 3 raised, and the round records {[f.client for f in took.failures]}")
        if took.clients != len(SIZES) - 1:
            raise Broken(f"{took.clients} of {len(SIZES) - 1} sound clients counted")
    bad = finite((played.states, played.memory))
    if bad:
        raise Broken(f"NaN or Inf at {bad} after a client was dropped")
    if 3 in played.memory:
        raise Broken("a client that failed has a new memory")
    if _is_flower(of):
        return
    _as_without(of, w, played)
    empty = play(failing(world(_everybody(of), on_error="drop"), range(len(SIZES))), 1)
    same(empty.states[0], empty.states[1], "a round in which all clients failed")


def _as_without(of: Subject, w: World, dropped: Play) -> None:
    """A dropped client must count as one that was never asked."""
    strategy, grid, key = strategy_of(of, w), grid_of(w), Key.root(SEED)
    state = strategy.init(key.at("init").torch())
    for number in range(1, len(dropped.states)):
        state, _ = run_round(strategy, state, number, [c for c in range(len(SIZES)) if c != 3], grid, key)
    same(state, dropped.states[-1], "with a client dropped, and without it from the start", 1e-8)
    same(_memory(grid.memory), dropped.memory, "memories with a client dropped, and without it", 1e-8)


def nan_is_stopped(of: Subject) -> None:
    """NaN and Inf from a client never reach the state or a memory."""
    for value in (float("nan"), float("inf")):
        sick = _everybody(of)
        try:
            played = play(spoil(world(sick), 3, value), 1)
        except ClientError as e:
            if e.client != 3:
                raise Broken(f"client 3 holds {value}, and the error says: {e}") from None
        else:
            _clean(played, value)
        _clean(play(spoil(world(sick, on_error="drop"), 3, value), 2), value)


def _clean(played: Play, value: float) -> None:
    bad = finite((played.states, played.memory))
    if bad:
        raise Broken(f"a client's {value} reached {bad}")


def it_learns(of: Subject) -> None:
    """In twenty rounds the training loss falls: of the global model, and of the clients' own where they have one."""
    w = world(_everybody(of), dtype="float32", execution="auto")
    played = play(w, 20)
    bad = finite((played.states, played.memory, [took.metrics for took in played.trained]))
    if bad:
        raise Broken(f"NaN or Inf at {bad}")
    driver = played.session.driver
    if driver.is_global:
        train = w.federation.dataset.train
        losses = [_loss(w.task, driver.params(played.states[i]), train.x, train.y) for i in (0, -1)]
        if not losses[1] < losses[0]:
            raise Broken(f"the training loss went from {losses[0]:.4f} to {losses[1]:.4f} in 20 rounds")
    built = of.plugin.build(w.experiment.strategy, w.task)
    if isinstance(built, Foreign):
        return
    if built.personal is None:
        if not built.is_global:
            raise Broken("there is neither a global model (is_global) nor one of each client (personal)")
        return
    losses = [
        _personal_loss(built, w, played.states[0], {}),
        _personal_loss(built, w, played.states[-1], played.memory),
    ]
    if not losses[1] < losses[0]:
        raise Broken(f"the clients' own training loss went from {losses[0]:.4f} to {losses[1]:.4f} in 20 rounds")


def _loss(task: Task, params: Tree, x: Tensor, y: Tensor) -> float:
    sums = task.score(params, Batch(x, y))
    return float(sums["loss"] / sums["count"])


def _personal_loss(strategy: Strategy[Any], w: World, state: Any, memory: Mapping[int, Payload]) -> float:
    """The mean over clients of the loss of their own models on their own training examples."""
    assert strategy.personal
    shared, train, total = strategy.phases[0].broadcast(state), w.federation.dataset.train, 0.0
    for client in range(len(SIZES)):
        work = Work(1, 0, strategy.phases[0].local, shared, Key.root(SEED))
        own = strategy.personal(shared, block.remembered(work, Guest(client, memory.get(client))))
        rows = torch.from_numpy(w.federation.indices(client, "train"))
        total += _loss(w.task, own, train.x[rows], train.y[rows])
    return total / len(SIZES)


def clients_are_evaluated(of: Subject) -> None:
    """Each client's held-out examples are scored, by the global model and by its own; no memory changes."""
    played = play(world(of), 2)
    session = played.session
    before = fingerprint(_memory(session.memory))
    scores = session.driver.evaluate(played.states[-1], 2)
    if scores is None or len(scores) != len(SIZES):
        raise Broken(f"{0 if scores is None else len(scores)} of {len(SIZES)} clients were evaluated")
    needed = {"accuracy"} if session.driver.is_global else {"personal_accuracy"}
    for score in scores:
        if not needed <= score.metrics.keys() or not all(0 <= score.metrics[name] <= 1 for name in needed):
            raise Broken(f"client {score.client} was scored {score.metrics}")
    if fingerprint(_memory(session.memory)) != before:
        raise Broken("evaluation changed a client's memory")


def gauges_are_numbers(of: Subject) -> None:
    """What is logged each round are finite numbers under names."""
    played = play(world(of), 2)
    for state, took in zip(played.states[1:], played.trained, strict=True):
        logged = took.metrics | played.session.driver.gauges(state)
        for name, value in logged.items():
            if not isinstance(value, float | int) or not np.isfinite(value):
                raise Broken(f"{name} is {value!r}")


def unknown_argument_is_refused(of: Subject) -> None:
    """A misspelt argument of a Flower strategy is an error that suggests the right one."""
    built = of.plugin.build(of.plugin.Config.model_validate({"name": of.name, "args": {"weighted_by_keyy": 1}}), None)
    try:
        built.make(len(SIZES))
    except ConfigError as e:
        if "weighted_by_keyy" not in str(e):
            raise Broken(f"the error does not name the argument: {e}") from None
    else:
        raise Broken("an unknown argument is accepted")


def _is_flower(of: Subject) -> bool:
    try:
        w = world(of)
        return isinstance(of.plugin.build(w.experiment.strategy, w.task), Foreign)
    except Exception:  # what is wrong with it is for the rules to say
        return False


class Rule(NamedTuple):
    """A rule, and whom it is for: ``any`` strategy, one of ``ours`` (a Strategy value), or a ``flower`` class."""

    title: str
    whom: Literal["any", "ours", "flower"]
    test: Callable[[Subject], None]


RULES = (
    Rule("says what it is", "any", documented),
    Rule("the config is closed and frozen", "any", config_is_closed),
    Rule("the config has defaults: a name is enough to run", "any", name_alone),
    Rule("the config survives TOML", "any", config_in_toml),
    Rule("a misspelt argument is refused", "flower", unknown_argument_is_refused),
    Rule("the state is a value that a checkpoint holds", "any", state_is_a_value),
    Rule("equal seeds give equal bits", "any", seed_decides),
    Rule("batched = plain in float64 (1e-10)", "ours", partial(batched_as_plain, dtype="float64", tolerance=1e-10)),
    Rule("batched = plain in float32 (1e-5)", "ours", partial(batched_as_plain, dtype="float32", tolerance=1e-5)),
    Rule("Flower messages = fast path in float64, bit for bit", "ours", partial(messages_as_fast, dtype="float64")),
    Rule("Flower messages = fast path in float32, bit for bit", "ours", partial(messages_as_fast, dtype="float32")),
    Rule("the order and size of blocks are irrelevant", "ours", order_is_irrelevant),
    Rule("the order of the cohort is irrelevant", "ours", cohort_is_a_set),
    Rule("resume is bitwise at every round", "any", resume_is_bitwise),
    Rule("inputs are not changed", "ours", inputs_are_kept),
    Rule("exactly the declared channels travel", "ours", declared_channels_travel),
    Rule("the global generators are left alone", "any", global_generators_are_left_alone),
    Rule("a failing client is named", "any", failure_is_named),
    Rule("a failing client is dropped, the others count", "any", failure_is_dropped),
    Rule("NaN and Inf never reach the state", "any", nan_is_stopped),
    Rule("clients are evaluated on their own examples", "any", clients_are_evaluated),
    Rule("what is logged are numbers", "any", gauges_are_numbers),
    Rule("it learns", "any", it_learns),
)


def rules(of: Subject) -> list[Rule]:
    """The rules for this strategy."""
    kind = "flower" if _is_flower(of) else "ours"
    return [rule for rule in RULES if rule.whom in ("any", kind)]


def verdict(of: Subject, rule: Rule) -> str | None:
    """What is wrong, in one line, or None."""
    try:
        with _quiet():
            rule.test(of)
    except Broken as e:
        return str(e)
    except FedsimError as e:
        return str(e).replace("\n", "; ")
    except Exception as e:
        return f"{reason(e)} ({where(e)})"
    return None


def run(name: str) -> Iterator[tuple[str, str | None]]:
    """Each rule's title, and what is wrong or None. Raises ``ConfigError`` for a strategy that cannot be loaded."""
    of = subject(name)
    for rule in rules(of):
        yield rule.title, verdict(of, rule)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the engine's own lines: what it drops here, it drops because a rule made it fail."""
    log = logging.getLogger("fedsim")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
