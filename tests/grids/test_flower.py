"""The edge to Flower. When an upgrade of flwr moves a private name that we use, these tests say which."""

import inspect

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim.errors import FedsimError
from fedsim.grids import flower
from fedsim.grids.flower import MessageGrid
from server.flower import conform


class Echo(MessageGrid):
    """Replies with what it gets, or with an error for node 4."""

    def execute(self, messages: list[Message]) -> list[Message]:
        return [
            flower.error_reply(m, "no") if m.metadata.dst_node_id == 4 else Message(m.content, reply_to=m)
            for m in messages
        ]


def test_private_names_are_where_they_were() -> None:
    """flwr keeps these to itself; without them no message can be made outside its own runtime."""
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("run_id", "node_id", "task_id"):
        # Asked of the metaclass: the property itself raises in a process that nobody has named yet.
        assert hasattr(type(TaskIdentity), name), f"TaskIdentity.{name} is gone"
    assert "run_id" in inspect.signature(Run.create_empty).parameters
    flower.identify()
    message = Message(RecordDict(), 3, "train")
    assert "_message_id" in message.metadata.__dict__, "Metadata keeps its id elsewhere now"
    assert flower.number(message, "x").metadata.message_id == "x"
    assert message.metadata.src_node_id == flower.SERVER_NODE
    assert message.metadata.run_id == flower.RUN_ID


def test_the_executor_can_be_exchanged() -> None:
    """Tasks are forked where SuperExec asks for its executor by this name, and launches what this class launches."""
    from flwr.supercore.superexec import run_superexec
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

    assert "get_executor" in vars(run_superexec)
    assert "executor = get_executor(" in inspect.getsource(run_superexec.run_superexec)
    assert {"launch", "close"} <= vars(SubprocessExecutor).keys()


def test_the_grid_is_whole() -> None:
    """Flower's Grid asks for nothing that ours has not, and ours changes no signature."""
    assert not set(Grid.__abstractmethods__) - set(dir(MessageGrid))
    for name in Grid.__abstractmethods__:
        if isinstance(inspect.getattr_static(Grid, name), property):
            continue
        theirs, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (Grid, MessageGrid))
        assert list(theirs) == list(ours), name


def test_the_protocol() -> None:
    grid = Echo(5)
    assert list(grid.get_node_ids()) == [2, 3, 4, 5, 6]
    assert [grid.client(grid.node(c)) for c in range(5)] == list(range(5))
    content = RecordDict({"config": ConfigRecord({"a": 1})})
    out = [grid.create_message(content, "train", node, "1") for node in (3, 4)]
    ids = list(grid.push_messages(out))
    assert len(set(ids)) == 2
    (reply,) = grid.pull_messages([ids[0]])
    assert reply.metadata.src_node_id == 3 and reply.metadata.dst_node_id == flower.SERVER_NODE
    assert reply.metadata.reply_to_message_id == ids[0]
    assert reply.content["config"]["a"] == 1
    assert list(grid.pull_messages([ids[0]])) == [], "a reply is given once"
    (failed,) = grid.pull_messages([ids[1], "unknown"])
    assert failed.has_error() and failed.error.reason == "no"
    both = list(grid.send_and_receive([grid.create_message(content, "train", n, "1") for n in (2, 6)]))
    assert sorted(m.metadata.src_node_id for m in both) == [2, 6]


def test_who_looks_again_and_again_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes neither come nor go. To look often is no waiting, nor is to look now and then between messages."""
    grid, now = Echo(3), [100.0]
    monkeypatch.setattr(flower.time, "monotonic", lambda: now[0])
    for _ in range(1000):
        list(grid.get_node_ids())
    for _ in range(20):
        now[0] += 10.0
        list(grid.get_node_ids())
        list(grid.push_messages([grid.create_message(RecordDict(), "train", 2, "1")]))
    for _ in range(flower.LOOKS):
        now[0] += 1.0
        list(grid.get_node_ids())
    now[0] += 1.0
    with pytest.raises(FedsimError, match=r"^the server waits for more nodes than there are, .*\(got 3\)$"):
        grid.get_node_ids()


def test_a_client_app_runs_on_it() -> None:
    """A ClientApp's context says which partition it has, and its state lasts."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        count = int(context.state["seen"]["n"]) if "seen" in context.state else 0
        context.state["seen"] = ConfigRecord({"n": count + 1})
        about = {"partition": int(context.node_config["partition-id"]), "seen": count + 1}
        return Message(RecordDict({"metrics": MetricRecord(about)}), reply_to=message)

    from worlds import points

    from fedsim.config import EngineConfig
    from fedsim.grids.inline import InlineGrid
    from fedsim.memory import Memory

    grid = InlineGrid(points([[[0.0]], [[1.0]], [[2.0]]]), EngineConfig(), Memory(), app)
    for turn in (1, 2):
        out = [grid.create_message(RecordDict(), "train", grid.node(c), "1") for c in (2, 0)]
        replies = {m.metadata.src_node_id: m.content["metrics"] for m in grid.send_and_receive(out)}
        assert {node: m["partition"] for node, m in replies.items()} == {2: 0, 4: 2}
        assert {m["seen"] for m in replies.values()} == {turn}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float16, torch.bfloat16]
)
def test_tensors_survive_the_wire(dtype: torch.dtype) -> None:
    tree = {
        "a.b": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "none": torch.zeros(0, dtype=dtype),
    }
    back = flower.to_tree(flower.to_record(tree))
    assert list(back) == list(tree)
    for name, x in tree.items():
        assert torch.equal(back[name], x) and back[name].dtype == dtype
    back["a.b"].zero_()  # a copy: what has arrived can be written to
    assert torch.equal(tree["a.b"], torch.arange(6).reshape(2, 3).to(dtype))


def test_bfloat16_travels_as_it_is() -> None:
    """NumPy has no such type; the bits go, with the name, also through Flower's encoding."""
    from flwr.common.serde import array_record_from_proto, array_record_to_proto

    value = {"w": torch.tensor([[1.0, -2.5], [3e38, float("inf")]], dtype=torch.bfloat16), "n": torch.tensor(3)}
    sent = array_record_from_proto(array_record_to_proto(flower.to_record(value)))
    back = flower.to_tree(sent)
    assert sent["w"].dtype == "bfloat16" and back["w"].dtype == torch.bfloat16 and torch.equal(back["w"], value["w"])
    assert flower.to_tree(sent, like=value)["w"].dtype == torch.bfloat16 and back["n"].dtype == torch.int64
    conform(RecordDict({"delta": sent}), {"delta": value})
    with pytest.raises(ValueError, match="has dtype bfloat16, expected int16"):
        conform(RecordDict({"delta": sent}), {"delta": value | {"w": value["w"].view(torch.int16)}})


def test_arrays_are_checked() -> None:
    """Nothing is broadcast: other names and other shapes are refused."""
    like = {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match="w"):
        flower.to_tree(flower.to_record({"w": torch.zeros(1)}), like)
    with pytest.raises(ValueError, match="v"):
        flower.to_tree(flower.to_record({"w": torch.zeros(3), "v": torch.zeros(3)}), like)


def test_states_survive_a_checkpoint() -> None:
    records = RecordDict(
        {
            "arrays": flower.to_record({"w": torch.ones(2)}),
            "config": ConfigRecord({"a": 1, "b": "x", "c": [1.5, 2.5], "d": b"\0\1"}),
            "metrics": MetricRecord({"loss": 0.5}),
        }
    )
    back = flower.from_value(flower.to_value(records))
    assert back["config"] == records["config"] and back["metrics"] == records["metrics"]
    assert np.array_equal(back["arrays"]["w"].numpy(), np.ones(2))
