"""``fedsim run-app``: anybody's Flower app on our engine, as it is.

The app's own ``ServerApp`` runs in this process over a Flower ``Grid`` whose nodes are here too: a message is a
function call. No state database, no polling, no copy of the model for each client. What a ``ClientApp`` can see of its
node is what Flower's simulation shows it: ``partition-id``, ``num-partitions``, its run config, and ``context.state``.

Not supported: the legacy ``client_fn`` and ``NumPyClient``, which Flower has deprecated.
"""

import contextlib
import copy
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import Result, Strategy

from fedsim import config, offline, record
from fedsim.errors import ConfigError, FedsimError, where
from fedsim.grids import flower
from fedsim.grids.flower import MessageGrid, error_reply
from fedsim.worker import reason

LEGACY_OPTIONS = "options"
DEFAULT_SUPERNODES = 2  # what Flower's own simulation starts where nothing else is said


class App(NamedTuple):
    """A Flower app: where it is, its components as ``module:attribute``, and its run config with overrides applied."""

    folder: Path
    server: str
    client: str
    run_config: dict[str, Any]
    overrides: dict[str, Any]
    supernodes: int


class Ran(NamedTuple):
    """What an app's run gave. ``seconds`` covers everything, ``round_seconds`` the strategy's rounds alone, and
    ``client_seconds`` the ClientApp's part of these; Flower's simulation does not tell it.

    ``metrics`` are those of each strategy that was started: which kind, round, and the values.
    """

    metrics: list[dict[str, dict[str, dict[str, float]]]]
    messages: int
    failures: list[str]
    seconds: float
    round_seconds: float
    client_seconds: float = 0.0

    @property
    def final(self) -> dict[str, float]:
        """The metrics of the last round of the last strategy, by kind and name."""
        last: dict[str, float] = {}
        for kind, rounds in (self.metrics[-1] if self.metrics else {}).items():
            if rounds:
                last |= {f"{kind}.{name}": value for name, value in rounds[max(rounds, key=int)].items()}
        return last


def load(folder: Path, assignments: Sequence[str] = (), supernodes: int | None = None) -> App:
    """The app in a folder. Raises ``ConfigError`` for all that is not a Message-API app."""
    tables = config.read(folder / "pyproject.toml")
    try:
        app = tables["tool"]["flwr"]["app"]
        components = app["components"]
        server, client = str(components["serverapp"]), str(components["clientapp"])
    except (KeyError, TypeError):
        raise ConfigError(
            f"{folder / 'pyproject.toml'}: has no [tool.flwr.app.components] with serverapp and clientapp"
        ) from None
    known = flower.flat(app.get("config", {}))
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, eq, text = assignment.partition("=")
        if not eq:
            raise ConfigError(f"{assignment}: overrides are written key=value")
        if key not in known:
            raise ConfigError(f"{key}: is not in the app's [tool.flwr.app.config] (known: {', '.join(known) or '-'})")
        overrides[key] = config.value(text)
    nodes = supernodes if supernodes is not None else _supernodes(tables)
    if nodes < 1:
        raise ConfigError(f"--supernodes: must be at least 1 (got {nodes})")
    return App(folder.resolve(), server, client, known | overrides, overrides, nodes)


def _supernodes(tables: Mapping[str, Any]) -> int:
    """The number of nodes in a pyproject of the time when the federation was described there."""
    federations = tables["tool"]["flwr"].get("federations", {})
    chosen = federations.get(federations.get("default", ""), {})
    return int(chosen.get("options", {}).get("num-supernodes", DEFAULT_SUPERNODES))


class AppGrid(MessageGrid):
    """A Flower ``Grid`` that executes a ``ClientApp`` in this process; a node keeps its ``context.state``."""

    def __init__(self, app: ClientApp, nodes: int, run_config: Mapping[str, Any]) -> None:
        super().__init__(nodes, run_config)
        self._app = app
        self._states: dict[int, RecordDict] = {}
        self.messages, self.seconds = 0, 0.0
        self.failures: list[str] = []

    def execute(self, messages: list[Message]) -> list[Message]:
        return [self._reply(message) for message in messages]

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        client = self.client(node)
        state = copy.deepcopy(self._states.get(node, RecordDict()))  # of a message that fails, nothing is kept
        context = self.context(client, state)
        self.messages += 1
        began = time.perf_counter()
        try:
            # Messages of a round share one content; a node that changes its own must not change its neighbours'.
            reply = self._app(flower.own_content(message), context)
        except Exception as e:
            self.failures.append(f"node of partition {client}: {reason(e)} ({where(e)})")
            return error_reply(message, reason(e))
        finally:
            self.seconds += time.perf_counter() - began
        self._states[node] = context.state
        return reply


def run(app: App, seed: int = 0) -> Ran:
    """Run an app on our engine. Raises ``FedsimError`` where its ServerApp fails."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    with _importable(app.folder), watched() as seen:
        server, client = _component(app.server, ServerApp), _component(app.client, ClientApp)
        grid = AppGrid(client, app.supernodes, app.run_config)
        context = Context(flower.RUN_ID, flower.SERVER_NODE, {}, RecordDict(), dict(app.run_config))
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            server(grid, context)
        except FedsimError:
            raise
        except Exception as e:
            raise FedsimError(f"the app's ServerApp failed: {reason(e)} ({where(e)})") from e
    return Ran(seen.metrics, grid.messages, grid.failures, time.perf_counter() - began, seen.seconds, grid.seconds)


def run_flower(app: App, timeout: float = 1800) -> Ran:
    """Run the same app in Flower's own simulation (Ray), in a process of its own. Raises ``FedsimError``."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedsim-app-") as home:
        out = Path(home) / "ran.json"
        spec = json.dumps([str(app.folder), app.server, app.client, app.run_config, app.overrides, app.supernodes])
        (Path(home) / offline.CLUSTER_FILE).write_text(offline.CLUSTER)
        env = os.environ | {"HOME": home, "FLWR_HOME": home, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        call = [sys.executable, "-m", "fedsim.run_app", spec, str(out)]
        try:
            done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise FedsimError(f"Flower's simulation had not ended after {timeout:.0f} s") from None
        if done.returncode or not out.exists():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")
            raise FedsimError(f"Flower's simulation failed: {last}")
        ran = json.loads(out.read_bytes())
    return Ran(ran["metrics"], ran["messages"], ran["failures"], time.perf_counter() - began, ran["round_seconds"])


class Seen:
    """What the strategies that an app starts have returned, and how long their rounds took."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, dict[str, dict[str, float]]]] = []
        self.seconds = 0.0

    def add(self, result: Result, seconds: float) -> None:
        kinds = {
            "train": result.train_metrics_clientapp,
            "evaluate": result.evaluate_metrics_clientapp,
            "server": result.evaluate_metrics_serverapp,
        }
        self.metrics.append(
            {
                kind: {
                    str(number): {name: float(v) for name, v in values.items() if isinstance(v, int | float)}
                    for number, values in rounds.items()
                }
                for kind, rounds in kinds.items()
            }
        )
        self.seconds += seconds


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Note what ``Strategy.start`` returns: an app tells nobody but its log."""
    seen, start = Seen(), Strategy.start

    def noted(self: Strategy, *args: Any, **kwargs: Any) -> Result:
        began = time.perf_counter()
        result = start(self, *args, **kwargs)
        seen.add(result, time.perf_counter() - began)
        return result

    Strategy.start = noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Strategy.start = start  # type: ignore[method-assign]


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The app's modules can be imported, and are forgotten afterwards: the next app may use the same names."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


def _component(reference: str, kind: type) -> Any:
    module, _, attribute = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as e:
        raise ConfigError(f"the app's '{reference}' cannot be loaded: {reason(e)}") from e
    if not isinstance(found, kind):
        raise ConfigError(f"the app's '{reference}' is not a {kind.__name__}")
    return found


def report(ours: Ran, theirs: Ran | None, say: Callable[[str], None] = print) -> None:
    """Print the metrics of the last round; beside those of Flower's simulation, where there is one."""
    for failure in ours.failures[:3]:
        say(f"failed: {failure}")
    if ours.failures:
        say(f"{len(ours.failures)} of {ours.messages} messages failed")
    if theirs is None:
        for name, value in ours.final.items():
            say(f"{name:<32} {value:.6g}")
        say(f"{ours.messages} messages in {ours.round_seconds:.2f} s ({_each(ours):.2f} ms each)")
        return
    say(f"{'':<32} {'fedsim':>14} {'flower':>14} {'difference':>12}")
    for name, value in ours.final.items():
        other = theirs.final.get(name, float("nan"))
        say(f"{name:<32} {value:>14.8g} {other:>14.8g} {abs(value - other):>12.2g}")
    say(f"{'messages':<32} {ours.messages:>14} {theirs.messages:>14}")
    say(f"{'seconds, with start-up':<32} {ours.seconds:>14.2f} {theirs.seconds:>14.2f}")
    say(f"{'seconds of rounds':<32} {ours.round_seconds:>14.2f} {theirs.round_seconds:>14.2f}")
    say(f"{'ms a message':<32} {_each(ours):>14.2f} {_each(theirs):>14.2f}")
    mine, other = overhead(ours, ours), overhead(theirs, ours)
    say(f"{'of which overhead':<32} {mine:>14.2f} {other:>14.2f}")
    times = _each(theirs) / _each(ours)
    say(f"flower takes {times:.1f} times as long a message, with {other / mine:.0f} times the overhead")


def overhead(ran: Ran, ours: Ran) -> float:
    """Milliseconds a message that are not the ClientApp's, which takes what it took in ``ours``: one client after the
    other. Flower's simulation runs clients side by side, so that its overhead is rather more than this."""
    return 1000 * max(ran.round_seconds - ours.client_seconds, 0.0) / max(ran.messages, 1)


def _each(ran: Ran) -> float:
    """Milliseconds of rounds a message."""
    return 1000 * ran.round_seconds / max(ran.messages, 1)


def _main() -> None:
    """The process of ``run_flower``: an app's specification and where its results go."""
    folder, server, client, run_config, overrides, supernodes = json.loads(sys.argv[1])
    with watched() as seen:
        answered, failures = flower.simulate(Path(folder), server, client, run_config, overrides, supernodes)
    ran = {"metrics": seen.metrics, "messages": answered, "failures": failures, "round_seconds": seen.seconds}
    Path(sys.argv[2]).write_bytes(record.encode(ran))


if __name__ == "__main__":
    _main()
