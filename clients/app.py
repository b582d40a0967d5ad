"""Clients as a Flower ``ClientApp``: the same local updates, one message at a time.

A message of ours carries one ArrayRecord a channel and a ConfigRecord "fedsim" that names the round and the phase. Any
other train message is taken as Flower's own strategies send it: "arrays" (the model) and "config".

``app`` at the end is the component that ``flwr run`` and SuperNodes load; ``fedsim.node`` says what is behind it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.sgd import SgdConfig, sgd
from fedsim import tree
from fedsim.block import Guest, Work, asked
from fedsim.data.dataset import Federation
from fedsim.grids.flower import to_payload, to_record, to_records, to_tree
from fedsim.rng import Key
from fedsim.types import Done, Local, Payload, Task, Tree
from fedsim.worker import Unusable, alone, wrong

EXAMPLES = "num-examples"  # Flower's own key
One = Callable[[Work, Federation, Guest], tuple[Done, int]]


class Memories(Protocol):
    """Where a node keeps what its client remembers. ``header`` is the message's: it names round and phase."""

    def get(self, context: Context, header: Mapping[str, Any]) -> Payload | None: ...
    def put(self, context: Context, header: Mapping[str, Any], memory: Payload) -> None: ...


class InContext:
    """In Flower's ``context.state``, which lasts as long as the node's process."""

    def get(self, context: Context, header: Mapping[str, Any]) -> Payload | None:
        return to_payload(context.state) or None

    def put(self, context: Context, header: Mapping[str, Any], memory: Payload) -> None:
        context.state = to_records(memory)


def client_app(
    federation: Federation,
    local_of: Callable[[int], Local],
    key: Key,
    foreign: Callable[[Mapping[str, Any]], Local] | None = None,
    evaluation: Local | None = None,
    one: One = partial(alone, batched=False),  # noqa: B008 — it has no state
    memories: Memories = InContext(),  # noqa: B008 — it has no state
) -> ClientApp:
    """A ClientApp whose node holds the client numbered ``partition-id``.

    ``local_of(phase)`` is our strategy's work; ``foreign(config)`` is what a train message of a stranger's strategy
    is answered with, and ``evaluation`` what its evaluate messages are. ``one`` runs a client's work.
    """
    app = ClientApp()

    def ours(message: Message, context: Context, header: ConfigRecord) -> Message:
        phase = int(header["phase"])  # type: ignore[arg-type]
        shared = to_payload(message.content)
        memory = memories.get(context, header)
        work = asked(int(header["round"]), phase, local_of(phase), shared, key)  # type: ignore[arg-type]
        done, examples = one(work, federation, Guest(_client(context), memory))
        bad = wrong(done)
        if bad is not None:
            raise Unusable(bad)  # before it is remembered
        if done.memory:
            memories.put(context, header, done.memory)
        return _reply(message, to_records(done.value), done, examples)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if "fedsim" in message.content.config_records:
            return ours(message, context, message.content.config_records["fedsim"])
        if foreign is None:
            raise ValueError("this ClientApp takes fedsim's own messages only")
        (name, record), config = _stranger(message.content)
        w = to_tree(record)
        local, number = foreign(config), int(config.get("server-round", 1))  # type: ignore[arg-type]
        work = Work(number, 0, local, {"params": w}, key)
        done, examples = one(work, federation, Guest(_client(context), None))
        arrays = to_record(tree.add(w, done.value["delta"]))
        return _reply(message, RecordDict({name: arrays}), done, examples)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        if "fedsim" in message.content.config_records:
            return ours(message, context, message.content.config_records["fedsim"])
        if evaluation is None:
            raise ValueError("no client has held-out examples: set data.holdout")
        (_, record), config = _stranger(message.content)
        w = to_tree(record)
        work = Work(int(config.get("server-round", 1)), -1, evaluation, {"params": w, "model": w}, key)  # type: ignore[arg-type]
        done, examples = one(work, federation, Guest(_client(context), None))
        return _reply(message, RecordDict(), done, examples)

    return app


def proximal(task: Task, config: SgdConfig) -> Callable[[Mapping[str, Any]], Local]:
    """What the clients of a Flower strategy do: local SGD; a "proximal-mu" in a message's config is honoured."""

    def local(settings: Mapping[str, Any]) -> Local:
        mu = float(settings.get("proximal-mu", 0.0))

        def pull(shared: Payload, memory: Payload, w: Tree) -> Tree:
            return tree.scale(mu, tree.sub(w, shared["params"]))

        return sgd(task, config, pull if mu else None)

    return local


def _client(context: Context) -> int:
    if "partition-id" not in context.node_config:
        raise ValueError("this node has no 'partition-id' in its node config; start it with --node-config")
    return int(context.node_config["partition-id"])


def _stranger(content: RecordDict) -> tuple[tuple[str, ArrayRecord], ConfigRecord]:
    """The one ArrayRecord of a message with its name, and its config."""
    if len(content.array_records) != 1:
        raise ValueError(f"expected one ArrayRecord in a message, found {len(content.array_records)}")
    config = next(iter(content.config_records.values()), ConfigRecord())
    return next(iter(content.array_records.items())), config


def _reply(message: Message, content: RecordDict, done: Done, examples: int) -> Message:
    metrics = {name: float(x) for name, x in done.metrics.items()}
    content["metrics"] = MetricRecord({EXAMPLES: examples, **metrics})
    return Message(content, reply_to=message)


app = ClientApp()


@app.query()
def _hello(message: Message, context: Context) -> Message:
    from fedsim import node  # a process starts for every message: it imports what this message needs, and no more

    return node.hello(message, context)


@app.train()
def _train(message: Message, context: Context) -> Message:
    from fedsim import node

    return node.app(message, context)(message, context)


@app.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    from fedsim import node

    return node.app(message, context)(message, context)
