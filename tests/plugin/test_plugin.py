"""Somebody else's strategy, in a package of its own that is really installed, found through its entry point."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from runs import Answer

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages installed by pip, offline."""
    made = tmp_path_factory.mktemp("plugins")
    sources = [shutil.copytree(HERE / name, made / "src" / name) for name in ("sign_momentum", "broken")]
    call = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*call, "--target", made / "site", *sources], check=True, env=env, timeout=120)
    return made / "site"


@pytest.fixture
def fedsim(site: Path, tmp_path: Path):
    def call(*args: str | Path) -> Answer:
        return runs.command(*args, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)})

    return call


def test_it_is_short() -> None:
    assert len((HERE / "sign_momentum" / "sign_momentum.py").read_text().splitlines()) < 45


def test_list_shows_it_and_survives_a_broken_one(fedsim) -> None:
    answer = fedsim("list", "strategies")
    assert answer.code == 0, answer.err
    rows = dict(line.split(maxsplit=1) for line in answer.out.splitlines() if line.startswith("  "))
    assert rows["sign_momentum"].startswith("A server that follows signs only, after signSGD with momentum")
    assert rows["broken"] == "What a plugin must not do"  # read, not imported
    assert rows["fedexp"] == "broken_plugin and strategies.fedexp (two packages claim the name: unusable)"
    assert rows["fedavg"].startswith("FedAvg (McMahan et al. 2017")


def test_the_contract_holds(fedsim) -> None:
    answer = fedsim("check", "sign_momentum")
    assert answer.code == 0, answer.out
    assert len(answer.out.splitlines()) >= 20
    assert all(line.startswith("passed") for line in answer.out.splitlines())


def test_it_runs(fedsim, tmp_path: Path) -> None:
    file = runs.write(tmp_path / "e.toml", "strategy.name=sign_momentum", "rounds=8", "strategy.server_lr=0.02")
    answer = fedsim("run", file, "--out", "out")
    assert answer.code == 0, answer.err
    assert runs.summary(tmp_path / "out")["strategy"] == "sign_momentum"
    assert runs.summary(tmp_path / "out")["final_accuracy"] > 0.7  # chance is 0.1


def test_a_broken_one_is_named(fedsim, tmp_path: Path) -> None:
    """Only whoever asks for it is told."""
    broken = fedsim("run", runs.write(tmp_path / "e.toml", "strategy.name=broken"), "--out", "out")
    assert broken.code == 2
    assert broken.err.splitlines() == [
        "error: strategy.name: plugin 'broken' (broken_plugin) cannot be loaded: "
        "RuntimeError: this plugin was made for another version"
    ]
    clash = fedsim("check", "fedexp")
    assert clash.code == 2
    assert clash.err.splitlines() == ["error: two plugins are named 'fedexp': broken_plugin and strategies.fedexp"]
