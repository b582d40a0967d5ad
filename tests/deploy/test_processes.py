"""A SuperLink and SuperNodes as real processes on loopback, with TLS and node keys.

Each round takes Flower seconds, since it starts a process for every message: all but the first test are slow.
"""

import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sockets import LOOPBACK, listening

from fedsim import certificates, deploy
from fedsim.benches import proc
from fedsim.deploy import Local
from fedsim.errors import ConfigError, FedsimError
from fedsim.run import run
from runs import experiment, lines

SMALL = ("rounds=2", "data.partition.clients=3", "strategy.cohort=3", "data.holdout=0.0", "engine.block=1")
PATIENCE = {"timeout": 240, "wait": 150}


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Local]:
    with deploy.local(tmp_path / "deployment", 3) as there:
        yield there


@pytest.mark.timeout(280)
def test_fedavg_ends_with_the_bits_of_one_process_and_only_loopback_listens(deployment: Local, tmp_path: Path) -> None:
    e = experiment(*SMALL, "rounds=1", "strategy.name=fedavg")
    addresses: set[str] = set()

    def look(stop: threading.Event) -> None:
        while not stop.wait(1.0):
            for pid in deployment.running().values():
                addresses.update(listening(proc.tree(pid)))

    stop = threading.Event()
    watcher = threading.Thread(target=look, args=(stop,))
    watcher.start()
    try:
        there = deployment.run(e, tmp_path / "out", **PATIENCE)
    finally:
        stop.set()
        watcher.join()
    assert there["status"] == "completed"
    assert there["params_sha256"] == run(e, tmp_path / "here")["params_sha256"]
    assert addresses and addresses <= LOOPBACK
    deployment.down()
    assert not deployment.running()


@pytest.mark.slow
@pytest.mark.parametrize("of", ["hyperfl task.model=mlp task.hidden=[8]", "scaffold", "fzoos"])
def test_other_strategies_end_with_the_bits_of_one_process(of: str, deployment: Local, tmp_path: Path) -> None:
    if of == "fzoos":
        quadratic = Path(__file__).parent.parent.parent / "experiments/fzoos/quadratic.toml"
        from fedsim import config

        e = config.parse(config.override(config.read(quadratic), ["rounds=1", "data.clients=3", "strategy.cohort=3"]))
    else:
        e = experiment(*SMALL, *f"strategy.name={of}".split())
    there = deployment.run(e, tmp_path / "out", **PATIENCE)
    assert there["params_sha256"] == run(e, tmp_path / "here")["params_sha256"]


def after(out: Path, round: int, act: Callable[[], Any]) -> threading.Thread:
    """Do something when a run has saved a round."""

    def waiter() -> None:
        end = time.monotonic() + 240
        while not (out / "checkpoint" / f"round-{round:08d}").exists() and time.monotonic() < end:
            time.sleep(0.1)
        act()

    thread = threading.Thread(target=waiter)
    thread.start()
    return thread


def back(deployment: Local, node: int) -> None:
    """Start a node again: refused, and ended, until the SuperLink has noticed that its predecessor is gone."""
    end = time.monotonic() + 150
    while time.monotonic() < end:
        pid, until = deployment.start_node(node), time.monotonic() + 12
        while deploy.alive(pid) and time.monotonic() < until:
            time.sleep(0.2)
        if deploy.alive(pid):
            return
    raise AssertionError("the node was not let in again")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_a_killed_supernode_ends_the_run_or_is_left_out(policy: str, deployment: Local, tmp_path: Path) -> None:
    e = experiment(*SMALL, "strategy.name=fedavg", f"engine.on_error={policy}")
    out = tmp_path / "out"
    killer = after(out, 1, lambda: deployment.kill("supernode-1"))
    if policy == "raise":
        with pytest.raises(FedsimError, match=r"client 1 failed in round 2|clients have no node"):
            deployment.run(e, out, **PATIENCE)
        assert (out / "checkpoint" / "round-00000001").exists()
    else:
        assert deployment.run(e, out, **PATIENCE)["status"] == "completed"
        assert lines(out)[1]["failures"][0]["client"] == 1 and lines(out)[1]["clients"] == 2
    killer.join()


@pytest.mark.slow
def test_a_killed_superlink_and_a_restarted_node_lose_nothing(deployment: Local, tmp_path: Path) -> None:
    e = experiment(*SMALL, "rounds=3", "strategy.name=scaffold")
    out = tmp_path / "out"
    killer = after(out, 1, lambda: deployment.kill("superlink"))
    with pytest.raises(FedsimError, match="resume"):
        deployment.run(e, out, **PATIENCE)
    killer.join()
    deployment.kill("supernode-1")
    deployment.start_link()
    back(deployment, 1)
    there = deployment.run(e, out, resume=True, **PATIENCE)
    assert there["params_sha256"] == run(e, tmp_path / "here")["params_sha256"]


@pytest.mark.slow
def test_work_is_not_given_to_a_process_without_the_secret(tmp_path: Path) -> None:
    certificates.make(tmp_path / "strangers", 1)
    with deploy.local(tmp_path / "deployment", 0) as there:
        shutil.copy(there.certs / "serverapp" / "ca.crt", tmp_path / "strangers" / "serverapp")
        call = deploy.executor(tmp_path / "strangers" / "serverapp", f"127.0.0.1:{there.place['port']}")
        pid, end = there.spawn("thief", call, tmp_path), time.monotonic() + 60
        while deploy.alive(pid) and time.monotonic() < end:
            time.sleep(0.2)
        assert not deploy.alive(pid)
        assert "SuperExec authentication failed" in (there.folder / "logs" / "superlink.log").read_text()
        assert set(there.running()) == {"superlink", "superlink-executor"}


@pytest.mark.slow
def test_an_unknown_node_and_a_wrong_certificate_are_refused(deployment: Local, tmp_path: Path) -> None:
    certificates.make(tmp_path / "strangers", 3)
    unknown, deceived = (tmp_path / name for name in ("unknown", "deceived"))
    for folder, key, ca in (
        (unknown, tmp_path / "strangers", deployment.certs),
        (deceived, deployment.certs, tmp_path / "strangers"),
    ):
        folder.mkdir()
        shutil.copy(key / "node-2" / "node.key", folder)
        shutil.copy(ca / "node-2" / "ca.crt", folder)
        deployment.kill("supernode-2")
        pid = deployment.start_node(2, folder)
        end = time.monotonic() + 60
        log = deployment.folder / "logs" / "supernode-2.log"
        while deploy.alive(pid) and time.monotonic() < end and "failed" not in log.read_text().lower():
            time.sleep(0.2)
        log.unlink()
    e = experiment(*SMALL, "rounds=1")
    with pytest.raises(FedsimError, match=r"1 of 3 clients have no node after 75 s: 2"):
        deployment.run(e, tmp_path / "out", timeout=240, wait=75)


def test_keys_are_for_their_owner_and_the_authoritys_is_not_kept(tmp_path: Path) -> None:
    certificates.make(tmp_path, 2)
    everything = [path for path in tmp_path.glob("**/*") if path.is_file()]
    private = {str(path.relative_to(tmp_path)) for path in everything if b"PRIVATE KEY" in path.read_bytes()}
    assert private == {"superlink/server.key", "node-0/node.key", "node-1/node.key"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in everything)
    before = (tmp_path / "node-0" / "node.key").read_bytes()
    certificates.make(tmp_path, 3)
    assert (tmp_path / "node-0" / "node.key").read_bytes() == before and (tmp_path / "node-2" / "node.key").exists()


def test_what_cannot_be_deployed_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no deployment|no SuperLink is running"):
        Local(tmp_path).run(experiment(*SMALL), tmp_path / "out")
    e = experiment(*SMALL)
    file = e.model_copy(update={"strategy": e.strategy.model_copy(update={"name": "mine.py"})})
    with pytest.raises(ConfigError, match="is a file of this machine"):
        deploy.write_app(tmp_path / "app", file, {})


def test_an_error_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised, and whoever catches it prints it: it is not echoed as well."""
    flwr, echo = tmp_path / "flwr", io.StringIO()
    flwr.write_text("#!/bin/sh\necho 'run: there'\necho 'error: 2 of 3 clients have no node'\n")
    flwr.chmod(0o700)
    monkeypatch.setattr(deploy.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FedsimError, match=r"^2 of 3 clients have no node$"):
        deploy.submit(tmp_path / "app", tmp_path / "home", tmp_path / "out", echo)
    assert echo.getvalue() == "run: there\n"
