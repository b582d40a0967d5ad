"""Offline: no command opens a connection beyond this machine, or listens where another could reach it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from fedsim import offline

# Loaded by every Python process at its start; each socket call is written down, and those beyond loopback are refused.
SPY = """
import os, socket, sys
LOG = os.environ["SOCKET_LOG"]

def hook(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        where = args[0] if event.startswith("socket.get") else args[1]
        if isinstance(where, (bytes, str)) and not event.startswith("socket.get"):
            return  # a Unix socket
        host = where if event.startswith("socket.get") else where[0]
        if isinstance(host, bytes):
            host = host.decode()
        if host in ("127.0.0.1", "::1", "localhost", None):
            return
        with open(LOG, "a") as f:
            f.write(f"{event} {where}\\n")
        raise OSError(f"offline: {event} {where}")

sys.addaudithook(hook)
"""


@pytest.fixture
def spied(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY)
    return os.environ | {"PYTHONPATH": str(tmp_path / "spy"), "SOCKET_LOG": str(tmp_path / "sockets.log")}


def test_the_spy_sees_what_it_should(tmp_path: Path, spied: dict[str, str]) -> None:
    """Sabotage: a model that phones home is caught."""
    (tmp_path / "home.py").write_text(
        "import socket\nfrom torch import nn\n\ndef model():\n"
        "    try:\n        socket.create_connection(('203.0.113.1', 80), timeout=1)\n"
        "    except OSError:\n        pass\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    file = runs.write(tmp_path / "e.toml", "task.model='home:model'", "rounds=1")
    answer = runs.command("run", file, "--out", "out", cwd=tmp_path, env=spied)
    assert answer.code == 0, answer.err
    assert "203.0.113.1" in (tmp_path / "sockets.log").read_text()


def test_a_script_is_as_quiet_as_the_command(tmp_path: Path) -> None:
    """Whatever it has imported before: Flower and the hub read their switches when they are imported."""
    (tmp_path / "script.py").write_text(
        "import datasets.config as sets, flwr.supercore.telemetry as flower, huggingface_hub.constants as hub\n"
        "print(flower.FLWR_TELEMETRY_ENABLED, hub.HF_HUB_OFFLINE, sets.HF_HUB_OFFLINE)\n"
        "import runs\nfrom fedsim.run import build\nbuild(runs.experiment())\n"
        "print(flower.FLWR_TELEMETRY_ENABLED, hub.HF_HUB_OFFLINE, sets.HF_HUB_OFFLINE)\n"
    )
    loud = {name: value for name, value in os.environ.items() if name not in {*offline.QUIET, "HF_HUB_OFFLINE"}}
    call = [sys.executable, tmp_path / "script.py"]
    env = loud | {"PYTHONPATH": os.pathsep.join([str(Path(runs.__file__).parent), *sys.path])}
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["1 False False", "0 True True"]


@pytest.mark.parametrize("name", ["scaffold", "flwr.serverapp.strategy:FedAdam"])
def test_a_run_stays_at_home(tmp_path: Path, spied: dict[str, str], name: str) -> None:
    """Flower's and Hugging Face's telemetry, update checks, metadata probes: none."""
    file = runs.write(tmp_path / "e.toml", f"strategy.name='{name}'", "rounds=2")
    answer = runs.command("run", file, "--out", "out", cwd=tmp_path, env=spied)
    assert answer.code == 0, answer.err
    assert not (tmp_path / "sockets.log").exists(), (tmp_path / "sockets.log").read_text()


@pytest.mark.parametrize("line", ["doctor", "list", "data list"])
def test_commands_stay_at_home(tmp_path: Path, spied: dict[str, str], line: str) -> None:
    answer = runs.command(*line.split(), cwd=tmp_path, env=spied)
    assert answer.code == 0, answer.err
    assert not (tmp_path / "sockets.log").exists(), (tmp_path / "sockets.log").read_text()


def test_telemetry_is_off(tmp_path: Path) -> None:
    """Even where the environment asks for it: the switches are set before anybody reads them."""
    asked = os.environ | {"FLWR_TELEMETRY_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "1"}
    answer = runs.command("doctor", cwd=tmp_path, env=asked)
    assert "telemetry      off" in answer.out, answer.out


def test_nothing_listens(tmp_path: Path) -> None:
    """While a run is under way, none of its processes has a listening socket."""
    file = runs.write(tmp_path / "e.toml", "rounds=1000000")
    process = runs.start("run", file, "--out", tmp_path / "out", cwd=tmp_path)
    try:
        runs.wait_for(tmp_path / "out" / "checkpoint" / "round-00000002", process)
        assert runs.listening(process.pid) == []
    finally:
        process.kill()
        process.communicate()
