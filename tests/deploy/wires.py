"""A deployment without processes: real messages, real nodes with their folders, and a grid whose wires can be cut."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import Context, Message, RecordDict

import clients.app
from fedsim import config
from fedsim.config import Experiment
from fedsim.grids.flower import RUN_ID, MessageGrid, error_reply
from fedsim.run import run
from server.nodes import Deployment, Nodes, Terms

Tamper = Callable[[int, Message, Message], Message | None]  # (client, message, reply) -> what arrives, if anything does


class Wires(MessageGrid):
    """Nodes with numbers of Flower's kind; each message is a new context, as in a process of its own."""

    def __init__(self, experiment: Experiment, folder: Path, population: int, tamper: Tamper | None = None) -> None:
        super().__init__(population)
        self._folder, self._tamper = folder, tamper or (lambda client, message, reply: reply)
        self._toml = tomli_w.dumps(config.dump(experiment))
        self.nodes = {(7919 * (client + 3)) % 100_003: client for client in reversed(range(population))}
        self.silent: set[int] = set()  # clients that never answer
        self.given: dict[str, Any] = {}  # more of their node config
        self.calls = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = [m for m in messages if self.nodes.get(m.metadata.dst_node_id) not in self.silent]
        sent = list(messages)
        ids = dict(zip(map(id, batch), super().push_messages(batch), strict=True))
        return [ids.get(id(m), f"lost-{i}") for i, m in enumerate(sent)]

    def execute(self, messages: list[Message]) -> list[Message]:
        return [self.reply(message) for message in messages]

    def reply(self, message: Message) -> Message:
        client = self.nodes[message.metadata.dst_node_id]
        self.calls += 1
        node_config = {"partition-id": client, "num-partitions": 3, "state": str(self._folder / str(client))}
        node_config |= self.given
        context = Context(RUN_ID, message.metadata.dst_node_id, node_config, RecordDict(), {"experiment": self._toml})
        try:
            reply = clients.app.app(message, context)
        except Exception as e:
            return error_reply(message, str(e))
        assert not context.state  # nothing that matters is left to the process
        reply.metadata.__dict__["_message_id"] = f"reply-{self.calls}"
        changed = self._tamper(client, message, reply)
        return error_reply(message, "cut") if changed is None else changed


def deployed(
    experiment: Experiment,
    out: Path,
    folder: Path,
    *,
    clients: int = 3,
    tamper: Tamper | None = None,
    change: Callable[[Wires], None] = lambda wires: None,
    wait: float = 0.5,
    timeout: float = 0.5,
    resume: bool = False,
    show: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Run an experiment over such nodes."""
    wires = Wires(experiment, folder, clients, tamper)
    change(wires)

    def connect(population: int, least: int, extra: Mapping[str, Any]) -> Nodes:
        def header(round: int) -> dict[str, Any]:
            return {"run": "0123456789abcdef", "kept": max(0, round - 2), **extra}

        terms = Terms(experiment.engine.on_error == "raise", least, timeout, wait, header)
        return Nodes(wires, population, terms)

    deployment = Deployment("0123456789abcdef", connect)
    return run(experiment, out, resume=resume, show=show, deployment=deployment)
