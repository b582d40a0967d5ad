"""Files of a user's own: an object in one, where they are looked for, and that everybody finds them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runs
from fedsim import config, data, deploy, registry
from fedsim.errors import ConfigError
from runs import Answer

Call = Callable[..., Answer]

SOURCE = """
import torch
from torch import nn
from flwr.serverapp.strategy import FedAvg
from fedsim.config import DatasetConfig, PartitionConfig
from fedsim.data.dataset import Dataset, Split
from strategies import fedavg

def net(hidden: int = 4):
    'A small one.'
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2))

class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

class Rows(DatasetConfig):
    rows: int = 40

class scans:
    'Scans of mine.'
    Config = Rows

    @staticmethod
    def build(config):
        x = torch.arange(3.0 * config.rows).reshape(-1, 3)
        split = Split(x / x.max(), torch.arange(config.rows) % 2)
        return Dataset('scans', split, split, 2)

class halves:
    class Config(PartitionConfig):
        'The first half and the second.'

    @staticmethod
    def build(config, dataset, key):
        n = len(dataset.train.y)
        return [range(n // 2), range(n // 2, n)]

class outer:
    strategy = fedavg
"""


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    monkeypatch.chdir(tmp_path)
    return runs.inside(capsys, monkeypatch)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a file that no test before has loaded."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    return name


@pytest.mark.parametrize(
    ("attribute", "group", "said"),
    [
        (":net", "tasks", "A small one."),
        (":Net", "tasks", "args"),
        (":scans", "datasets", "Scans of mine."),
        (":halves", "partitioners", "The first half and the second."),
        (":outer.strategy", "strategies", "FedAvg (McMahan"),
        (":FedAvg", "strategies", "Federated Averaging"),
    ],
)
@pytest.mark.parametrize("suffix", [".py", ""])
def test_show_knows_the_group_by_the_shape(
    call: Call, own: str, suffix: str, attribute: str, group: str, said: str
) -> None:
    answer = call("show", f"{own}{suffix}{attribute}")
    assert answer.code == 0, answer.err
    assert answer.out.startswith(f"{own}{suffix}{attribute} ({group})\n") and said in answer.out


def test_an_object_in_a_file_is_a_plugin(call: Call, own: str, tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text(f"""
name = "own"
rounds = 2
data = {{ name = "{own}.py:scans", rows = 30, partition = {{ name = "{own}.py:halves" }} }}
task = {{ model = "{own}.py:net", args = {{ hidden = 5 }} }}
strategy = {{ name = "{own}.py:outer.strategy", cohort = 2 }}
""")
    assert call("run", file, "--out", "out").code == 0
    assert runs.summary(tmp_path / "out")["status"] == "completed"


def test_the_file_alone_is_no_model(call: Call, own: str, tmp_path: Path) -> None:
    answer = call("run", runs.write(tmp_path / "e.toml", f"task.model='{own}.py'"))
    assert answer.err == (
        f"error: task.model: plugin '{own}.py' has no 'Config'; an object in it is named '{own}.py:OBJECT'\n"
    )


def test_what_is_not_in_the_file_is_named(own: str, tmp_path: Path) -> None:
    registry.look_in(tmp_path)
    with pytest.raises(ConfigError, match=f"plugin '{own}.py:nett' cannot be loaded: AttributeError: .*'nett'"):
        config.parse(runs.tables(f"task.model='{own}.py:nett'"))


def test_a_file_beside_the_experiment_comes_before_one_where_we_are(own: str, tmp_path: Path, call: Call) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{own}.py").write_text(SOURCE.replace("A small one.", "Another."))
    registry.look_in(elsewhere)
    assert registry.own(f"{own}.py:net").__doc__ == "Another."


@pytest.mark.parametrize("key", ["task.model", "data.partition.name"])
def test_nodes_do_not_have_the_file(key: str, own: str, tmp_path: Path) -> None:
    registry.look_in(tmp_path)
    name = f"{own}.py:{'net' if key == 'task.model' else 'halves'}"
    tables = runs.tables("data.partition={name='iid'}", f"{key}='{name}'", "strategy.cohort=2")
    with pytest.raises(ConfigError, match=f"'{name}': is a file of this machine"):
        deploy.write_app(tmp_path / "app", config.parse(tables), {})


@pytest.mark.parametrize("name", ["my_avg.py", "my_avg:build_all"])
def test_any_folder_will_do_to_run_and_to_resume(tmp_path: Path, name: str) -> None:
    """The numbers are the same wherever the command is given, and a run goes on from another folder than it began."""
    sub = tmp_path / "sub"
    sub.mkdir()
    made = runs.command("new", "strategy", "my_avg", cwd=tmp_path)
    assert made.code == 0
    with (tmp_path / "my_avg.py").open("a") as file:
        file.write("\n\nclass build_all:\n    Config, build = Config, staticmethod(build)\n")
    long, short = f"strategy.name={name}", "rounds=2"
    assert runs.command("run", "my_avg.toml", long, short, "--out", "a", cwd=tmp_path).code == 0
    below = runs.command("run", "../my_avg.toml", long, short, "--out", "b", cwd=sub)
    assert below.code == 0, below.err
    a, b = runs.summary(tmp_path / "a"), runs.summary(sub / "b")
    assert a["params_sha256"] == b["params_sha256"]
    (sub / "b" / "summary.json").unlink()
    again = runs.command("run", "my_avg.toml", long, short, "--out", "sub/b", "--resume", cwd=tmp_path)
    assert again.code == 0, again.err
    assert runs.summary(sub / "b")["params_sha256"] == a["params_sha256"]


@pytest.mark.ray
def test_a_partition_by_natural_owners_is_made_again_in_workers() -> None:
    ray_grid = pytest.importorskip("fedsim.grids.ray")
    experiment = runs.experiment("data={name='numbered',clients=6,partition={name='natural_id'}}", "strategy.cohort=2")
    held = data.federation(experiment.data, 0)
    lazy = replace(held, partition=[held.partition[c] for c in range(6)])  # not ours: the config makes it again
    world = ray_grid.export(lazy)
    assert world.partition is None
    again = ray_grid.load(world, experiment, torch.device("cpu"))
    assert [again.partition[c].tolist() for c in range(6)] == [[c] for c in range(6)]


@pytest.mark.ray
def test_workers_of_ray_find_the_file_too(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sub = tmp_path / "sub"
    sub.mkdir()
    assert runs.command("new", "strategy", "my_avg", cwd=tmp_path).code == 0
    answer = runs.command(
        "run", "../my_avg.toml", "rounds=1", "--out", "out", "--engine", "ray", "--workers", "1", cwd=sub, timeout=120
    )
    assert answer.code == 0, answer.err
    assert runs.summary(sub / "out")["status"] == "completed"
