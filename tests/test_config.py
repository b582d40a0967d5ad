"""The experiment as a value: TOML in, overrides, sweeps, and out again."""

import tomllib
from pathlib import Path

import pytest
import tomli_w

import runs
from fedsim import config
from fedsim.errors import ConfigError, did_you_mean


def test_it_is_frozen_and_whole() -> None:
    """Defaults are written out, and what is written out parses to the same value."""
    made = runs.experiment()
    with pytest.raises(Exception, match="frozen"):
        made.seed = 4
    with pytest.raises(Exception, match="frozen"):
        made.strategy.cohort = 4
    dumped = config.dump(made)
    assert dumped["strategy"]["batch_size"] == 32 and dumped["engine"]["on_error"] == "raise"
    assert config.parse(dumped) == made
    assert config.parse(tomllib.loads(tomli_w.dumps(dumped))) == made


FOLDER = Path(__file__).parent.parent / "experiments"
OURS = [path for path in sorted(FOLDER.rglob("*.toml")) if "strategy" in config.read(path)]  # the others are claims


@pytest.mark.parametrize("file", OURS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_experiment_of_ours_parses(file: Path) -> None:
    made = config.parse(config.read(file))
    assert config.parse(config.dump(made)) == made


def test_overrides() -> None:
    tables = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    changed = config.override(tables, ["a.b=7", "a.c.d=[1, 2]", "f.g=word", "e='1'", "h=1e-3", "i=true", "j={k=1}"])
    assert changed == {
        "a": {"b": 7, "c": {"d": [1, 2]}}, "e": "1", "f": {"g": "word"}, "h": 1e-3, "i": True, "j": {"k": 1},
    }  # fmt: skip
    assert tables == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_sweeps() -> None:
    assert config.sweep([]) == [[]]
    assert config.sweep(["seed=1,2", "lr=0.1"]) == [["seed=1", "lr=0.1"], ["seed=2", "lr=0.1"]]
    assert len(config.sweep(["seed=1,2,3", "a.b=x,y"])) == 6
    assert config.sweep(["task.hidden=[64,32],[8]"]) == [["task.hidden=[64,32]"], ["task.hidden=[8]"]]
    assert config.sweep(["name='a,b'"]) == [["name='a,b'"]]
    assert config.sweep(["s={name='x',args={a=1,b=2}},{name='y'}"]) == [
        ["s={name='x',args={a=1,b=2}}"],
        ["s={name='y'}"],
    ]


def test_differences() -> None:
    a, b = runs.tables(), runs.tables("seed=9", "strategy.lr=0.3", "data.partition.clients=13")
    assert config.differences(a, a) == []
    assert config.differences(a, b) == ["data.partition.clients", "seed", "strategy.lr"]


def test_numbers_are_not_coerced() -> None:
    assert runs.experiment("strategy.lr=1").strategy.model_dump()["lr"] == 1.0  # a whole number is a number
    for wrong in ("seed='1'", "seed=1.0", "rounds=true", "strategy.lr='0.1'"):
        with pytest.raises(ConfigError):
            runs.experiment(wrong)


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("learing_rate", ["learning_rate", "rate"], "learning_rate"),
        ("fedavgg", ["fedavg", "fedavgm"], "fedavg"),
        ("mu", ["lr", "momentum"], None),
        ("lrr", ["lr", "mu"], "lr"),
        ("rl", ["lr", "mu"], "lr"),
        ("xyz", ["cohort"], None),
        ("FedAvg", ["fedavg"], "fedavg"),
    ],
)
def test_hints(word: str, known: list[str], expected: str | None) -> None:
    assert did_you_mean(word, known) == (f"; did you mean '{expected}'?" if expected else "")
