"""Ray's workers: the same numbers as in one process, whoever dies; nothing beyond loopback."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sockets import LOOPBACK, sockets

from fedsim import config, tree
from fedsim.benches import proc
from fedsim.config import Experiment
from fedsim.errors import ClientError, ConfigError
from fedsim.grids import inline as grids
from fedsim.run import build, run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    # Ray forgets about its own daemons when it is shut down.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ray_grid = pytest.importorskip("fedsim.grids.ray")

sys.path.append(str(Path(__file__).parent))  # for ``deadly``, as the folder of a user's own module would be

BASE: dict[str, Any] = {
    "name": "ray",
    "seed": 5,
    "rounds": 2,
    "data": {"name": "digits", "partition": {"name": "dirichlet", "clients": 20, "alpha": 0.5}, "holdout": 0.2},
    "task": {"model": "mlp", "hidden": [16]},
    "strategy": {"name": "scaffold", "cohort": 12, "lr": 0.1, "epochs": 1, "batch_size": 8},
    "engine": {"block": 2},
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """One cluster for all of them; grids join it, and leave it when they are closed."""
    made = ray_grid.Cluster()
    made.start(8, 0, 200_000_000)
    yield made
    made.close()


def experiment(*overrides: str) -> Experiment:
    return config.parse(config.override(BASE, overrides))


def sha(of: Experiment, out: Path, **kwargs: Any) -> str:
    return str(run(of, out, **kwargs)["params_sha256"])


@pytest.fixture(scope="session")
def inline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sha(experiment(), tmp_path_factory.mktemp("inline") / "run")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_number_of_workers_decides_nothing(cluster: Any, inline: str, workers: int, tmp_path: Path) -> None:
    assert sha(experiment("engine.kind=ray", f"engine.workers={workers}"), tmp_path / "run") == inline


def test_the_next_cohort_is_ordered_while_workers_work(
    cluster: Any, inline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered: list[frozenset[int]] = []
    canonical = grids.canonical

    def counted(cohort: Any, *of: Any) -> list[int]:
        ordered.append(frozenset(cohort))
        return canonical(cohort, *of)

    monkeypatch.setattr(grids, "canonical", counted)
    session = build(experiment("engine.kind=ray", "engine.workers=2"))
    try:
        cohort, state = session.driver.cohort, session.driver.begin()  # type: ignore[attr-defined]
        for number in (1, 2):
            state, _ = session.driver.train(state, number)
            # Each cohort once: the first one when it is its turn, the others in the round before theirs.
            assert ordered == [frozenset(cohort(r)) for r in range(1, number + 2)]
        assert tree.digest(session.driver.params(state)) == inline
    finally:
        session.close()


def test_messages_give_the_same_bits(cluster: Any, inline: str, tmp_path: Path) -> None:
    of = experiment("engine.kind=ray", "engine.workers=2", "engine.paths=messages")
    assert sha(of, tmp_path / "run") == inline


def test_a_run_may_go_on_elsewhere(cluster: Any, inline: str, tmp_path: Path) -> None:
    run(experiment("rounds=1"), tmp_path / "run")
    assert sha(experiment("engine.kind=ray", "engine.workers=2"), tmp_path / "run", resume=True) == inline


def deadly(*overrides: str) -> Experiment:
    """FedAvg in which the client with the most examples of the cohort ends its worker."""
    tables = BASE | {"strategy": {"name": "deadly:deadly", "cohort": 20, "lr": 0.1, "batch_size": 8}}
    return config.parse(config.override(tables, ["rounds=2", *overrides]))


def biggest() -> tuple[int, int]:
    """The client with the most examples, and their number; nobody else has so many."""
    federation = build(experiment()).federation
    sizes = [len(federation.indices(c, "train")) for c in range(20)]
    assert sizes.count(max(sizes)) == 1
    return int(np.argmax(sizes)), max(sizes)


def test_a_dead_worker_is_replaced_and_its_blocks_run_again(cluster: Any, tmp_path: Path) -> None:
    _, size = biggest()
    alive = sha(deadly(), tmp_path / "alive")
    marker = tmp_path / "killed"
    of = deadly("engine.kind=ray", "engine.workers=2", f"strategy.client_examples={size}", f"strategy.marker={marker}")
    assert sha(of, tmp_path / "run") == alive and marker.exists()


def test_a_client_that_kills_workers_is_named(cluster: Any, tmp_path: Path) -> None:
    client, size = biggest()
    ray = ("engine.kind=ray", "engine.workers=2", f"strategy.client_examples={size}", "rounds=1")
    with pytest.raises(ClientError, match=f"client {client} failed in round 1 .*its worker died"):
        run(deadly(*ray), tmp_path / "raise")

    session = build(deadly(*ray, "engine.on_error=drop"))
    try:
        _, trained = session.driver.train(session.driver.begin(), 1)
        assert [f.client for f in trained.failures] == [client] and trained.clients == 19
        assert "its worker died" in trained.failures[0].reason
        pool = session.grid.pool  # type: ignore[attr-defined]
        assert pool.size == 2 and pool.replaced >= 2
        _, trained = session.driver.train(session.driver.begin(), 2)  # the pool is full, and works
        assert trained.clients == 19 and pool.present == 2
    finally:
        session.close()


def trained(of: Experiment, change: Callable[[Any], None] = lambda grid: None) -> str:
    session = build(of)
    try:
        change(session.grid)
        state, _ = session.driver.train(session.driver.begin(), 1)
        return tree.digest(session.driver.params(state))
    finally:
        session.close()


def test_a_block_whose_workers_were_killed_from_outside_has_its_numbers(cluster: Any) -> None:
    """Its clients are run alone to find who did it; as nobody did, the block counts, and not what each is alone."""
    taken_apart = []

    def killed_twice(grid: Any) -> None:
        run = grid.pool.run

        def dying(units: Any, send: Any, *rest: Any) -> Iterator[Any]:
            taken_apart.append([len(u.what.clients) for u in units])
            if len(taken_apart) == 1:
                yield ray_grid.Answer([units[0].what], None, "its worker died")
                units = units[1:]
            yield from run(units, send, *rest)

        grid.pool.run = dying

    of = ("task={model='cnn',channels=[2,3]}", "engine.block=4")
    there = trained(experiment(*of, "engine.kind=ray", "engine.workers=2"), killed_twice)
    assert taken_apart == [[4, 4, 4], [1] * 4, [4]]
    assert there == trained(experiment(*of))


def test_a_worker_that_the_memory_monitor_kills_is_replaced(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    get, killed = ray.get, []

    def monitored(ref: Any) -> Any:
        result = get(ref)
        if isinstance(result, tuple) and not killed:  # an answer, and not a worker's first sign of life
            killed.append(ref)
            raise ray.exceptions.OutOfMemoryError("1 worker(s) were killed due to the node running low on memory")
        return result

    monkeypatch.setattr(ray, "get", monitored)
    of = experiment("engine.kind=ray", "engine.workers=2")
    assert trained(of, lambda grid: None) == trained(experiment()) and killed


def test_a_stopped_worker_is_replaced_after_a_deadline(cluster: Any, inline: str) -> None:
    session = build(experiment("engine.kind=ray", "engine.workers=2", "engine.deadline=3.0"))
    try:
        state, _ = session.driver.train(session.driver.begin(), 1)
        pool = session.grid.pool  # type: ignore[attr-defined]
        os.kill(pool.pids[0], signal.SIGSTOP)
        state, _ = session.driver.train(state, 2)
        assert pool.replaced == 1 and tree.digest(session.driver.params(state)) == inline
    finally:
        session.close()


class Pair(NamedTuple):
    a: Any
    b: Any


NOBODY = {"00000000", "0" * 32}


def test_nothing_beyond_loopback(tmp_path: Path) -> None:
    """A whole run in a process of its own, looked at ten times a second: its start, its work and its end."""
    file = tmp_path / "e.toml"
    import tomli_w

    file.write_text(tomli_w.dumps(BASE))
    command = [sys.executable, "-m", "fedsim.cli", "run", str(file), "--engine", "ray", "--workers", "2"]
    child = subprocess.Popen([*command, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen: set[tuple[str, str]] = set()
    while child.poll() is None:
        found = sockets(proc.tree(child.pid), ("tcp", "tcp6", "udp", "udp6"))
        seen |= {(local, remote) for local, remote, _ in found}
        time.sleep(0.1)
    _, err = child.communicate()
    assert child.returncode == 0, err.decode()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    assert any(local in LOOPBACK for local, _ in seen)  # it was looked at
    assert {remote for _, remote in seen} <= LOOPBACK | NOBODY
    assert {local for local, _ in seen} <= LOOPBACK | NOBODY


def test_ray_that_was_imported_too_early(tmp_path: Path) -> None:
    """It would wait for 20 s, and then say that its own token is wrong."""
    code = "import ray\nfrom fedsim.grids.ray import Cluster\nCluster().start(1, 0, 100_000_000)"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert "import fedsim.grids.ray before ray" in done.stderr.splitlines()[-1]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "fedsim.grids.ray")
    with pytest.raises(ConfigError, match=r"pip install 'fedsim-engine\[ray\]'"):
        build(experiment("engine.kind=ray"))


def test_tensors_travel_as_they_are() -> None:
    value = {"x": Pair(torch.arange(3.0).to(torch.bfloat16), [torch.ones(()), None]), "n": (1, "a", np.arange(2))}
    back = ray_grid.unpack(ray_grid.pack(value))
    assert torch.equal(back["x"].a, value["x"].a) and back["x"].a.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert back["x"].b[0].shape == () and back["x"].b[1] is None and back["n"][:2] == (1, "a")
    back["x"].a.add_(1)  # memory of its own
    assert value["x"].a[0] == 0  # type: ignore[attr-defined]


def test_a_cluster_is_counted(cluster: Any) -> None:
    (machine,) = ray_grid.machines(0)
    assert machine[:3] == ("127.0.0.1", 8, 0) and machine.memory > 1e8


@given(st.integers(1, 300), st.integers(1, 40), st.randoms(use_true_random=False))
def test_messages_are_single_nodes_of_the_fold(blocks: int, workers: int, random: Any) -> None:
    """Each message but the last is an aligned run of 2^k blocks; none is lost, and there are not many of them."""
    cost = sorted((random.uniform(1, 100) for _ in range(blocks)), reverse=True)
    queue = deque(ray_grid.Unit(i, c, place=i) for i, c in enumerate(cost))
    left, messages = sum(cost), []
    while queue:
        messages.append([u.what for u in ray_grid.take(queue, left / (ray_grid.SHARE * workers))])
        left -= sum(cost[i] for i in messages[-1])
    assert [i for m in messages for i in m] == list(range(blocks))
    for m in messages[:-1]:
        assert len(m).bit_count() == 1 and m[0] % len(m) == 0
    assert len(messages) <= 4 * workers * math.log2(blocks + 1) + 1


def test_what_messages_took_is_learned(cluster: Any, inline: str) -> None:
    """A cost for each phase, in seconds, and the same numbers."""
    from fedsim import tree

    session = build(experiment("engine.kind=ray", "engine.workers=2"))
    try:
        state = session.driver.begin()
        for number in (1, 2):
            state, _ = session.driver.train(state, number)
        (cost,) = session.grid.costs.values()  # type: ignore[attr-defined]
        assert 0 < cost.of(100, 10) < 10  # a guess would say 200
        assert tree.digest(session.driver.params(state)) == inline
    finally:
        session.close()


def test_chaos(cluster: Any, inline: str) -> None:
    """A worker is killed as soon as there is one, four times; the numbers stay."""
    from fedsim import tree

    session = build(experiment("engine.kind=ray", "engine.workers=2"))
    pool = session.grid.pool  # type: ignore[attr-defined]
    stop = threading.Event()

    def kill() -> None:
        for _ in range(4):
            while not pool.pids and not stop.wait(0.05):
                pass
            if stop.wait(0.3):
                return
            for pid in pool.pids[:1]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        state = session.driver.begin()
        for number in (1, 2):
            state, _ = session.driver.train(state, number)
        assert tree.digest(session.driver.params(state)) == inline
    finally:
        stop.set()
        killer.join()
        session.close()
