"""The server around any Flower strategy: reproducible and resumable.

Flower samples nodes with the global ``random``, and its privacy wrappers draw from the global numpy generator. Both are
lent a stream of ours while a strategy's hooks run. What a strategy keeps in its attributes is part of the checkpoint.
"""

import copy
import gc
import importlib
import inspect
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim import tree
from fedsim.block import Work
from fedsim.checkpoint import encode
from fedsim.config import EngineConfig
from fedsim.errors import ConfigError, FedsimError, did_you_mean
from fedsim.grids.flower import to_record, to_tree
from fedsim.grids.inline import Executor, check
from fedsim.rng import Key
from fedsim.types import Local, Task, Tree
from fedsim.worker import Failure, reason
from server.flower import conform
from server.loop import ClientScore, Panel, Trained, score_clients

log = logging.getLogger("fedsim")

# Arguments of Flower's strategies: those by which a cohort is set, and the numbers of nodes that they wait for.
COHORT = ("fraction_train", "min_train_nodes")
WAITED = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")


class Foreign(NamedTuple):
    """A Flower strategy that has not been made yet. ``config`` is the clients' part, which the server does not read."""

    cls: type[FlowerStrategy]
    args: Mapping[str, Any]
    cohort: int
    config: Any

    def make(self, population: int) -> FlowerStrategy:
        """The strategy object; cohort and population become its sampling arguments."""
        return _make(self.cls, self.args, self.cohort, population, "strategy.args")


def _make(
    cls: type[FlowerStrategy], args: Mapping[str, Any], cohort: int, population: int, path: str
) -> FlowerStrategy:
    known = arguments(cls)
    for name, value in args.items():
        if name in COHORT:
            raise ConfigError(f"{path}.{name}: is set by strategy.cohort (got {value!r})")
        if name not in known:
            raise ConfigError(f"{path}.{name}: unknown argument of {cls.__name__}{did_you_mean(name, known)}")
    sampling = {
        "fraction_train": cohort / population,
        "min_train_nodes": cohort,
        "min_available_nodes": cohort,
        "fraction_evaluate": 0.0,
        "min_evaluate_nodes": 0,
    }
    given: dict[str, Any] = {name: value for name, value in sampling.items() if name in known and name not in args}
    for name, value in args.items():
        nested = isinstance(value, Mapping) and isinstance(value.get("name"), str) and ":" in value["name"]
        given[name] = _nested(value, cohort, population, f"{path}.{name}") if nested else value
    try:
        made = cls(**given)
    except Exception as e:
        raise ConfigError(f"{path}: {cls.__name__} refused its arguments: {reason(e)}") from e
    missing = [name for name in COHORT if name not in known]
    if missing and not any(isinstance(value, FlowerStrategy) for value in vars(made).values()):
        raise ConfigError(
            f"strategy.cohort: cannot be told to {cls.__name__}, which takes no {' and no '.join(missing)}; "
            "let its __init__ take **kwargs, and give them to its base class"
        )
    for name, value in vars(made).items():  # Flower would wait for more nodes, and these are all that there will be
        if name in WAITED and isinstance(value, int) and value > population:
            raise ConfigError(f"{path}.{name}: must be at most {population}, the number of clients (got {value!r})")
    return made


def waited(strategy: FlowerStrategy) -> int:
    """The most nodes that a strategy, or one inside it, waits for."""
    inner = [waited(value) for value in vars(strategy).values() if isinstance(value, FlowerStrategy)]
    return max([0, *inner, *(n for name in WAITED if isinstance(n := getattr(strategy, name, 0), int))])


def arguments(cls: type) -> list[str]:
    """What a class's constructor takes by name: where it takes ``**kwargs``, also what those of its bases take."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names |= {p.name: None for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def _nested(table: Mapping[str, Any], cohort: int, population: int, path: str) -> FlowerStrategy:
    """A strategy inside a strategy's arguments, as Flower's privacy wrappers take one."""
    module, _, attribute = table["name"].partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"{path}.name: '{table['name']}' cannot be loaded: {reason(e)}") from e
    return _make(cls, table.get("args", {}), cohort, population, f"{path}.args")


class State(NamedTuple):
    """The model, what the strategy's object remembers (its attributes that are data), and how many rounds gave a
    model."""

    w: Tree
    attributes: dict[str, Any]
    aggregated: int = 0


class Driver:
    """The server around a Flower strategy: its hooks, called as Flower's own loop calls them."""

    is_global = True

    def __init__(
        self,
        foreign: Foreign,
        task: Task,
        grid: Grid,
        engine: EngineConfig,
        key: Key,
        population: int,
        local: Local,
        executor: Executor,
        panel: Panel | None = None,
    ) -> None:
        self._foreign, self._task, self._grid, self._engine = foreign, task, grid, engine
        self._key, self._population, self._local = key, population, local
        self._executor, self._panel = executor, panel
        self._strategy = foreign.make(population)
        self._current: dict[str, Any] | None = None  # the attributes that the object has now

    def over(self, grid: Grid, executor: Executor) -> "Driver":
        """The same server with its clients elsewhere."""
        other = copy.copy(self)
        other._grid, other._executor = grid, executor
        return other

    @property
    def least(self) -> int:
        """Nodes below which the strategy would wait without end."""
        return max(self._foreign.cohort, waited(self._strategy))

    def begin(self) -> State:
        return State(self._task.init(self._key.at("init").torch()), remember(self._strategy))

    def train(self, state: State, round: int) -> tuple[State, Trained]:
        if state.attributes is not self._current:
            restore(self._strategy, state.attributes)
        config = ConfigRecord({"server-round": round})
        with self._lent("train", round):
            out = list(self._strategy.configure_train(round, to_record(state.w), config, self._grid))
        replies, failures = self._sorted(list(self._grid.send_and_receive(out)), round, state.w)
        with self._lent("aggregate", round), unhurried(), overheard() as said:
            try:
                arrays, measured = self._strategy.aggregate_train(round, replies)
            except Exception as e:
                raise FedsimError(f"{type(self._strategy).__name__} failed in round {round}: {reason(e)}") from e
        metrics = _numbers(measured)
        metrics |= {f"federated_{n}": v for n, v in self._evaluated(state, arrays, round).items()}
        self._current = remember(self._strategy)
        if arrays is None and replies:
            log.warning(
                "round %d: %s made nothing of %d replies, and the model stays as it was%s",
                round,
                type(self._strategy).__name__,
                len(replies),
                "".join(f": {line}" for line in said),
            )
        w = state.w if arrays is None else to_tree(arrays, like=state.w)
        if not tree.finite(w):
            raise FedsimError(f"{type(self._strategy).__name__} made a model with NaN or Inf in round {round}")
        trained = Trained(
            metrics,
            len(replies),
            sum(_examples(r) for r in replies),
            sum(_bytes(m) for m in out),
            sum(_bytes(r) for r in replies),
            failures,
            learned=arrays is not None,
        )
        return State(w, self._current, state.aggregated + trained.learned), trained

    def evaluate(self, state: State, round: int) -> tuple[ClientScore, ...] | None:
        if self._panel is None:
            return None
        shared = {"params": state.w, "model": state.w}
        return score_clients(self._executor, self._panel, shared, round, self._key, self._population)

    def conclude(self, state: State) -> None:
        if not state.aggregated:
            raise FedsimError(
                f"{type(self._strategy).__name__} aggregated in no round, and the model is what it began as"
            )

    def params(self, state: State) -> Tree:
        return state.w

    def gauges(self, state: State) -> dict[str, float]:
        return {}

    def export(self, state: State) -> dict[str, bytes]:
        return {}

    def _evaluated(self, state: State, arrays: ArrayRecord | None, round: int) -> dict[str, float]:
        """Flower's federated evaluation, where the strategy's arguments ask for it."""
        config = ConfigRecord({"server-round": round})
        with self._lent("evaluate", round):
            out = list(self._strategy.configure_evaluate(round, arrays or to_record(state.w), config, self._grid))
        if not out:
            return {}
        replies, _ = self._sorted(list(self._grid.send_and_receive(out)), round)
        return _numbers(self._strategy.aggregate_evaluate(round, replies))

    def _sorted(
        self, replies: list[Message], round: int, like: Tree | None = None
    ) -> tuple[list[Message], tuple[Failure, ...]]:
        """Replies in order of node, those that failed apart, by the run's policy."""
        work = Work(round, 0, self._local, {}, self._key)
        good, bad = [], []
        for reply in sorted(replies, key=lambda r: r.metadata.src_node_id):
            client = reply.metadata.src_node_id - 2
            if reply.has_error():
                bad.append(Failure(client, reply.error.reason or "no reason given"))
            elif (problem := _problem(reply.content, like)) is not None:
                bad.append(Failure(client, problem))
            else:
                good.append(reply)
        check(bad, self._engine, work)
        return good, tuple(bad)

    @contextmanager
    def _lent(self, purpose: str, round: int) -> Iterator[None]:
        """Seed the global generators from a named stream, and give them back as they were."""
        before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
        draw = self._key.at("flower", purpose, round).numpy().integers(1 << 32)
        random.seed(int(draw))
        np.random.seed(int(draw))  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)  # noqa: NPY002


@contextmanager
def unhurried() -> Iterator[None]:
    """Inside, a full garbage collection looks at new objects only: some of Flower's strategies ask for one a reply."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def overheard() -> Iterator[list[str]]:
    """What Flower warns of inside, a line each; its own log says nothing below an error, since a round is one line."""
    said: list[str] = []
    flower = logging.getLogger("flwr")
    level = flower.level

    def keep(entry: logging.LogRecord) -> bool:
        if entry.levelno < logging.ERROR:
            said.append(" ".join(entry.getMessage().split()))
        return entry.levelno >= logging.ERROR

    flower.setLevel(logging.WARNING)
    flower.addFilter(keep)
    try:
        yield said
    finally:
        flower.removeFilter(keep)
        flower.setLevel(level)


def remember(strategy: FlowerStrategy) -> dict[str, Any]:
    """The attributes of a strategy that are data, copied. Raises ``ConfigError`` for state that cannot be saved."""
    out: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, FlowerStrategy):
            out[name] = {"strategy": remember(value)}
        elif isinstance(value, ArrayRecord):
            out[name] = {"record": to_tree(value)}
        elif callable(value):
            continue  # an argument: the config gives it again
        elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            out[name] = {"state_dict": dict(value.state_dict())}  # torch gives an OrderedDict, and takes any mapping
        else:
            out[name] = {"value": value}
        try:
            encode(None if "record" in out[name] or "strategy" in out[name] else out[name], {})
        except TypeError as e:
            raise ConfigError(
                f"strategy.name: {type(strategy).__name__}.{name} cannot be saved, so no run could resume: {e}"
            ) from e
    return out


def restore(strategy: FlowerStrategy, attributes: Mapping[str, Any]) -> None:
    """Give a new strategy object the attributes that an earlier one had."""
    for name, item in attributes.items():
        match item:
            case {"strategy": inner}:
                restore(getattr(strategy, name), inner)
            case {"record": arrays}:
                setattr(strategy, name, to_record(arrays))
            case {"state_dict": state}:
                getattr(strategy, name).load_state_dict(state)
            case {"value": value}:
                setattr(strategy, name, value)


def _problem(content: RecordDict, like: Tree | None) -> str | None:
    """What is wrong with a reply: numbers that are none, or arrays that are not the model's (``like``)."""
    try:
        for record in content.array_records.values():
            if like is not None:
                conform(RecordDict({"arrays": record}), {"arrays": like})
            if not tree.finite(to_tree(record, like)):
                return "NaN or Inf in its update"
    except (ValueError, TypeError, MemoryError) as e:
        return f"its reply is malformed: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
    return None


def _numbers(record: Mapping[str, Any] | None) -> dict[str, float]:
    return {n: float(v) for n, v in (record or {}).items() if isinstance(v, int | float)}


def _examples(reply: Message) -> int:
    counts = [r["num-examples"] for r in reply.content.metric_records.values() if "num-examples" in r]
    return sum(int(n) for n in counts if isinstance(n, int | float))


def _bytes(message: Message) -> int:
    """Bytes of the arrays of a message, by shape and type: as ``tree.nbytes`` counts them."""
    records: RecordDict = message.content
    return sum(
        int(np.prod(a.shape, dtype=np.int64)) * np.dtype(a.dtype).itemsize
        for r in records.array_records.values()
        for a in r.values()
    )
