"""Nodes in this process: the bits of ``fedsim run``, and an outcome for everything that a node or a wire can do."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from wires import Tamper, deployed

from fedsim import node
from fedsim.errors import ClientError, ConfigError, FedsimError, ResumeError
from fedsim.run import run
from runs import experiment, lines
from server import ledger
from server.ledger import Entry

SMALL = ("rounds=3", "data.partition.clients=3", "strategy.cohort=2")
# Of each kind: one exchange, stateful, two exchanges, a hypernetwork, adapters, a server's optimiser, a stranger's.
STRATEGIES = (
    "strategy.name=fedavg",
    "strategy.name=scaffold",
    "strategy.name=fedexp",
    "strategy.name=fedadam",
    "strategy.name=hyperfl task.model=mlp task.hidden=[8]",
    "strategy.name=pfedhn task.model=mlp task.hidden=[8]",
    "strategy.name=fedsa_lora task.model=mlp",
    "strategy.name=local",
    "strategy.name=flwr.serverapp.strategy:FedAdam",
)


@pytest.mark.parametrize("of", STRATEGIES)
def test_a_deployment_has_the_bits_of_one_process(of: str, tmp_path: Path) -> None:
    e = experiment(*SMALL, "rounds=2", "engine.block=1", *of.split())  # a node runs its client as a block of one
    there = deployed(e, tmp_path / "there", tmp_path / "nodes")
    here = run(e, tmp_path / "here")
    assert there["params_sha256"] == here["params_sha256"]
    assert lines(tmp_path / "there") == lines(tmp_path / "here")


def test_private_noise_is_the_nodes_own(tmp_path: Path) -> None:
    table = "privacy={mode='example', noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-3, noise='%s'}"
    seeded = experiment(*SMALL, "strategy.name=fedavg", table % "seeded")
    there = deployed(seeded, tmp_path / "there", tmp_path / "nodes")
    assert there["params_sha256"] == run(seeded, tmp_path / "here")["params_sha256"]
    secret = experiment(*SMALL, "strategy.name=fedavg", table % "os")
    deployed(secret, tmp_path / "secret", tmp_path / "nodes")
    keys = {path.read_text() for path in (tmp_path / "nodes").glob("*/noise.key")}
    assert len(keys) == 3 and all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "nodes").glob("*/noise.key"))


PRIVATE = (
    *SMALL, "strategy.name=fedavg", "strategy.cohort=3", "data.holdout=0.0",
    "privacy={mode='example', noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-3}",
)  # fmt: skip


def test_epsilon_is_counted_for_the_examples_that_nodes_have(tmp_path: Path) -> None:
    def tamper(client: int, message: Message, reply: Message) -> Message:
        if client == 1 and message.metadata.message_type == "query":
            reply.content["about"] = MetricRecord({"partition-id": 1, "train": 100, "holdout": 0, "remembers": 0})
        return reply

    with pytest.raises(FedsimError, match="client 1 has 100 examples at its node and 479 in the config"):
        deployed(experiment(*PRIVATE), tmp_path / "out", tmp_path / "nodes", tamper=tamper)


def test_a_node_keeps_to_a_budget_of_its_own(tmp_path: Path) -> None:
    """Of 479 examples, visits of 15 steps at q = 32/479 with σ = 1: two are within the budget, over all runs."""
    two = ledger.epsilon((Entry(1.0, 32 / 479, 30),), 1e-5, "rdp")

    def given(**more: Any) -> Callable[[Any], None]:
        return lambda wires: wires.given.update(more)

    frugal = given(**{"max-epsilon": 1.001 * two, "delta": 1e-5})
    with pytest.raises(ClientError, match=r"failed in round 3.*would have cost"):
        deployed(experiment(*PRIVATE), tmp_path / "one", tmp_path / "nodes", change=frugal)
    spent = (tmp_path / "nodes" / "0" / "spent").read_text().splitlines()
    assert len(spent) == 2 and all(line.endswith(" 15") for line in spent)
    # The round that failed is asked for again, and the two before are on disk: another server gets nothing.
    with pytest.raises(ClientError, match=r"failed in round 1.*would have cost"):
        deployed(experiment(*PRIVATE, "task.model=mlp"), tmp_path / "two", tmp_path / "nodes", change=frugal)
    refused = {
        "'delta' in its node config": (PRIVATE, given(**{"max-epsilon": 1.0})),
        "only with secret noise": ((*SMALL, "strategy.name=fedavg"), frugal),
        "scores have no noise": ((*PRIVATE, "data.holdout=0.2"), frugal),
    }
    for reason, (of, change) in refused.items():
        with pytest.raises(FedsimError, match=reason):
            deployed(experiment(*of), tmp_path / reason[:4], tmp_path / "others", change=change)


def test_a_run_resumes_to_the_same_bits_with_memories_that_are_ahead(tmp_path: Path) -> None:
    e = experiment(*SMALL, "strategy.name=scaffold")

    def stop(line: Any) -> None:
        if line["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deployed(e, tmp_path / "out", tmp_path / "nodes", show=stop)
    shutil.rmtree(tmp_path / "out" / "checkpoint" / "round-00000002")  # the nodes have been in round 2; the server not
    there = deployed(e, tmp_path / "out", tmp_path / "nodes", resume=True)
    assert there["params_sha256"] == run(e, tmp_path / "here")["params_sha256"]


def test_a_deployments_run_is_not_resumed_elsewhere(tmp_path: Path) -> None:
    e = experiment(*SMALL)
    deployed(e, tmp_path / "out", tmp_path / "nodes")
    with pytest.raises(ResumeError, match="deployment"):
        run(experiment(*SMALL, "rounds=4"), tmp_path / "out", resume=True)


def test_a_client_without_a_node_fails_the_run_or_is_left_out(tmp_path: Path) -> None:
    def gone(wires: Any) -> None:
        wires.nodes = {n: c for n, c in wires.nodes.items() if c != 1}

    with pytest.raises(FedsimError, match=r"1 of 3 clients have no node after 0.5 s: 1"):
        deployed(experiment(*SMALL), tmp_path / "raise", tmp_path / "nodes", change=gone)
    e = experiment(*SMALL, "engine.on_error=drop")
    summary = deployed(e, tmp_path / "drop", tmp_path / "nodes", change=gone)
    assert summary["status"] == "completed"
    assert all(line["clients"] == 2 for line in lines(tmp_path / "drop"))


def test_a_node_that_failed_to_say_who_it_is_is_asked_again(tmp_path: Path) -> None:
    failed = []

    def tamper(client: int, message: Message, reply: Message) -> Message | None:
        if client == 1 and message.metadata.message_type == "query" and not failed:
            failed.append(client)
            return None
        return reply

    summary = deployed(experiment(*SMALL), tmp_path / "out", tmp_path / "nodes", tamper=tamper, wait=5.0)
    assert failed and summary["status"] == "completed"


def test_nobody_at_all_ends_the_run(tmp_path: Path) -> None:
    e = experiment(*SMALL, "engine.on_error=drop")
    with pytest.raises(FedsimError, match="3 of 3 clients have no node"):
        deployed(e, tmp_path / "out", tmp_path / "nodes", change=lambda wires: wires.nodes.clear())


@pytest.mark.parametrize(
    "wanted", [("strategy.cohort=3",), ("strategy.cohort=2", "strategy.args.min_available_nodes=3")]
)
def test_a_flower_strategy_does_not_wait_without_end(tmp_path: Path, wanted: tuple[str, ...]) -> None:
    e = experiment(*SMALL, "engine.on_error=drop", *wanted, "strategy.name=flwr.serverapp.strategy:FedAvg")
    with pytest.raises(FedsimError, match="have no node"):
        deployed(e, tmp_path / "out", tmp_path / "nodes", change=lambda wires: wires.nodes.popitem())


def test_a_node_that_stops_answering(tmp_path: Path) -> None:
    def until(round: int) -> Tamper:
        def tamper(client: int, message: Message, reply: Message) -> Message | None:
            header = message.content.config_records["fedsim"]
            cut = client == 1 and message.metadata.message_type == "train" and int(header["round"]) >= round  # type: ignore[arg-type]
            return None if cut else reply

        return tamper

    everybody = (*SMALL, "strategy.cohort=3")
    with pytest.raises(ClientError, match="client 1 failed in round 2"):
        deployed(experiment(*everybody), tmp_path / "raise", tmp_path / "nodes", tamper=until(2))
    assert (tmp_path / "raise" / "checkpoint" / "round-00000001").exists()
    e = experiment(*everybody, "engine.on_error=drop")
    assert deployed(e, tmp_path / "drop", tmp_path / "nodes", tamper=until(2))["status"] == "completed"
    assert [line["clients"] for line in lines(tmp_path / "drop")] == [3, 2, 2]


def test_silence_ends_with_the_timeout(tmp_path: Path) -> None:
    e = experiment(*SMALL, "engine.on_error=drop", "strategy.cohort=3", "rounds=2")

    def mute(line: Any) -> None:
        seen[0].silent.add(2)

    seen: list[Any] = []
    deployed(e, tmp_path / "out", tmp_path / "nodes", change=seen.append, show=mute)
    assert lines(tmp_path / "out")[1]["failures"] == [{"client": 2, "reason": "no reply in 0.5 s"}]


def test_two_nodes_cannot_be_one_client(tmp_path: Path) -> None:
    def twice(wires: Any) -> None:
        wires.nodes[5] = 1

    with pytest.raises(FedsimError, match="two nodes say that they are client 1"):
        deployed(experiment(*SMALL), tmp_path / "out", tmp_path / "nodes", change=twice)


def arrays(change: Callable[[dict[str, Any]], None]) -> Tamper:
    """A client 1 that changes what it sends."""

    def tamper(client: int, message: Message, reply: Message) -> Message:
        if client == 1 and message.metadata.message_type == "train":
            channel = next(iter(reply.content.array_records))
            record: dict[str, Any] = dict(reply.content.array_records[channel])
            change(record)
            reply.content[channel] = ArrayRecord(record)
        return reply

    return tamper


def metrics(**values: Any) -> Tamper:
    def tamper(client: int, message: Message, reply: Message) -> Message:
        if client == 1 and message.metadata.message_type == "train":
            reply.content["metrics"] = MetricRecord({**reply.content["metrics"], **values})  # type: ignore[dict-item]
        return reply

    return tamper


def unmeasured(client: int, message: Message, reply: Message) -> Message:
    if client == 1 and message.metadata.message_type == "train":
        del reply.content["metrics"]["train_loss"]  # type: ignore[attr-defined]
    return reply


def first(record: dict[str, Any], make: Callable[[Any], Any]) -> None:
    name = next(iter(record))
    record[name] = make(record[name])


def lying(array: Any) -> Array:
    """Says that it has the expected shape, and has another."""
    small = Array(np.zeros(3, dtype=np.float32))
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=small.data)


def huge(array: Any) -> Array:
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data + bytes(1 << 20))


def garbage(array: Any) -> Array:
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=b"\x80\x04." + bytes(50))


def without(channel: str) -> Tamper:
    def tamper(client: int, message: Message, reply: Message) -> Message:
        if client == 1 and channel in reply.content and message.metadata.message_type == "train":
            del reply.content[channel]
        return reply

    return tamper


MALFORMED: dict[str, tuple[Tamper, str]] = {
    "shape": (arrays(lambda r: first(r, lambda a: Array(np.zeros((2, 2), np.float32)))), "has shape"),
    "dtype": (arrays(lambda r: first(r, lambda a: Array(a.numpy().astype(np.float64)))), "has dtype"),
    "NaN": (arrays(lambda r: first(r, lambda a: Array(a.numpy() * np.float32(np.nan)))), "NaN or Inf"),
    "a name too many": (arrays(lambda r: r.update(more=Array(np.zeros(1, np.float32)))), "other names"),
    "a name missing": (arrays(lambda r: r.pop(next(iter(r)))), "other names"),
    "a lie about its shape": (arrays(lambda r: first(r, lying)), "malformed"),
    "too many bytes": (arrays(lambda r: first(r, huge)), "bytes"),
    "garbage": (arrays(lambda r: first(r, garbage)), "malformed"),
    "no metrics": (without("metrics"), "num-examples is None"),
    "examples below 0": (metrics(**{"num-examples": -1}), "num-examples is -1"),
    "too many examples": (metrics(**{"num-examples": 1 << 40}), "num-examples is"),
    "a metric that is no number": (metrics(train_loss=float("nan")), "train_loss is nan"),
    "a metric missing": (unmeasured, "train_loss is None"),
}


# A stranger's strategy reads its metrics itself.
PAIRS = [("scaffold", kind) for kind in MALFORMED] + [
    ("flwr.serverapp.strategy:FedAvg", kind) for kind in MALFORMED if not re.search("metric|examples", kind)
]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_malformed_reply_is_refused_and_does_not_touch_the_model(name: str, kind: str, tmp_path: Path) -> None:
    tamper, why = MALFORMED[kind]
    everybody = (*SMALL, "rounds=1", "strategy.cohort=3", f"strategy.name={name}", "engine.on_error=drop")
    e = experiment(*everybody)
    deployed(e, tmp_path / "lied-to", tmp_path / "nodes", tamper=tamper)
    (failure,) = lines(tmp_path / "lied-to")[0]["failures"]
    assert failure["client"] == 1 and why in failure["reason"]

    def cut(client: int, message: Message, reply: Message) -> Message | None:
        return None if client == 1 and message.metadata.message_type == "train" else reply

    deployed(e, tmp_path / "without", tmp_path / "nodes", tamper=cut)
    model = "model.safetensors"
    assert (tmp_path / "lied-to" / model).read_bytes() == (tmp_path / "without" / model).read_bytes()


def test_a_nodes_own_folder_of_examples(tmp_path: Path) -> None:
    e = experiment(*SMALL)
    import torch

    x, y = torch.rand(30, 64), torch.arange(30) % 10
    node.write_examples(tmp_path / node.EXAMPLES, x, y, 10, 3, "mine")
    mine = node.federation(e, {"partition-id": 1, "num-partitions": 3, "data": str(tmp_path)})
    assert len(mine) == 3 and len(mine.indices(1, "train")) == 24 and len(mine.indices(1, "holdout")) == 6
    with pytest.raises(ConfigError, match="no such file"):
        node.federation(e, {"partition-id": 1, "data": str(tmp_path / "nowhere")})
    (tmp_path / node.EXAMPLES).write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match="is not a file of examples"):
        node.federation(e, {"partition-id": 1, "data": str(tmp_path)})


def test_the_run_config_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be TOML or the path"):
        node.settings({"experiment": "../../etc/passwd"})
    with pytest.raises(ConfigError, match="not valid TOML"):
        node.settings({"experiment": "a = \n"})
    e = node.settings({"experiment": "experiments/quickstart.toml", "overrides": "rounds=2 seed=5"})
    assert (e.rounds, e.seed) == (2, 5)


def test_a_run_cannot_name_a_path(tmp_path: Path) -> None:
    disk = node.OnDisk(tmp_path)
    for name in ("../../elsewhere", "", "0123456789abcdef/..", "x" * 16):
        with pytest.raises(FedsimError, match="does not name its run"):
            disk.newest(type("C", (), {"node_config": {"partition-id": 0}})(), {"run": name})  # type: ignore[arg-type]
