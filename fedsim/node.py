"""A node of a deployment: what is behind ``clients.app:app``. It puts the kernel and the clients' half together.

Flower starts a process for every message, and keeps a node's context in memory only. So what a node needs again lies
on its own disk, in a folder named by the node config ``state`` (else ``$FLWR_HOME/fedsim``):

    cache/<hash>.safetensors                   the client's own examples, cut from the experiment's data set once
    runs/<run>/<client>/<round>-<phase>.safetensors   what the client remembers since then
    noise.key                                  names the noise of example-level privacy; 0600, made here, stays here
    spent                                      what visits have cost, where the node has a budget (``fedsim.budget``)

A node holds the client ``partition-id`` of the experiment's partition, or, where its node config says
``data = "folder"``, the examples in ``folder/examples.safetensors`` (tensors ``x`` and ``y``, metadata ``classes``).
"""

import json
import logging
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsim import config, files, offline, process, registry, tree
from fedsim.block import Guest, Work
from fedsim.checkpoint import pack, unpack
from fedsim.config import Experiment
from fedsim.data.dataset import Dataset, Federation, Indices, Split, validate
from fedsim.errors import ConfigError, DataError, FedsimError
from fedsim.grids.flower import to_payload
from fedsim.rng import Key
from fedsim.types import Done, Local, Payload, Task

log = logging.getLogger("fedsim")

EXAMPLES = "examples.safetensors"
RUN = re.compile(r"[0-9a-f]{16,64}")
AFTER = 1 << 30  # evaluation comes after every exchange of its round


def settings(run_config: Mapping[str, Any]) -> Experiment:
    """The experiment of a run config: ``experiment`` is TOML, or the path of a file in the app; ``overrides`` are
    ``key=value`` with blanks between them. Raises ``ConfigError``, as for a file."""
    text = str(run_config.get("experiment", ""))
    if "\n" in text or "=" in text:
        if len(text) > config.MAX_BYTES:
            raise ConfigError(f"experiment: larger than {config.MAX_BYTES} bytes")
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise ConfigError(f"experiment: not valid TOML: {e}") from None
    else:
        root = Path(__file__).parent.parent
        path = (root / text).resolve()
        if not text or not path.is_relative_to(root):
            raise ConfigError(f"experiment: must be TOML or the path of a file in the app (got '{text}')")
        tables = config.read(path)
    return config.parse(config.override(tables, str(run_config.get("overrides", "")).split()))


def state_folder(node_config: Mapping[str, Any]) -> Path:
    """Where a node keeps what it needs again."""
    given = node_config.get("state") or os.environ.get("FEDSIM_STATE")
    home = os.environ.get("FLWR_HOME") or Path.home() / ".flwr"
    return Path(str(given)) if given else Path(home) / "fedsim"


def client_of(node_config: Mapping[str, Any]) -> int:
    """The client that a node holds."""
    number = node_config.get("partition-id")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ConfigError("this node has no 'partition-id' in its node config; start it with --node-config")
    return number


@dataclass(frozen=True)
class Own:
    """The partition as one node sees it: its own client, whose examples are all that is here."""

    client: int
    population: int
    examples: int

    def __len__(self) -> int:
        return self.population

    def __getitem__(self, client: int) -> Indices:
        if client != self.client:
            raise DataError(f"this node holds client {self.client}, not {client}")
        return np.arange(self.examples)


def federation(experiment: Experiment, node_config: Mapping[str, Any]) -> Federation:
    """This node's client and its examples, in the dtype of the task. Raises ``DataError``, ``ConfigError``."""
    client = client_of(node_config)
    own = node_config.get("data")
    if own:
        dataset, population = _from_folder(Path(str(own))), int(node_config.get("num-partitions", client + 1))
    else:
        dataset, population = _from_cache(experiment, client, state_folder(node_config) / "cache")
    held = Own(client, population, len(dataset.train.y))
    dtype = torch.float64 if experiment.task.dtype == "float64" else torch.float32
    key = Key.root(experiment.seed).at("data")
    return Federation(dataset, held, experiment.data.holdout, key).to(torch.device("cpu"), dtype)


def _from_folder(folder: Path) -> Dataset:
    found = _read(folder / EXAMPLES)
    if found is None:
        raise DataError(f"{folder / EXAMPLES}: no such file")
    dataset, _ = found
    return validate(dataset)


def _from_cache(experiment: Experiment, client: int, cache: Path) -> tuple[Dataset, int]:
    """The client's share of the experiment's data set, which is built on the first visit only."""
    what = json.dumps([config.dump(experiment)["data"], experiment.seed, client], sort_keys=True)
    path = cache / f"{sha256(what.encode()).hexdigest()}.safetensors"
    found = _read(path)
    if found is None:
        from fedsim import data

        whole = data.federation(experiment.data, experiment.seed)
        if client >= len(whole):
            raise ConfigError(f"partition-id: must be less than {len(whole)}, the number of clients (got {client})")
        rows = torch.from_numpy(np.asarray(whole.partition[client], dtype=np.int64))
        train = whole.dataset.train
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_examples(path, train.x[rows], train.y[rows], whole.dataset.classes, len(whole), whole.dataset.name)
        found = _read(path)
        assert found
    return found


def write_examples(path: Path, x: torch.Tensor, y: torch.Tensor, classes: int, clients: int, name: str) -> None:
    """A client's examples as a file that a node can hold: x (n, …), y (n, …), both in one safetensors file."""
    metadata = {"classes": str(classes), "clients": str(clients), "name": name}
    with files.contribute(path, mode=0o600) as f:  # nodes of one machine may share their state folder
        f.write(save({"x": x.contiguous(), "y": y.contiguous()}, metadata=metadata))


def _read(path: Path) -> tuple[Dataset, int] | None:
    """A client's examples as a data set of which it is everything, and the number of clients; None: no such file."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as f:
            about = f.metadata() or {}
            mine = Split(f.get_tensor("x").clone(), f.get_tensor("y").clone())
        return Dataset(about.get("name", path.stem), mine, mine, int(about["classes"])), int(about.get("clients", 0))
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise DataError(f"{path}: is not a file of examples ({type(e).__name__}: {e})") from e


class OnDisk:
    """What clients remember, in files. Each visit writes a new one, so that a server which goes on from an earlier
    checkpoint finds what the client remembered then: a visit that is repeated gives the same bits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, context: Context, header: Mapping[str, Any]) -> Payload | None:
        """What the client remembered before this visit; None before its first one."""
        folder, now = self._of(context, header), _when(header)
        earlier = [when for when in _written(folder) if when < now]
        if not earlier:
            return None
        memory: Payload = unpack(_file(folder, max(earlier)), {})
        return memory

    def put(self, context: Context, header: Mapping[str, Any], memory: Payload) -> None:
        """Remember; forget what lies before the round ``kept``, to which the server can still go back."""
        folder, now = self._of(context, header), _when(header)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.write(_file(folder, now), pack(memory), mode=0o600)
        back = (int(header.get("kept", 0)), AFTER)
        for when in sorted(when for when in _written(folder) if when <= back)[:-1]:
            _file(folder, when).unlink()

    def newest(self, context: Context, header: Mapping[str, Any]) -> int:
        """The round of the client's last visit in this run that left a memory; 0 for none."""
        return max(_written(self._of(context, header)), default=(0, 0))[0]

    def _of(self, context: Context, header: Mapping[str, Any]) -> Path:
        run = str(header.get("run", ""))
        if not RUN.fullmatch(run):  # it becomes a part of a path
            raise FedsimError("the server's message does not name its run")
        return self._folder / run / str(client_of(context.node_config))


def _when(header: Mapping[str, Any]) -> tuple[int, int]:
    phase = int(header["phase"])
    return int(header["round"]), phase if phase >= 0 else AFTER


def _written(folder: Path) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"(\d+)-(\d+)\.safetensors", p.name) for p in folder.glob("*.safetensors")]
    return [(int(m[1]), int(m[2])) for m in found if m]


def _file(folder: Path, when: tuple[int, int]) -> Path:
    return folder / f"{when[0]}-{when[1]}.safetensors"


def hello(message: Message, context: Context) -> Message:
    """The answer to a server that asks who is here: the client, its numbers of examples, and what it remembers."""
    offline.prepare()
    process.prepare()
    experiment = settings(context.run_config)
    mine = federation(experiment, context.node_config)
    client = client_of(context.node_config)
    memories = OnDisk(state_folder(context.node_config) / "runs")
    about: dict[str, Any] = {
        "partition-id": client,
        "train": mine.size(client, "train"),
        "holdout": mine.size(client, "holdout"),
        "remembers": memories.newest(context, message.content.config_records["fedsim"]),
    }
    versions = ConfigRecord({"torch": torch.__version__})
    return Message(RecordDict({"about": MetricRecord(about), "versions": versions}), reply_to=message)


def app(message: Message, context: Context) -> ClientApp:
    """The ClientApp of this node's client, for this message."""
    from clients.app import client_app, proximal
    from clients.evaluate import after_training, evaluation

    offline.prepare()
    process.prepare()
    experiment = settings(context.run_config)
    state = state_folder(context.node_config)
    mine = federation(experiment, context.node_config)
    task: Task = registry.load("tasks", experiment.task.model).build(experiment.task, mine.dataset, len(mine))
    key, memories = Key.root(experiment.seed), OnDisk(state / "runs")
    header = message.content.config_records.get("fedsim", ConfigRecord())
    phase, limit = int(header.get("phase", 0)), None  # type: ignore[arg-type]
    if "max-epsilon" in context.node_config:
        from fedsim import budget

        limit = budget.of_node(context.node_config, state)
        budget.check(experiment, phase)
    strategy: Any
    if experiment.privacy:
        strategy, key = _private(experiment, task, state, header)
    else:
        strategy = registry.load("strategies", experiment.strategy.name).build(experiment.strategy, task)

    if limit:
        sigma = float(header["sigma"])  # type: ignore[arg-type]
        cost = budget.cost(strategy, phase, sigma, mine, client_of(context.node_config))
        broadcast = tree.payload_digest(to_payload(message.content))
        limit.spend(":".join(map(str, (header.get("run", ""), header["round"], phase, broadcast))), cost)

    if not hasattr(strategy, "phases"):  # a strategy of Flower's: its clients do local SGD
        from fedsim.types import Phase, Strategy

        work = proximal(task, strategy.config)
        nothing: Any = None
        shape: Strategy[Any] = Strategy(nothing, (Phase(nothing, work({}), nothing, nothing),), lambda s: {}, ())
        scorer = evaluation(task, shape, experiment.evaluate.batch_size)
        held_out = scorer if experiment.data.holdout else None
        return client_app(mine, lambda phase: scorer, key, work, held_out, unstacked(experiment), memories)

    if experiment.evaluate.local:
        strategy = after_training(task, strategy)
    local = evaluation(task, strategy, experiment.evaluate.batch_size)

    def local_of(phase: int) -> Local:
        chosen: Local = local if phase < 0 else strategy.phases[phase].local
        return chosen

    return client_app(mine, local_of, key, one=alone(experiment), memories=memories)


def alone(experiment: Experiment) -> Callable[[Work, Federation, Guest], tuple[Done, int]]:
    """How a client is run that gets a message of its own: as a block of one would be."""
    from fedsim import worker
    from fedsim.grids.inline import way

    def one(work: Work, federation: Federation, guest: Guest) -> tuple[Done, int]:
        how = way(experiment.engine, federation.dataset.train, work.local)
        return worker.alone(work, federation, guest, how.stacked, how.retry)

    return one


def unstacked(experiment: Experiment) -> Callable[[Work, Federation, Guest], tuple[Done, int]]:
    """How a client of a Flower strategy is run: never as a block, whose numbers are of our own strategies."""
    from fedsim import worker

    return partial(worker.alone, batched=False, retry=experiment.engine.on_error == "retry")


def _private(experiment: Experiment, task: Task, state: Path, header: Mapping[str, Any]) -> tuple[Any, Key]:
    """The clients' half of a private strategy, and the key of this node's draws.

    Draws are named by a key that never leaves the node. At client level the server clips and adds noise, and clients
    only keep their metrics to themselves; at example level the noise is drawn here, and the message says how much.
    """
    from server.wrap import silent

    level = experiment.privacy
    assert level
    plugin = registry.load("strategies", experiment.strategy.name)
    if level.mode == "example":
        from clients import dp_sgd

        sigma = float(header.get("sigma", 0.0))
        if not sigma > 0:
            raise FedsimError("the server's message does not say how much noise protects this client's examples")
        assert level.max_grad_norm
        size = experiment.strategy.batch_size  # type: ignore[attr-defined]
        task = dp_sgd.private(task, sigma, level.max_grad_norm, size, level.grad_sample)
    strategy = silent(plugin.build(experiment.strategy, task), secret=level.noise == "os")
    if level.noise == "seeded":
        return strategy, Key.root(experiment.seed).at("privacy")
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = files.first(state / "noise.key", os.urandom(16).hex().encode(), mode=0o600)
    return strategy, Key(experiment.seed, bytes.fromhex(key.decode())).at("run", str(header.get("run", "")))
