"""Clients in Ray's workers: one machine's cores, its GPUs, or a cluster. The only file that imports ray.

Workers are actors that live as long as the run. Each builds the strategy from the experiment, as the driver did: code
and closures do not travel. The data set lies in shared memory once a machine. A phase is a few messages a worker, never
one a client: the broadcast is put once for all, a message names blocks of clients with what these remember, and what
comes back is the fold of their reports. Long blocks go first, and a worker that is free takes what is left, less at a
time towards the end; how long a block is, is fitted to what messages took. Blocks and the shape of the fold are the
config's, so no number depends on any of this.

A worker that dies, or does not answer within ``engine.deadline`` seconds, is replaced, and its blocks run again with
the same numbers. A block whose worker dies every time is taken apart: the client that kills workers is named, and the
run's policy decides about it.

Ray is started on loopback only, with a fresh token, without dashboard and usage report, and with a cluster file in a
home of its own: without one, its start asks the cloud's metadata address where it is.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Context, Message
from torch import Tensor

from fedsim import config, offline, registry, tree, worker
from fedsim.block import Guest, Work
from fedsim.config import Experiment
from fedsim.data.dataset import Dataset, Federation, Partition, Split
from fedsim.data.partition import Lists
from fedsim.errors import FedsimError
from fedsim.fold import Fold, Node
from fedsim.grids.cost import Cost, examples
from fedsim.grids.flower import error_reply, from_value, identify, to_value
from fedsim.grids.inline import App, Block, BlockGrid, Site, Way, answer
from fedsim.grids.place import Machine, here, need, place
from fedsim.memory import Memory
from fedsim.rng import Key
from fedsim.types import Local, Payload, Reducer
from fedsim.worker import Failure, Partial, reason

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's own default, 15, starves workers on a machine that does anything else
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # whatever its name says: without it, loopback becomes the host's address
}
# Ray reads some of these when it is imported, and every process of it the token.
TOO_LATE = "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token"
os.environ |= QUIET | {"RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)}

import ray  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402

log = logging.getLogger("fedsim")

START = 180.0  # seconds in which a worker must be there
DEATHS = 2  # of workers on one block alone, before it is taken apart
SHARE = 1.25  # a free worker takes this part of its share of what is left: most of it at first, little at the end
STILLBORN = 3  # workers in a row that die before they are there
CONTEXT = 600 << 20  # bytes of a GPU that CUDA takes for each process
STORE = 1 << 28  # bytes of the object store besides what is known to go in
U = TypeVar("U")


class Packed(NamedTuple):
    """A tensor on its way: an array that travels without a copy, and the dtype where numpy has none."""

    array: Any
    dtype: str | None


def pack(value: Any) -> Any:
    """``value`` with every tensor in it as ``Packed``."""
    if isinstance(value, Tensor):
        x = value.detach().cpu().contiguous()
        return Packed(x.view(torch.int16).numpy(), "bfloat16") if x.dtype == torch.bfloat16 else Packed(x.numpy(), None)
    return _inside(pack, value)


def unpack(value: Any) -> Any:
    """The inverse of ``pack``; tensors have memory of their own, which may be written."""
    if isinstance(value, Packed):
        x = torch.from_numpy(np.array(value.array))
        return x.view(torch.bfloat16) if value.dtype else x
    return _inside(unpack, value)


def _inside(f: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: f(x) for name, x in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(f(x) for x in value))
    if isinstance(value, list | tuple):
        return type(value)(f(x) for x in value)
    return value


class World(NamedTuple):
    """A federation on its way: arrays that a machine's workers read in place."""

    name: str
    train: tuple[Any, Any]
    test: tuple[Any, Any]
    owners: tuple[Any, Any]  # the natural owners of both splits, by which a partitioner may ask
    classes: int
    partition: Partition | None  # None: the worker makes it again from the config
    holdout: float
    key: Key


def export(federation: Federation) -> World:
    """The world as Ray stores it. Partitions that are lists travel; others are cheap to make, or not ours."""
    d = federation.dataset

    def arrays(s: Split) -> tuple[Any, Any]:
        return s.x.cpu().numpy(), s.y.cpu().numpy()

    held = federation.partition if isinstance(federation.partition, Lists) else None
    owners = d.train.client, d.test.client
    return World(d.name, arrays(d.train), arrays(d.test), owners, d.classes, held, federation.holdout, federation.key)


def load(world: World, experiment: Experiment, device: torch.device) -> Federation:
    """The federation of a world. On a CPU its tensors are the shared memory itself, which nobody writes."""

    def split(arrays: tuple[Any, Any], owners: Any) -> Split:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch cannot mark memory as read-only, and says so
            x, y = (torch.from_numpy(a) for a in arrays)
        return Split(x.to(device), y.to(device), owners)

    train, test = map(split, (world.train, world.test), world.owners)
    dataset = Dataset(world.name, train, test, world.classes)
    partition = world.partition
    if partition is None:
        partitioner = registry.load("partitioners", experiment.data.partition.name)
        partition = partitioner.build(experiment.data.partition, dataset, Key.root(experiment.seed).at("partition"))
    return Federation(dataset, partition, world.holdout, world.key)


class Driver(NamedTuple):
    """What workers take over from the process that drives them."""

    home: str | None
    path: list[str]  # where a user's own modules are found
    folders: list[Path]  # and files


class Actor:
    """A worker: builds its site once, and runs what it is told."""

    def __init__(self, tables: dict[str, Any], world: World, secret: Key | None, driver: Driver) -> None:
        if driver.home is not None:
            os.environ["HOME"] = driver.home  # Ray was started in one of its own
        sys.path += [folder for folder in driver.path if folder not in sys.path]
        registry.look_in(*driver.folders)
        offline.prepare()
        identify()
        logging.getLogger("fedsim").setLevel(logging.ERROR)  # what matters is in the answers
        from fedsim import run

        experiment = config.parse(tables)
        federation = load(world, experiment, run.device(experiment.engine.device))
        self._site: Site = run.site(experiment, federation, secret)
        self._shared: tuple[int, Payload] = (-1, {})

    def hello(self) -> int:
        """This process's number, once it is ready."""
        return os.getpid()

    def blocks(
        self,
        serial: int,
        about: tuple[int, int, Key],
        shared: Any,
        blocks: list[Block],
        memory: dict[int, Any],
        cohort: int,
        how: Way,
    ) -> Any:
        """Run blocks of a phase and fold what they report, with the seconds that it took. ``memory`` is that of the
        clients that have one."""
        began = time.perf_counter()
        if self._shared[0] != serial:
            self._shared = serial, unpack(shared)
        round, phase, key = about
        local, reduce = self._site.local_of(phase)
        work = Work(round, phase, local, self._shared[1], key)
        fold: Fold[Any] = Fold(cohort, reduce.merge)
        total = Partial([], {}, (), 0, 0, 0)
        for start, clients in blocks:
            mine = [Guest(c, unpack(memory[c]) if c in memory else None) for c in clients]
            part = worker.run(
                work, self._site.federation, mine, start, cohort, reduce, how.stacked, how.recorder, how.retry
            )
            for node in part.nodes:
                fold.add(node)
            total = worker.together(total, part._replace(nodes=[]))
        return pack(total._replace(nodes=fold.nodes())), time.perf_counter() - began

    def messages(self, items: list[tuple[Message, Context]]) -> list[tuple[Message, Any]]:
        """What the ClientApp replies, and each node's new state."""
        out = []
        for message, context in items:
            reply = answer(self._site.app, message, context)
            out.append((reply, None if reply.has_error() else pack(to_value(context.state))))
        return out


class Unit(NamedTuple, Generic[U]):
    """A piece of work that a worker does as a whole; ``alone``: in a message of its own.

    ``place``: its number in the fold. A message of 2^k units from a place that 2^k divides is answered by one node.
    """

    what: U
    cost: float
    alone: bool = False
    deaths: int = 0
    place: int | None = None


def take(queue: deque[Unit[U]], enough: float) -> list[Unit[U]]:
    """The first units, of about this cost: as many as are one node of the fold, where they have a place in it."""
    chunk = [queue.popleft()]
    cost = chunk[0].cost
    while queue and not chunk[0].alone and not queue[0].alone and cost < enough:
        chunk.append(queue.popleft())
        cost += chunk[-1].cost
    if chunk[0].place is None or not queue:  # the last ones may be any number
        return chunk
    whole = 1 << (len(chunk).bit_length() - 1)
    aligned = chunk[0].place & -chunk[0].place or whole
    n = min(whole, aligned)
    queue.extendleft(reversed(chunk[n:]))
    return chunk[:n]


class Answer(NamedTuple, Generic[U]):
    """What came of some units; ``died`` says how workers ended on the only one."""

    units: list[U]
    result: Any
    died: str | None = None


class _Running(NamedTuple):
    """A message on its way. ``hello``: it is a new worker's first sign of life."""

    actor: Any
    units: list[Unit[Any]]
    until: float
    hello: bool = False


class Pool:
    """The workers. Their number stays what it is, whoever dies."""

    def __init__(self, make: Callable[[], Any], size: int, deadline: float | None, local: bool) -> None:
        self._make, self._deadline, self._local = make, deadline, local
        self._pids: dict[Any, int] = {}
        self._running: dict[Any, _Running] = {}
        self._free: list[Any] = []
        self._stillborn = 0
        self.replaced = 0
        for _ in range(size):
            self._new()
        self.size = size

    @property
    def pids(self) -> list[int]:
        """The processes of the workers that are ready."""
        return list(self._pids.values())

    @property
    def present(self) -> int:
        """Workers that are free, at work, or on their way."""
        return len(self._free) + len(self._running)

    def _new(self) -> None:
        actor = self._make()
        self._running[actor.hello.remote()] = _Running(actor, [], time.monotonic() + START, hello=True)

    def run(
        self,
        units: Sequence[Unit[U]],
        call: Callable[[Any, list[U]], Any],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[Answer[U]]:
        """Have all units done, the first ones first. ``call(actor, units)`` sends a message.

        ``meanwhile`` is called once, when everybody is at work.
        """
        waited = False
        queue, left = deque(units), sum(u.cost for u in units)
        try:
            while queue or any(r.units for r in self._running.values()):
                while queue and self._free:
                    chunk = take(queue, left / (SHARE * self.size))
                    left -= sum(u.cost for u in chunk)
                    actor = self._free.pop()
                    until = time.monotonic() + self._deadline if self._deadline else float("inf")
                    self._running[call(actor, [u.what for u in chunk])] = _Running(actor, chunk, until)
                if not waited and any(r.units for r in self._running.values()):
                    waited = True
                    meanwhile()
                for was, result, how in self._ended():
                    if how is None:
                        self._free.append(was.actor)
                        if was.units:
                            yield Answer([u.what for u in was.units], result)
                        continue
                    self._replace(was.actor)
                    for unit in was.units:
                        deaths = unit.deaths + (len(was.units) == 1)
                        if deaths >= DEATHS:
                            yield Answer([unit.what], None, how)
                        else:
                            queue.appendleft(unit._replace(alone=True, deaths=deaths))
                            left += unit.cost
        finally:
            # Whoever asked may have given up: what is still on its way then belongs to nobody.
            self._running = {ref: r._replace(units=[]) for ref, r in self._running.items()}

    def _ended(self) -> list[tuple[_Running, Any, str | None]]:
        """Wait for something to end: (what it was, the result, how the worker died if it did)."""
        soonest = min(r.until for r in self._running.values())
        wait = None if soonest == float("inf") else max(0.0, soonest - time.monotonic())
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=wait)
        out: list[tuple[_Running, Any, str | None]] = []
        for ref in ready:
            was = self._running.pop(ref)
            try:
                result = ray.get(ref)
            except RayTaskError as e:
                raise FedsimError(f"a worker failed: {reason(e.cause)}") from e
            except RayError as e:  # it died, or was killed by Ray's memory monitor, or what it sent is lost
                self._died(was, e)
                out.append((was, None, "its worker died"))
                continue
            if was.hello:
                self._pids[was.actor], self._stillborn = result, 0
            out.append((was, result, None))
        now = time.monotonic()
        for ref, was in [(ref, was) for ref, was in self._running.items() if was.until <= now]:
            del self._running[ref]
            if was.hello:
                raise FedsimError(f"a worker was not there after {START:g} seconds")
            log.warning("a worker did not answer within %g seconds; it is replaced", self._deadline)
            out.append((was, None, f"its worker did not answer within {self._deadline:g} seconds"))
        return out

    def _died(self, was: _Running, e: Exception) -> None:
        if not was.hello:
            log.warning("a worker died; it is replaced, and its blocks run again")
            return
        self._stillborn += 1
        if self._stillborn >= STILLBORN:
            cause = next((line for line in reversed(str(e).strip().splitlines()) if line.strip()), type(e).__name__)
            raise FedsimError(f"workers die before they can work: {cause.strip()}") from e

    def _replace(self, actor: Any) -> None:
        """Make sure that it is dead, and start another. A dead worker never comes back into the pool."""
        pid = self._pids.pop(actor, None)
        if pid is not None and self._local:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # a stopped process does not hear Ray
        with contextlib.suppress(Exception):
            ray.kill(actor, no_restart=True)
        self.replaced += 1
        self._new()

    def close(self) -> None:
        """End all workers."""
        for actor in [*self._free, *(r.actor for r in self._running.values())]:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        self._free, self._running, self._pids = [], {}, {}


def machines(gpus: int) -> list[Machine]:
    """Those of the cluster that this process has joined, or this one."""
    if not ray.is_initialized():
        return [here(gpus)]
    out = []
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and has.get("CPU"):
            used = int(has.get("GPU", 0)) if gpus else 0
            out.append(Machine(node["NodeManagerAddress"], int(has["CPU"]), used, int(has.get("memory", 0))))
    return out


class Cluster:
    """Ray, started for this process; or joined, where ``RAY_ADDRESS`` names a cluster or this process has one."""

    def __init__(self) -> None:
        self._home: Path | None = None
        self._joined = ray.is_initialized()
        self.local = not os.environ.get("RAY_ADDRESS")
        if not self._joined and not self.local:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)

    @property
    def ours(self) -> bool:
        """Whether it was started for this process."""
        return self.local and not self._joined

    def start(self, workers: int, gpus: int, store: int) -> None:
        """Start it, with room for so many workers and bytes of shared memory, unless there is one."""
        if not self.ours:
            return
        if TOO_LATE:
            raise FedsimError(
                "engine.kind: Ray was imported before fedsim could switch its token on; import fedsim.grids.ray before"
                " ray, or set RAY_AUTH_MODE=token"
            )
        self._home = Path(tempfile.mkdtemp(prefix="fs-"))  # short: paths of sockets have 107 bytes
        (self._home / offline.CLUSTER_FILE).write_text(offline.CLUSTER)
        home = os.environ.get("HOME")
        os.environ["HOME"] = str(self._home)
        # A thread of Ray's prints a paragraph about every worker that dies, and has no switch. We tell it ourselves.
        ray._private.worker.listen_error_messages = lambda worker, stopped: None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(
                    address="local",
                    num_cpus=workers,
                    num_gpus=gpus,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    object_store_memory=store,
                    log_to_driver=False,
                    configure_logging=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(self._home / "r"),  # Ray opens it to everybody, and it is not the home
                )
        except Exception as e:
            shutil.rmtree(self._home, ignore_errors=True)
            raise FedsimError(f"Ray cannot be started: {reason(e)}") from e
        finally:
            if home is None:
                del os.environ["HOME"]
            else:
                os.environ["HOME"] = home

    def close(self) -> None:
        """Stop it, unless it was here before, and leave nothing behind."""
        if self._joined:
            return
        ray.shutdown()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)


def probed(run: Callable[[], U], device: torch.device) -> tuple[U, int]:
    """What comes of a run, and the bytes of the GPU that a process takes which does the same."""
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    return result, CONTEXT + torch.cuda.max_memory_reserved(device)


class RayGrid(BlockGrid):
    """Every client in one of Ray's workers. Close it, or the workers stay until this process ends."""

    def __init__(
        self, experiment: Experiment, federation: Federation, memory: Memory, app: App | None, secret: Key | None
    ) -> None:
        super().__init__(federation, experiment.engine, memory, app)
        self._experiment, self._secret, self._device = experiment, secret, federation.dataset.train.x.device
        self._cluster = Cluster()
        self._workers: Pool | None = None
        self._serial = 0
        self._suspects: set[int] = set()  # clients that have killed workers before
        self.costs: dict[int, Cost] = {}  # of each phase
        if self._device == tree.HOST or experiment.engine.workers != "auto":
            self._start()

    @property
    def pool(self) -> Pool:
        """The workers; they are started where they were not yet."""
        if self._workers is None:
            self._start()
        assert self._workers
        return self._workers

    def _start(self, used: int = CONTEXT) -> None:
        """Start the workers. ``used``: bytes of a GPU that one of them takes."""
        engine, federation = self._experiment.engine, self.federation
        gpus = torch.cuda.device_count() if self._device.type == "cuda" else 0
        data = sum(x.numel() * x.element_size() for s in federation.dataset[1:3] for x in (s.x, s.y))
        asked = None if engine.workers == "auto" else engine.workers
        room = torch.cuda.get_device_properties(self._device).total_memory if gpus else 0
        each = need(data)
        found = place(machines(gpus), asked, each, room, used)
        self._cluster.start(found.workers, gpus, data + STORE + int(2e9 if gpus else 5e8))
        tables = config.dump(self._experiment)
        tables["engine"] |= {"kind": "inline", "workers": "auto"}
        world = ray.put(export(federation))
        # Where machines were counted, none gets more than it has room for.
        memory = {"memory": each} if asked is None and not self._cluster.ours else {}
        remote = ray.remote(num_cpus=1, num_gpus=found.share, max_restarts=0, max_task_retries=0, **memory)(Actor)
        driver, secret = Driver(os.environ.get("HOME"), list(sys.path), registry.folders()), self._secret
        self._workers = Pool(
            lambda: remote.remote(tables, world, secret, driver), found.workers, engine.deadline, self._cluster.local
        )
        log.info("clients run in %d workers of Ray", found.workers)
        for line in found.table:
            log.info("  %s", line)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
        self._cluster.close()

    def parts(
        self, work: Work, blocks: list[Block], cohort: int, reduce: Reducer[Any, Any], how: Way
    ) -> Iterator[Partial]:
        if not blocks:
            return
        if self._workers is None:
            # How much of a GPU a worker takes, only a block of clients can say: the first one runs here.
            block, *blocks = blocks
            first, used = probed(partial(self.here, work, block, cohort, reduce, how), self._device)
            yield first
            self._start(used)
        self._serial += 1
        send = partial(self._send, self._serial, work, ray.put(pack(work.shared)), cohort, how)
        dangerous = [b for b in blocks if self._suspects & set(b.clients)]
        harmless = [b for b in blocks if b not in dangerous]
        cost = self.costs.setdefault(work.phase, Cost())
        sizes = {b.start: self._examples(work.local, b) for b in harmless}
        units = [Unit(b, cost.of(sizes[b.start], len(b.clients)), place=b.start // how.size) for b in harmless]
        for done in self.pool.run(units, send, partial(self.prepare, work)):
            if done.died is None:
                part, seconds = done.result
                cost.saw(sum(sizes[b.start] for b in done.units), sum(len(b.clients) for b in done.units), seconds)
                yield unpack(part)
            else:
                yield from self._one_by_one(done.units[0], send)
        for block in dangerous:
            yield from self._one_by_one(block, send)

    def _examples(self, local: Local, block: Block) -> int:
        """How many examples the steps of a block's clients go over."""
        return examples(local, lambda split: [self.federation.size(c, split) for c in block.clients])

    def _send(
        self, serial: int, work: Work, shared: Any, cohort: int, how: Way, actor: Any, blocks: list[Block]
    ) -> Any:
        # Numbers, and what those who remember remember: a guest for each client would be half of the driver's work.
        found = ((c, self.memory.get(c)) for b in blocks for c in b.clients)
        memory = {c: pack(m) for c, m in found if m is not None}
        about = work.round, work.phase, work.key
        return actor.blocks.remote(serial, about, shared, blocks, memory, cohort, how)

    def _one_by_one(self, block: Block, send: Callable[[Any, list[Block]], Any]) -> Iterator[Partial]:
        """Run the clients of a block one by one, to find who kills workers; the others count, at their positions.

        Where nobody does, something else has killed them, and the block runs as a whole: one by one its last bits may
        be others.
        """
        units = [Unit(Block(block.start + i, [c]), 1.0, True, DEATHS - 1) for i, c in enumerate(block.clients)]
        alone = list(self.pool.run(units, send))
        if not any(done.died for done in alone) and len(units) > 1:
            (whole,) = self.pool.run([Unit(block, 1.0, True)], send)
            if whole.died is None:
                yield unpack(whole.result[0])
                return
            log.warning("clients %s kill their worker together, and not alone: run one by one", block.clients)
        for done in alone:
            if done.died is None:
                yield unpack(done.result[0])
                continue
            start, (client,) = done.units[0]
            self._suspects.add(client)
            yield Partial([Node(0, start, None)], {}, (Failure(client, done.died),), 0, 0, 0)

    def execute(self, messages: list[Message]) -> list[Message]:
        """Messages go to workers in runs; those of a round share their content, which a run carries once."""
        replies: dict[int, Message] = {}

        def send(actor: Any, numbers: list[int]) -> Any:
            items = []
            for i in numbers:
                client = self.client(messages[i].metadata.dst_node_id)
                items.append((messages[i], self.context(client, from_value(self.memory.get(client) or {}))))
            return actor.messages.remote(items)

        for done in self.pool.run([Unit(i, 1.0) for i in range(len(messages))], send):
            if done.died is not None:
                replies[done.units[0]] = error_reply(messages[done.units[0]], done.died)
                continue
            for i, (reply, state) in zip(done.units, done.result, strict=True):
                replies[i] = reply
                if state:
                    self.memory.update({self.client(messages[i].metadata.dst_node_id): unpack(state)})
        return [replies[i] for i in range(len(messages))]
