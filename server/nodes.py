"""The nodes of a deployment, as numbered clients: a Flower ``Grid`` over Flower's own, on which node ``client + 2`` is
the client that says so.

Flower's nodes have random numbers, come and go, and are waited for without end. Here a node is asked once which client
it holds, and every wait ends: with a reply, or with an error in the name of the client.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsim.errors import FedsimError
from fedsim.grids.flower import answered, failed
from fedsim.rng import Key
from server import sampling

log = logging.getLogger("fedsim")

NAME = ".deployment"  # in a run's folder: the name by which its clients remember it
PAUSE = 0.2  # seconds between two looks for replies


class Terms(NamedTuple):
    """How long to wait, and for whom.

    everybody: a client without a node fails the round; else the round goes on with those that are here
    least:     clients without which there is no round
    timeout:   seconds that the clients of an exchange have to answer
    wait:      seconds for nodes to come
    header:    (round) -> what a node must know about the run beside round and phase
    """

    everybody: bool
    least: int
    timeout: float
    wait: float
    header: Callable[[int], Mapping[str, Any]]


class Deployment(NamedTuple):
    """A run whose clients are elsewhere.

    name:    what nodes call it when they remember
    connect: (population, clients without which there is no round, further headers) -> its nodes
    """

    name: str
    connect: Callable[[int, int, Mapping[str, Any]], "Nodes"]


class Member(NamedTuple):
    """A node that has said who it is."""

    node: int
    examples: int


class Nodes(Grid):
    """The clients of a population that have a node."""

    def __init__(self, grid: Grid, population: int, terms: Terms) -> None:
        self._grid, self._population, self._terms = grid, population, terms
        self._members: dict[int, Member] = {}
        self._asked: dict[str, int] = {}  # query -> node
        self._known: set[int] = set()
        self._met = False  # whether everybody was waited for once
        self.expected: Callable[[int], int] | None = None  # how many examples a client must have, where that matters

    # What the engine asks

    def node(self, client: int) -> int:
        return client + 2

    def canonical(self, cohort: Sequence[int]) -> list[int]:
        """The order of the fold, as in one process: the most examples first, then by number."""
        nobody = Member(0, 0)
        return sorted(set(cohort), key=lambda client: (-self._members.get(client, nobody).examples, client))

    def choose(self, key: Key, cohort: int) -> Callable[[int], list[int]]:
        """A round's cohort: of the clients that have a node. With everybody here, the cohort of ``fedsim run``."""

        def of_round(round: int) -> list[int]:
            here = self.gather(round)
            return [here[i] for i in sampling.uniform(key.at("cohort", round), len(here), min(cohort, len(here)))]

        return of_round

    def gather(self, round: int) -> list[int]:
        """The clients that have a node, waited for as the terms say. Raises ``FedsimError`` where too few came."""
        patient = self._terms.everybody or not self._met
        end = time.monotonic() + self._terms.wait
        while True:
            self._look(round)
            enough = self._population if patient else self._terms.least
            if len(self._members) >= enough or time.monotonic() > end:
                break
            time.sleep(PAUSE)
        self._met = True
        missing = [client for client in range(self._population) if client not in self._members]
        if missing and (self._terms.everybody or len(self._members) < self._terms.least):
            raise FedsimError(
                f"{len(missing)} of {self._population} clients have no node after {self._terms.wait:g} s: "
                f"{_some(missing)}"
            )
        if missing:
            log.warning("%d clients have no node: %s", len(missing), _some(missing))
        return sorted(self._members)

    def _look(self, round: int) -> None:
        """Ask nodes that are new, hear those that were asked, forget those that have gone."""
        here = set(self._grid.get_node_ids())
        self._members = {client: m for client, m in self._members.items() if m.node in here}
        self._known &= here
        new = sorted(here - self._known)
        if new:
            about = RecordDict({"fedsim": ConfigRecord({"round": round, **self._terms.header(round)})})
            queries = [Message(about, node, "query", ttl=self._terms.timeout) for node in new]
            self._asked |= {id: node for id, node in zip(self._grid.push_messages(queries), new, strict=True) if id}
            self._known |= set(new)
        if self._asked:
            for reply in self._grid.pull_messages(list(self._asked)):
                node = self._asked.pop(reply.metadata.reply_to_message_id)
                if node in here:
                    self._hear(node, reply)

    def _hear(self, node: int, reply: Message) -> None:
        if reply.has_error():
            log.warning("a node failed when it was asked who it is: %s", reply.error.reason)
            self._known.discard(node)  # it is asked again
            return
        try:
            about = reply.content.metric_records["about"]
            client, examples = (int(about[name]) for name in ("partition-id", "train"))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError):
            log.warning("a node did not say who it is")
            return
        if not 0 <= client < self._population:
            log.warning("a node says that it is client %d of %d: ignored", client, self._population)
            return
        other = self._members.get(client)
        if other is not None and other.node != node:
            raise FedsimError(f"two nodes say that they are client {client}")
        if self.expected is not None and examples != self.expected(client):
            raise FedsimError(
                f"client {client} has {examples} examples at its node and {self.expected(client)} in the config, and "
                "epsilon is counted for the latter: let the config's data be what the nodes hold"
            )
        self._members[client] = Member(node, examples)

    # Flower's Grid

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies, one to each message: a client that has no node, or gives no answer, replies with an error."""
        seconds = self._terms.timeout if timeout is None else min(timeout, self._terms.timeout)
        replies: list[Message] = []
        contents: dict[int, RecordDict] = {}
        asked: list[Message] = []
        out: list[Message] = []
        for message in messages:
            member = self._members.get(message.metadata.dst_node_id - 2)
            if member is None:
                replies.append(failed(message, "it has no node"))
                continue
            if id(message.content) not in contents:  # one content a phase, completed once
                contents[id(message.content)] = self._complete(message.content)
            content, meta = contents[id(message.content)], message.metadata
            asked.append(message)
            out.append(Message(content, member.node, meta.message_type, ttl=seconds, group_id=meta.group_id))
        waiting: dict[str, Message] = {}
        for message, sent in zip(asked, self._grid.push_messages(out), strict=True):
            if sent:
                waiting[sent] = message
            else:
                replies.append(failed(message, "its message could not be delivered"))
        end = time.monotonic() + seconds
        while waiting and time.monotonic() < end:
            for reply in self._grid.pull_messages(list(waiting)):
                message = waiting.pop(reply.metadata.reply_to_message_id)
                replies.append(answered(message, reply))
            if waiting:
                time.sleep(PAUSE)
        return [*replies, *(failed(message, f"no reply in {seconds:g} s") for message in waiting.values())]

    def _complete(self, content: RecordDict) -> RecordDict:
        """A content with the run in its header; strangers' messages stay as they are."""
        header = content.config_records.get("fedsim")
        if header is None:
            return content
        full = ConfigRecord({**header, **self._terms.header(int(header["round"]))})  # type: ignore[arg-type]
        return RecordDict({**content, "fedsim": full})

    def get_node_ids(self) -> Iterable[int]:
        """Clients that have a node, as nodes. Waited for: a strategy of Flower's would wait without end."""
        return [self.node(client) for client in self.gather(0)]

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError("the clients of a deployment are reached by send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError("the clients of a deployment are reached by send_and_receive")


def _some(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients[:10])) + (", …" if len(clients) > 10 else "")
