"""A user's own code is part of what a run is: edited, it makes another run of the same config."""

import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import runs
from fedsim import registry, report, sources
from fedsim.config import Experiment
from fedsim.data.partition import Lists
from fedsim.errors import ResumeError
from fedsim.run import build, run

RATE, STRATEGY, PARTITION = "own_rate.py", "own_strategy.py", "own_partition.py"
FILES = {
    RATE: "RATE = 0.1\n",
    STRATEGY: """
from typing import NamedTuple
from own_rate import RATE
from strategies import fedavg

class Config(fedavg.Config):
    name: str = "own_strategy.py"

class Own(NamedTuple):
    of: object

def build(config, task):
    s = fedavg.build(config.model_copy(update={"lr": RATE}), task)
    (p,) = s.phases
    mine = p._replace(
        broadcast=lambda own: p.broadcast(own.of), finish=lambda own, mean: Own(p.finish(own.of, mean))
    )
    return s._replace(init=lambda g: Own(s.init(g)), phases=(mine,), params=lambda own: s.params(own.of))
""",
    PARTITION: """
import numpy as np
from fedsim.config import PartitionConfig

class Config(PartitionConfig):
    name: str = "own_partition.py"
    clients: int = 12

def build(config, dataset, key):
    return [np.arange(client, 480, config.clients) for client in range(config.clients)]
""",
}
Write = Callable[[dict[str, str]], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files of a user's, and forgets what was loaded of them, as a new process would have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second would look the same

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        for module in [m for m in sys.modules if m.startswith("own_")]:
            del sys.modules[module]

    write(FILES)
    return write


def mine(*more: str) -> Experiment:
    return runs.experiment(
        f"strategy={{name='{STRATEGY}',cohort=4}}", f"data.partition={{name='{PARTITION}',clients=12}}", *more
    )


def test_it_is_named_when_a_run_goes_on_with_other_code(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The strategy's own file, what it imports from beside itself, and the partitioner's; not before an edit."""
    said = "resuming with other code than the run began with, so its rounds do not compare: "
    moved = FILES[PARTITION].replace("arange(client, 480", "arange(client + 1, 481")
    run(mine("rounds=1"), tmp_path / "out")
    for rounds, (edit, named) in enumerate(
        [
            ({}, []),
            ({RATE: "RATE = 0.2\n"}, [RATE]),
            ({STRATEGY: FILES[STRATEGY] + "# edited\n"}, [STRATEGY]),
            ({PARTITION: moved}, [f"{PARTITION}, the partition (clients hold other examples)"]),
        ],
        2,
    ):
        write(edit)
        caplog.clear()
        run(mine(f"rounds={rounds}"), tmp_path / "out", resume=True)
        assert [r.message.removeprefix(said) for r in caplog.records if "resuming" in r.message] == named
    done = runs.summary(tmp_path / "out")
    assert done["sources"] == {name: sha256((tmp_path / name).read_bytes()).hexdigest() for name in FILES}
    assert [of["until_round"] for of in done["earlier_sources"]] == [2, 3, 4]
    assert done["earlier_sources"][0][RATE] == sha256(FILES[RATE].encode()).hexdigest() != done["sources"][RATE]
    write({RATE: "RATE = 0.3\n"})
    caplog.clear()
    finished = run(mine("rounds=5"), tmp_path / "out", resume=True)  # in which this rate computes nothing
    assert finished["sources"] == done["sources"] and "resuming" not in caplog.text
    write({RATE: "RATE = 0.2\n"})
    run(mine("rounds=5"), tmp_path / "straight")
    assert len(report.compare([tmp_path / "out", tmp_path / "straight"])) == 2


def test_another_version_is_another_group(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, ends = [], set()
    for rate, seed in ((0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)):
        write({RATE: f"RATE = {rate}\n"})
        folders.append(tmp_path / f"{rate}-{seed}")
        ends.add(run(mine(f"seed={seed}", "rounds=1"), folders[-1])["params_sha256"])
    assert len(ends) == 4
    one, two = report.compare(folders)
    assert one.seeds == two.seeds == (1, 2)
    assert one.changed.keys() == two.changed.keys() == {"code"} and one.label != two.label
    assert capsys.readouterr().err == ""
    (folders[1] / "summary.json").unlink()  # one that still runs has not said what its code is
    (row,) = report.compare(folders[:2])
    assert row.seeds == (1,) and row.runs == 2 and row.changed == {}


def test_a_state_with_another_field_is_not_a_damaged_file(write: Write, tmp_path: Path) -> None:
    run(mine("rounds=1"), tmp_path / "out")
    write({STRATEGY: FILES[STRATEGY].replace("    of: object\n", "    of: object\n    more: int = 0\n")})
    with pytest.raises(
        ResumeError, match=r"^the strategy's state has other fields than the checkpoint's: 'Own' has 2 "
    ):
        run(mine("rounds=2"), tmp_path / "out", resume=True)


def test_what_is_a_users_own(write: Write) -> None:
    """What a module of theirs imports is followed; ours is not theirs, nor is what the summary has a version of."""
    write(
        {
            "own_package/__init__.py": "",
            "own_package/made.py": "import torch\nfrom . import parts\nfrom fedsim.data import digits as it",
            "own_package/parts.py": "def late():\n    import own_broken",
            "own_package/unused.py": "",
            "own_broken.py": "def",
        }
    )
    named = "own_package.made:it"
    for group, name in (("datasets", named), ("strategies", STRATEGY), ("partitioners", PARTITION)):
        registry.load(group, name)
    data = mine().data
    data = data.model_copy(update={"dataset": data.dataset.model_copy(update={"name": named})})
    package = {f"own_package/{name}.py" for name in ("__init__", "made", "parts")}
    found = sources.files(mine().model_copy(update={"data": data}))
    assert found.keys() == {*FILES, *package, "own_broken.py"}
    for ours in (runs.experiment(), runs.experiment("strategy={name='flwr.serverapp.strategy:FedAdam',cohort=4}")):
        build(ours)
        assert sources.files(ours) == {}


def test_a_partition_is_known_by_a_few_clients() -> None:
    federation = build(runs.experiment()).federation
    held = [federation.partition[client] for client in range(12)]

    def digest(clients: Sequence[Any]) -> str:
        return sources.partition(type(federation)(federation.dataset, Lists(clients), 0.2, federation.key))

    assert digest(held) == sources.partition(federation)
    others = [held[:-1], held[::-1], [*held[:5], held[5][:-1], *held[6:]]]
    assert len({digest(held), *map(digest, others)}) == 4
