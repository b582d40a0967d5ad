"""Flower apps as their authors wrote them, on our engine: the same numbers as in Flower's simulation, and sooner."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim import cli, run_app
from fedsim.errors import ConfigError, FedsimError
from fedsim.grids import flower

APPS = Path(__file__).parent.parent / "apps"
NAMES = ("fedavg-digits", "fedadam-waves", "krum-points")


def test_nodes_keep_their_state_and_mods_are_honoured() -> None:
    ran = run_app.run(run_app.load(APPS / "fedavg-digits"))
    visits = [row["visits"] for row in ran.metrics[0]["train"].values()]
    assert visits == [1, 2, 3]
    assert ran.final["evaluate.messages"] == 6  # the mod counts both kinds of messages
    assert ran.final["evaluate.accuracy"] > 0.85
    assert ran.messages == 36 and not ran.failures


def test_krum_leaves_the_liar_out() -> None:
    honest = run_app.run(run_app.load(APPS / "krum-points", ["num-server-rounds=8"]))
    assert honest.final["evaluate.away"] < 0.5
    lied_to = run_app.run(run_app.load(APPS / "krum-points", ["attackers=7"]))
    assert lied_to.final["evaluate.away"] > 100


@pytest.mark.parametrize("name", NAMES)
def test_a_run_repeats_itself(name: str) -> None:
    app = run_app.load(APPS / name)
    assert run_app.run(app).metrics == run_app.run(app).metrics


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", NAMES)
def test_flowers_simulation_gives_the_same_and_takes_longer(name: str) -> None:
    app = run_app.load(APPS / name)
    ours, theirs = run_app.run(app), run_app.run_flower(app, timeout=280)
    assert ours.messages == theirs.messages
    assert ours.final.keys() == theirs.final.keys() and len(ours.final) > 0
    for key, value in ours.final.items():
        assert value == pytest.approx(theirs.final[key], rel=1e-6), key  # replies are summed in the order they come
    assert 0 < 5 * run_app.overhead(ours, ours) <= run_app.overhead(theirs, ours)


def test_a_node_that_changes_its_message_changes_nobody_elses() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        config["lr"] = float(config["lr"]) * 2  # type: ignore[arg-type]
        return Message(RecordDict({"m": MetricRecord({"lr": config["lr"]})}), reply_to=message)  # type: ignore[dict-item]

    grid = run_app.AppGrid(app, 3, {})
    content = RecordDict({"config": ConfigRecord({"lr": 1.0})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
    assert [reply.content.metric_records["m"]["lr"] for reply in replies] == [2.0, 2.0, 2.0]
    assert content["config"]["lr"] == 1.0  # type: ignore[index]


def test_a_failing_node_is_named_and_answers_with_an_error() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("no disk")
        return Message(RecordDict(), reply_to=message)

    grid = run_app.AppGrid(app, 3, {})
    replies = list(grid.send_and_receive([Message(RecordDict(), node, "train") for node in grid.get_node_ids()]))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "partition 1" in grid.failures[0] and "no disk" in grid.failures[0]


def test_what_is_not_an_app_is_refused(tmp_path: Path) -> None:
    def refused(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(ConfigError) as e:
            run_app.load(*args, **kwargs)
        return str(e.value)

    assert "no such file" in refused(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app]\n")
    assert "components" in refused(tmp_path)
    assert "is not in the app's" in refused(APPS / "krum-points", ["stepp=1"])
    assert "at least 1" in refused(APPS / "krum-points", supernodes=0)


def test_an_app_that_fails_says_where(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "broken_app:server"\nclientapp = "broken_app:client"\n'
    )
    (tmp_path / "broken_app.py").write_text(
        "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
        "client, server = ClientApp(), ServerApp()\n\n\n@server.main()\ndef main(grid, context):\n    1 / 0\n"
    )
    with pytest.raises(FedsimError, match=r"division by zero \(broken_app.py:8\)"):
        run_app.run(run_app.load(tmp_path))


def test_an_app_that_waits_for_more_nodes_than_there_are_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "PAUSE", 0.0)
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    with pytest.raises(FedsimError, match=r"^the server waits for more nodes than there are, .*\(got 1\)$"):
        run_app.run(run_app.load(APPS / "krum-points", supernodes=1))


def test_the_command_prints_the_last_rounds_metrics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fedsim", "run-app", str(APPS / "krum-points"), "num-server-rounds=2"])
    with pytest.raises(SystemExit) as e:
        cli.main()
    out = capsys.readouterr().out
    assert e.value.code in (0, None)
    assert "evaluate.away" in out and "28 messages" in out
