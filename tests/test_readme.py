"""What the README and docs/your-own.md show must work as it stands there."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import fedsim
import runs
from fedsim import check, config, data

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()
OWN = (HERE / "docs" / "your-own.md").read_text()


def files(text: str) -> dict[str, str]:
    """The files that a page shows, by name: each is a block of code under a comment with its name."""
    return dict(re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", text, re.S))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all of them, in which we are."""
    for name, text in (files(README) | files(OWN)).items():
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), np.arange(60, dtype=np.int32) % 3
    np.savez(tmp_path / "arrays.npz", x=x[:40], y=y[:40], x_test=x[40:], y_test=y[40:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_experiment_in_the_readme_is_an_experiment() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    assert config.parse(tomllib.loads(block)).strategy.name == "fedavg"


def test_the_strategy_in_the_readme_is_short() -> None:
    assert len(files(README)["fednova.py"].splitlines()) <= 45


def test_every_file_of_the_page_is_tried_here() -> None:
    shown = re.findall(r"^```\w", OWN, re.M)
    assert len(shown) == len(files(OWN))
    assert set(files(OWN)) == {
        "patients.csv", "patients.py", "patients.toml", "arrays.py", "corners.py", "zipf.py", "crowd.py", "net.py",
        "net.toml", "feedback.py", "guided.py",
    }  # fmt: skip
    assert "docs/your-own.md" in README


@pytest.mark.parametrize("name", ["fednova.py", "feedback.py", "guided.py"])
def test_a_strategy_keeps_the_contract(folder: Path, name: str) -> None:
    assert [(title, problem) for title, problem in check.run(name) if problem] == []


@pytest.mark.parametrize(
    ("file", "assignments"),
    [
        ("patients.toml", []),
        ("patients.toml", ["data={name='arrays.py',partition={name='iid',clients=4}}"]),
        ("net.toml", []),
        ("net.toml", ["data.partition={name='crowd.py'}"]),
        ("net.toml", ["strategy.name=feedback.py"]),
        ("net.toml", ["strategy.name=guided.py", "strategy.beta=0.2"]),
    ],
)
def test_an_experiment_runs(
    folder: Path, file: str, assignments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = runs.inside(capsys, monkeypatch)("run", file, *assignments, "rounds=2", "--out", "out")
    assert answer.code == 0, answer.err
    assert ("gradient_norm" in runs.lines(folder / "out")[-1]) == ("strategy.name=guided.py" in assignments)


def test_what_the_patients_are(folder: Path) -> None:
    made = config.parse(config.read(folder / "patients.toml"))
    held = data.federation(made.data, 0)
    assert len(held) == 2 and len(held.dataset.train.y) == 6 and len(held.dataset.test.y) == 2
    (folder / "patients.csv").write_text("hospital,age,bmi,ill\nnorth,61,31.2,1\nsouth,,20,0\n")
    with pytest.raises(fedsim.DataError, match=r"data\.file: patients\.csv, line 3: a value is missing"):
        data.federation(made.data, 0)


def test_a_program_runs_its_own_tensors(folder: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "corners.py"], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0.8  # a linear model has 0.5


def test_every_public_name_is_there() -> None:
    assert [name for name in fedsim.__all__ if getattr(fedsim, name, None) is None] == []
