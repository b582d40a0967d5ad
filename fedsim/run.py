"""A run from its config: build everything, then write. Here the kernel, the clients and the server come together."""

import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch
from safetensors.torch import save
from torch import Tensor

from clients.app import client_app, proximal
from clients.evaluate import after_training, evaluation
from fedsim import (
    attack,
    checkpoint,
    config,
    data,
    files,
    offline,
    privacy,
    process,
    record,
    registry,
    sources,
    tree,
)
from fedsim.block import Work
from fedsim.config import Experiment
from fedsim.data.dataset import Federation
from fedsim.errors import ConfigError, FedsimError, ResumeError, Terminated, where
from fedsim.grids.inline import App, BlockGrid, Executor, InlineGrid, Order, Site, canonical, check
from fedsim.memory import Memory
from fedsim.node import alone, unstacked
from fedsim.privacy import Account, Private
from fedsim.rng import Key
from fedsim.tasks import metrics
from fedsim.types import Local, Strategy, Task, wellformed
from fedsim.worker import Failure, reason, say_once
from server import foreign
from server.flower import Messages
from server.loop import Driver, Native, Panel, Round, rounds
from server.nodes import NAME, Deployment
from server.reduce import collect

log = logging.getLogger("fedsim")

# What may change at a resume, since it decides no number of a round.
FREE = {"rounds", "checkpoint.every", "checkpoint.keep", "engine.memory_mb", "privacy.max_epsilon"}
FREE |= {"engine.kind", "engine.workers", "engine.deadline"}


class Session(NamedTuple):
    """An experiment, built and ready to run. Nothing has been written."""

    experiment: Experiment
    federation: Federation
    task: Task
    driver: Driver[Any]
    memory: Memory
    grid: BlockGrid
    site: Site
    private: Private | None = None
    attacker: attack.Attacker | None = None

    def close(self) -> None:
        """End the workers, where there are any."""
        self.grid.close()


def build(experiment: Experiment, order: Order | None = None, secret: Key | None = None) -> Session:
    """Everything that a run needs. Raises ``ConfigError`` (``DataError``) for what only data can tell."""
    offline.prepare()
    dtype = torch.float64 if experiment.task.dtype == "float64" else torch.float32
    federation = data.federation(experiment.data, experiment.seed).to(device(experiment.engine.device), dtype)
    population = len(federation)
    if experiment.strategy.cohort > population:
        raise ConfigError(
            f"strategy.cohort: must be at most {population}, the number of clients (got {experiment.strategy.cohort})"
        )
    task: Task = registry.build(
        "tasks", experiment.task.model, "task.model", experiment.task, federation.dataset, population
    )
    session = assemble(experiment, federation, task, order, secret)
    if experiment.attack is None or not experiment.attack.every:
        return session
    sigma = session.private.sigma if session.private else None
    return session._replace(attacker=attack.build(experiment, federation, task, sigma))


def assemble(
    experiment: Experiment, federation: Federation, task: Task, order: Order | None = None, secret: Key | None = None
) -> Session:
    """The session of an experiment on this federation and task, which need not be those that its config names.

    ``secret`` names the draws that privacy rests on; without it there is a new one.
    """
    process.prepare()
    private: Private | None = None
    strategy: Any
    if experiment.privacy:
        strategy, private = privacy.protect(experiment, federation, task, secret)
    else:
        name = experiment.strategy.name
        strategy = registry.build("strategies", name, "strategy.name", experiment.strategy, task)
        if not isinstance(strategy, foreign.Foreign):
            wellformed(strategy, name)
    key, population = Key.root(experiment.seed), len(federation)
    memory = Memory(limit=experiment.engine.memory_mb << 20)

    if isinstance(strategy, foreign.Foreign):
        return _foreign(experiment, federation, task, strategy, memory, order)

    if experiment.evaluate.local:
        if not experiment.data.holdout:
            raise ConfigError("evaluate.local: needs held-out examples of the clients: set data.holdout")
        strategy = after_training(task, strategy)
    local = evaluation(task, strategy, experiment.evaluate.batch_size)
    panel = Panel(local, experiment.evaluate.clients) if experiment.data.holdout else None
    streams, choose = (private.key, private.choose) if private else (key, None)

    def local_of(phase: int) -> Local:
        return local if phase < 0 else strategy.phases[phase].local

    app = client_app(federation, local_of, streams, one=alone(experiment))
    site = Site(federation, lambda p: (local_of(p), collect() if p < 0 else strategy.phases[p].reduce), app)
    ready = privacy.resolved(experiment, private) if private else experiment  # a worker searches for no noise
    grid = place(ready, federation, memory, app, order, private.key if private else None)
    where, cohort = executor(experiment, federation, grid), experiment.strategy.cohort
    driver = Native(strategy, where, key, population, cohort, panel, streams, choose)
    if where is grid:
        grid.cohorts = driver.cohort
    return Session(experiment, federation, task, driver, memory, grid, site, private)


def site(experiment: Experiment, federation: Federation, secret: Key | None) -> Site:
    """What a worker needs to run the phases of an experiment that another process drives."""
    process.prepare()
    task: Task = registry.build(
        "tasks", experiment.task.model, "task.model", experiment.task, federation.dataset, len(federation)
    )
    return assemble(experiment, federation, task, secret=secret).site


def place(
    experiment: Experiment, federation: Federation, memory: Memory, app: App, order: Order | None, secret: Key | None
) -> BlockGrid:
    """The grid of ``engine.kind``. Raises ``ConfigError`` where what it needs is not installed."""
    if experiment.engine.kind == "inline":
        return InlineGrid(federation, experiment.engine, memory, app, order)
    try:
        from fedsim.grids.ray import RayGrid
    except ImportError as e:
        if (e.name or "").split(".")[0] != "ray":
            raise
        raise ConfigError("engine.kind: 'ray' needs Ray: pip install 'fedsim-engine[ray]'") from None
    return RayGrid(experiment, federation, memory, app, secret)


def executor(experiment: Experiment, federation: Federation, grid: BlockGrid) -> Executor:
    """The grid's fast path, or real Flower messages over it."""
    if experiment.engine.paths == "fast":
        return grid

    def on_failure(failures: tuple[Failure, ...], work: Work) -> None:
        check(failures, experiment.engine, work)

    return Messages(grid, grid.node, canonical=lambda cohort: canonical(cohort, federation), on_failure=on_failure)


def _foreign(
    experiment: Experiment,
    federation: Federation,
    task: Task,
    strategy: foreign.Foreign,
    memory: Memory,
    order: Order | None,
) -> Session:
    """The session of a Flower strategy. Its clients do local SGD; a "proximal-mu" in its messages is honoured."""
    if experiment.evaluate.local:
        raise ConfigError(
            "evaluate.local: must be false for a strategy of Flower's, whose clients only train (got true)"
        )
    local = proximal(task, strategy.config)
    plain = local({})
    # The global model is evaluated as that of a strategy of ours with this local update would be.
    shape: Strategy[Any] = Strategy(lambda g: None, (_Phase(plain),), lambda s: {}, ())  # type: ignore[arg-type]
    scorer = evaluation(task, shape, experiment.evaluate.batch_size)
    panel = Panel(scorer, experiment.evaluate.clients) if experiment.data.holdout else None
    key = Key.root(experiment.seed)
    held_out = scorer if experiment.data.holdout else None
    app = client_app(federation, lambda phase: scorer, key, local, held_out, unstacked(experiment))
    grid = place(experiment, federation, memory, app, order, None)
    driver = foreign.Driver(strategy, task, grid, experiment.engine, key, len(federation), plain, grid, panel)
    site = Site(federation, lambda phase: (scorer, collect()), app)
    return Session(experiment, federation, task, driver, memory, grid, site)


class _Phase(NamedTuple):
    local: Any


def deployed(session: Session, deployment: Deployment) -> Session:
    """The session with its clients at the nodes of a deployment, as they are: some may be missing, or lie."""
    experiment, driver, private = session.experiment, session.driver, session.private
    if experiment.attack is not None:
        raise ConfigError("attack: belongs to simulations; at a deployment's nodes there is nothing to look into")
    cohort, population = experiment.strategy.cohort, len(session.federation)
    sigma = {"sigma": private.sigma} if private and private.config.mode == "example" else {}
    least = driver.least if isinstance(driver, foreign.Driver) else 1
    nodes = deployment.connect(population, least, sigma)
    if sigma:
        nodes.expected = lambda client: session.federation.size(client, "train")

    def on_failure(failures: tuple[Failure, ...], work: Work) -> None:
        check(failures, experiment.engine, work)

    executor = Messages(nodes, nodes.node, canonical=nodes.canonical, on_failure=on_failure)
    if isinstance(driver, foreign.Driver):
        return session._replace(driver=driver.over(nodes, executor))
    choose = nodes.choose(Key.root(experiment.seed), cohort)
    if private:
        drawn = private.choose  # what is accounted for, whoever is here

        def choose(round: int) -> list[int]:
            nodes.gather(round)
            return drawn(round)

    assert isinstance(driver, Native)
    return session._replace(driver=driver.over(executor, choose))


def begin(session: Session) -> Any:
    """The state before round 1. Raises ``ConfigError`` where the strategy fails to make it, or a model of it."""
    name = session.experiment.strategy.name
    try:
        state = session.driver.begin()
        params = session.driver.params(state)
    except FedsimError:
        raise
    except Exception as e:
        raise ConfigError(f"strategy.name: '{name}' cannot begin: {reason(e)} ({where(e)})") from e
    if not isinstance(params, dict) or not all(isinstance(x, Tensor) for x in params.values()):
        raise ConfigError(f"strategy.name: params of '{name}' must give named tensors (got {type(params).__name__})")
    return state


def device(name: str) -> torch.device:
    """The device of a config's name. Raises ``ConfigError`` where a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: 'cuda' was asked for, but torch sees no GPU here")
    if name == "cpu" and torch.cuda.is_available():
        say_once("a GPU is here and not used: engine.device=cuda runs clients on it")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def run(
    experiment: Experiment,
    out: Path,
    *,
    resume: bool = False,
    show: Callable[[Mapping[str, Any]], None] = lambda line: None,
    order: Order | None = None,
    deployment: Deployment | None = None,
) -> dict[str, Any]:
    """Run an experiment into a folder, and return its summary (``summary.json``).

    Raises ``ConfigError`` before anything is written. A run that fails later leaves a summary with status "failed" and
    its last checkpoint; ``resume`` continues from there to the same bits.
    """
    clock = time.perf_counter()
    check_folder(out, resume)
    if resume:
        check_same(experiment, out)
        if deployment is None and (out / NAME).exists():
            raise ResumeError(f"--resume: the clients of {out} are a deployment's; go on with fedsim deploy run")
    secret = privacy.secret(experiment, out / "checkpoint") if experiment.privacy else None
    session = build(experiment, order, secret)
    with closing(session):
        return _run(session, out, resume, show, deployment, clock)


def _run(
    session: Session,
    out: Path,
    resume: bool,
    show: Callable[[Mapping[str, Any]], None],
    deployment: Deployment | None,
    clock: float,
) -> dict[str, Any]:
    experiment = session.experiment
    if not session.driver.is_global and not experiment.data.holdout:
        name = experiment.strategy.name
        log.warning("data.holdout: is 0, so no accuracy is measured: '%s' has no global model to test", name)
    if deployment:
        session = deployed(session, deployment)
    state, done, extra, origin = begin(session), 0, {}, origin_of(session)
    with lock(out):
        check_folder(out, resume)  # another process may have begun a run, and ended it, while this one was built
        store = checkpoint.Store(out / "checkpoint", experiment.checkpoint.keep)
        if resume and any((out / "checkpoint").glob("round-*")):
            found = store.load(checkpoint.named_tuples(state))
            check_origin(experiment, found, origin)
            origin = sources.continued(found.extra, origin, found.round, experiment.rounds)
            state, done, extra = found.state, found.round, found.extra
            session.memory.update(found.memory)
            session.memory.changed.clear()
        account = privacy.opened(session.private, extra if done else None) if session.private else None
        last = account.affordable(done, experiment.rounds) if account else experiment.rounds
        releases = None
        if account:
            privacy.keep(account.private, out / "checkpoint")
            if experiment.privacy and experiment.privacy.noise == "os":
                releases = privacy.Releases(out / "checkpoint" / privacy.RELEASES)
                assert isinstance(session.driver, Native)
                session = session._replace(driver=session.driver.noting(releases.note))
        if deployment:
            files.write(out / NAME, deployment.name.encode())
        began = (out / record.METRICS).exists()
        if done and not began:
            raise ResumeError(f"{out / record.METRICS}: missing, though the checkpoint is that of round {done}")
        dumped = config.dump(experiment)
        try:
            opened = record.reopen(out, done, clock=clock) if began else record.create(out, dumped, clock=clock)
            if began:  # what may change is written as it is now
                files.write(out / record.CONFIG, tomli_w.dumps(dumped).encode())
        except OSError as e:
            raise FedsimError(f"{out} cannot be written: {e.strerror or e}") from e
        finish = partial(opened.finish, more={name: origin[name] for name in sources.KEPT if name in origin})
        with opened as book:
            try:
                with stoppable():
                    state, last = _rounds(session, state, done, last, account, releases, store, origin, book, show)
            except KeyboardInterrupt:
                finish("stopped", params_sha256=None, error="interrupted")
                raise
            except FedsimError as e:
                with suppress(OSError):  # the disk may be what failed, and the first reason is the one to tell
                    finish("failed", params_sha256=None, error=str(e))
                raise
            params = session.driver.params(state)
            try:
                files.write(out / "model.safetensors", save({n: x.detach().cpu().clone() for n, x in params.items()}))
                for name, content in session.driver.export(state).items():
                    (out / name).parent.mkdir(exist_ok=True)
                    files.write(out / name, content)
                if last < experiment.rounds:
                    why = f"round {last + 1} would have spent more than the privacy budget"
                    return finish("stopped", params_sha256=tree.digest(params), error=why)
                return finish("completed", params_sha256=tree.digest(params))
            except OSError as e:
                raise FedsimError(f"{out} cannot be written: {e.strerror or e}") from e


def _rounds(
    session: Session,
    state: Any,
    done: int,
    last: int,
    account: Account | None,
    releases: privacy.Releases | None,
    store: checkpoint.Store,
    origin: Mapping[str, Any],
    book: record.Record,
    show: Callable[[Mapping[str, Any]], None],
) -> tuple[Any, int]:
    """Run what is left, writing each round's line before its checkpoint: the state, and the last round there was."""
    experiment = session.experiment
    every = experiment.evaluate.every
    dumped = config.dump(experiment)

    def due(round: int) -> bool:
        return round % every == 0 or round == last

    steps, number = rounds(session.driver, state, done + 1, last, due), done
    while number < last:
        number += 1
        try:
            leaked = leaks(session, state, number, book.folder)  # what this round sends, before it does
            finished = next(steps)
            if account:
                others = releases.others(number) if releases else 0
                account = account.after(number, 1 + others)
                last = account.last(number, last) if others else last
            line = measure(session, finished, due(number))
        except FedsimError:
            raise
        except Exception as e:
            log.debug("round %d", number, exc_info=True)
            name = experiment.strategy.name
            raise FedsimError(
                f"strategy '{name}' failed in round {number} on the server: {reason(e)} ({where(e)})"
            ) from e
        state = finished.state
        if account:
            line = privacy.public(account, line)
        line |= leaked
        try:
            book.append(line)
            if finished.scores is not None:
                book.clients({"client": s.client, "examples": s.examples, **s.metrics} for s in finished.scores)
            if number % experiment.checkpoint.every == 0 or number == last:
                extra = {**origin, "privacy": account.dump()} if account else origin
                store.save(number, dumped, state, session.memory, extra)
                if account:
                    privacy.write(account, book.folder)
        except OSError as e:
            raise FedsimError(f"round {number} cannot be written to {book.folder}: {e.strerror or e}") from e
        except TypeError as e:
            raise FedsimError(f"strategy '{experiment.strategy.name}': its state of round {number}: {e}") from e
        show(line)
    session.driver.conclude(state)
    return state, last


def leaks(session: Session, state: Any, round: int, folder: Path) -> dict[str, float]:
    """The figures of an attack on this round, with its pictures in the folder; {} in a round that is not attacked."""
    of, attacker = session.experiment.attack, session.attacker
    if of is None or attacker is None or (round - 1) % of.every:
        return {}
    return attack.save(
        folder, attacker(state, session.memory, round), round, attacker.config.model_dump(exclude_none=True)
    )


def measure(session: Session, finished: Round[Any], evaluate: bool) -> dict[str, Any]:
    """One line of ``metrics.jsonl``."""
    began = time.perf_counter()
    trained, experiment = finished.trained, session.experiment
    line: dict[str, Any] = {"round": finished.number}
    params = session.driver.params(finished.state)
    if evaluate and session.driver.is_global:
        test = session.federation.dataset.test
        line |= metrics.evaluate(session.task, params, test.x, test.y, experiment.evaluate.batch_size)
    line |= trained.metrics
    for prefix, key in (("client_", "accuracy"), ("personal_", "personal_accuracy")):
        scores = [s for s in finished.scores or () if key in s.metrics]
        if scores:
            spread = metrics.spread([s.metrics[key] for s in scores], [s.examples for s in scores])
            line |= {name.replace("client_", prefix, 1): value for name, value in spread.items()}
    line |= session.driver.gauges(finished.state)
    line |= {
        "clients": trained.clients,
        "examples": trained.examples,
        "bytes_down": trained.bytes_down,
        "bytes_up": trained.bytes_up,
        "seconds": finished.seconds + time.perf_counter() - began,
    }
    if trained.failures:
        line["failures"] = [failure._asdict() for failure in trained.failures]
    return line


def check_folder(out: Path, resume: bool | None = None) -> None:
    """Refuse a folder that must not be written into, without touching it; ``resume`` is None for what is no run."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file")
    # Names with a dot are ours: the lock, and what a run that was killed in its first moment has left.
    if out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        if not resume:
            hint = "" if resume is None else "; --resume continues the run in it"
            raise ConfigError(f"--out: {out} is not empty{hint}")
        if not (out / record.CONFIG).exists():
            raise ConfigError(f"--out: {out} holds files, but no run to resume")
    parent = next(p for p in (out, *out.parents, *out.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise ConfigError(f"--out: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: {parent} cannot be written")


def check_same(experiment: Experiment, out: Path) -> None:
    """A run goes on with the config that it began with, but for settings that decide no number."""
    if not (out / record.CONFIG).exists():
        log.warning("nothing to resume in %s: starting at round 1", out)
        return
    changed = config.differences(record.read_config(out), config.dump(experiment))
    changed = [key for key in changed if key not in FREE]
    if changed:
        raise ResumeError(f"--resume: the config differs from the run's in {', '.join(changed)}")


def origin_of(session: Session) -> dict[str, Any]:
    """What a run's numbers come from beside its config: the bytes of its data and who has them, and the code.

    That is the user's own, by its bytes, and what is installed, by its versions.
    """
    dataset = session.federation.dataset
    parts = {"train": dataset.train, "test": dataset.test}
    digest = tree.digest({f"{name}.{of}": getattr(split, of) for name, split in parts.items() for of in ("x", "y")})
    return {
        "data": digest,
        "partition": sources.partition(session.federation),
        "sources": sources.files(session.experiment),
        "versions": record.environment(),
    }


def check_origin(experiment: Experiment, found: checkpoint.Checkpoint, now: Mapping[str, Any]) -> None:
    """Refuse other data and fewer rounds than are done; name code that has changed, since bits may then differ."""
    if experiment.rounds < found.round:
        raise ResumeError(
            f"rounds: must be at least {found.round}, the round of the last checkpoint (got {experiment.rounds})"
        )
    if found.extra.get("data") != now["data"]:
        raise ResumeError(
            f"data.name: the examples of '{experiment.data.dataset.name}' are not those the run began with"
        )
    if found.round < experiment.rounds and (files := sources.changed(found.extra, now)):
        log.warning(
            "resuming with other code than the run began with, so its rounds do not compare: %s", ", ".join(files)
        )
    before = found.extra.get("versions", {})
    changed = {name: version for name, version in now["versions"].items() if before.get(name) != version}
    if changed:
        text = ", ".join(f"{name} {before.get(name, '-')} → {version}" for name, version in changed.items())
        log.warning("resuming with other versions, which may give other bits: %s", text)


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the folder, so that no second process writes into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as e:
        raise ConfigError(f"--out: {out} cannot be written: {e.strerror or e}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out: {out} is in use by another fedsim process") from None
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: the last checkpoint stands, the summary says so."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: the caller's signals are the caller's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
