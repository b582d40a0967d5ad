"""The edge to Flower: every private name of flwr that we need is used in this file, and nowhere else
(but for ``fedsim.grids.executor``, which has no time to import torch).

``tests/grids/test_flower.py`` fails loudly when an upgrade of flwr moves one of them.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedsim.errors import FedsimError
from fedsim.types import Payload, Tree

logging.getLogger("flwr").setLevel(logging.ERROR)  # flwr sets INFO when it is imported; a round is one line of ours

SERVER_NODE = 1
RUN_ID = 1
LOOKS, PAUSE = 5, 0.5  # looks at the nodes in a row, so many seconds or more apart, that only somebody waiting takes


def identify() -> None:
    """Name this process to Flower; without that a ``Message`` cannot be made outside its own runtime, which has named
    it already."""
    try:
        _ = TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1


def number(message: Message, id: str) -> Message:
    """Give a message the id that a SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = id
    return message


def to_record(tree: Tree) -> ArrayRecord:
    """Named tensors as Flower sends them."""
    return ArrayRecord({name: _array(x.detach().cpu()) for name, x in tree.items()})


def _array(x: Tensor) -> Array:
    if x.dtype != torch.bfloat16:
        return Array(x.numpy())
    bits = Array(x.contiguous().view(torch.int16).numpy())  # NumPy has no such type
    return Array(dtype=dtype_name(x.dtype), shape=bits.shape, stype=bits.stype, data=bits.data)


def _tensor(array: Array) -> Tensor:
    x = torch.from_numpy(np.array(array.numpy()))
    return x.view(torch.bfloat16) if array.dtype == dtype_name(torch.bfloat16) and x.dtype == torch.int16 else x


def dtype_name(dtype: torch.dtype) -> str:
    """What Flower's arrays call a type: NumPy's name, where it has one."""
    return str(dtype).removeprefix("torch.")


def to_tree(record: ArrayRecord, like: Tree | None = None) -> Tree:
    """Named tensors from Flower's arrays, with shapes and dtypes checked against ``like`` where it is given."""
    tree = {name: _tensor(array) for name, array in record.items()}
    if like is not None:
        if tree.keys() != like.keys():
            raise ValueError(f"arrays differ in names: {sorted(tree.keys() ^ like.keys())}")
        for name, x in tree.items():
            if x.shape != like[name].shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(like[name].shape)}")
        tree = {name: x.to(like[name].dtype) for name, x in tree.items()}
    return tree


def to_records(payload: Payload) -> RecordDict:
    """One ArrayRecord a channel."""
    return RecordDict({channel: to_record(part) for channel, part in payload.items()})


def to_payload(records: RecordDict) -> Payload:
    """The channels of a content or a state."""
    return {channel: to_tree(record) for channel, record in records.array_records.items()}


def to_value(records: RecordDict) -> dict[str, Any]:
    """A node's state as a value that a checkpoint can hold."""
    return {
        name: {"arrays": to_tree(r)} if isinstance(r, ArrayRecord) else {type(r).__name__: dict(r)}
        for name, r in records.items()
    }


def from_value(value: Mapping[str, Any]) -> RecordDict:
    """The inverse of ``to_value``."""
    kinds = {"ConfigRecord": ConfigRecord, "MetricRecord": MetricRecord}
    records = RecordDict()
    for name, item in value.items():
        ((kind, content),) = item.items()
        records[name] = to_record(content) if kind == "arrays" else kinds[kind](content)
    return records


class MessageGrid(Grid):
    """A Flower ``Grid`` over numbered clients: node ``client + 2`` is client ``client`` (1 is the server).

    A subclass says how messages are executed; this class speaks the protocol.
    """

    def __init__(self, population: int, run_config: Mapping[str, Any] | None = None) -> None:
        identify()
        self._population = population
        self._run_config = dict(run_config or {})
        self._run = Run.create_empty(RUN_ID)
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self._looks, self._looked = 0, 0.0

    @abstractmethod
    def execute(self, messages: list[Message]) -> list[Message]:
        """The replies to messages, in their order; a client that fails replies with an error."""

    def node(self, client: int) -> int:
        return client + 2

    def client(self, node: int) -> int:
        return node - 2

    def context(self, client: int, state: RecordDict) -> Context:
        """What Flower tells a node about itself."""
        config: dict[str, bool | float | int | str] = {"partition-id": client, "num-partitions": self._population}
        return Context(RUN_ID, self.node(client), config, state, self._run_config)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes. Raises ``FedsimError`` for who looks again and again and sends nothing: it waits for others."""
        now = time.monotonic()
        if now - self._looked >= PAUSE:
            self._looks, self._looked = self._looks + 1, now
        if self._looks > LOOKS:
            raise FedsimError(
                f"the server waits for more nodes than there are, and there will be no other (got {self._population})"
            )
        return range(2, self._population + 2)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Execute messages at once; their replies wait to be pulled."""
        batch = list(messages)
        self._looks = 0
        for message in batch:
            self._sent += 1
            number(message, f"message-{self._sent}")
        for message, reply in zip(batch, self.execute(batch), strict=True):
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(id) for id in message_ids if id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def error_reply(message: Message, reason: str) -> Message:
    """Tell the server that a client failed."""
    return failed(message, reason)


def answered(message: Message, reply: Message) -> Message:
    """A reply that came by way of another grid, as the answer of the node that ``message`` was for."""
    reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
    return reply


def failed(message: Message, reason: str) -> Message:
    """What a node that gives no answer replies."""
    return Message(Error(code=2, reason=reason), reply_to=message)


def own_content(message: Message) -> Message:
    """The message with records that no other message shares; arrays cannot be changed, so they stay shared."""
    copies = RecordDict({name: type(record)(dict(record)) for name, record in message.content.items()})  # type: ignore[arg-type]
    message.content = copies
    return message


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """An app's ``[tool.flwr.app.config]`` as its run config: nested keys joined by dots."""
    from flwr.common.config import flatten_dict

    return dict(flatten_dict(dict(config)))


def simulate(
    folder: Path, server: str, client: str, run_config: Mapping[str, Any], overrides: Mapping[str, Any], nodes: int
) -> tuple[int, list[str]]:
    """Run an app in Flower's own simulation, one CPU a client: the number of messages, and the errors in replies."""
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.telemetry import EventType
    from flwr.superlink.grid import InMemoryGrid

    run = Run.create_empty(RUN_ID)
    run.override_config, run.primary_task_id = dict(overrides), 1
    run.federation_id = "@none/default"
    identify()
    failures: list[str] = []
    sent = 0
    push, pull = InMemoryGrid.push_messages, InMemoryGrid.pull_messages

    def counted_push(self: InMemoryGrid, messages: Iterable[Message]) -> Iterable[str]:
        nonlocal sent
        ids = list(push(self, messages))
        sent += len(ids)
        return ids

    def counted_pull(self: InMemoryGrid, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pull(self, message_ids))
        failures.extend(reply.error.reason or "no reason given" for reply in replies if reply.has_error())
        return replies

    InMemoryGrid.push_messages, InMemoryGrid.pull_messages = counted_push, counted_pull  # type: ignore[method-assign]
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config))
    _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app_attr=client,
        server_app_attr=server,
        server_app_context=context,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        app_dir=str(folder),
        is_app=True,
        run=run,
    )
    return sent, failures


def register(superlink: str, keys: Iterable[Path]) -> None:
    """Let SuperNodes with these public keys in; a key that is registered already is not an error."""
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.cli.utils import init_http_client_from_connection
    from flwr.proto.control_pb2 import RegisterNodeRequest

    client = init_http_client_from_connection(read_superlink_connection(superlink))
    try:
        for key in keys:
            try:
                client.RegisterNode(request=RegisterNodeRequest(public_key=try_load_public_key(key)))
            except Exception as e:
                if "already" not in str(e).lower():
                    raise
    finally:
        client.close()


if __name__ == "__main__":
    import sys

    register(sys.argv[1], [Path(key) for key in sys.argv[2:]])
