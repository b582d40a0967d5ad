"""A night in minutes: hundreds of rounds do not fill the memory, and a worker killed every 5 s changes no number."""

import os
import signal
import statistics
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedsim.run import build, run
from runs import experiment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_500_rounds_do_not_fill_the_memory(tmp_path: Path, strategy: str) -> None:
    """SCAFFOLD's clients remember, and those that do not fit into a megabyte are in files."""
    of = experiment(
        f"strategy.name={strategy}",
        "rounds=500",
        'data.partition={name="sampled", clients=10000, size=20}',
        "task.model=mlp",
        "engine.memory_mb=1",
        "evaluate.every=50",
        "checkpoint.every=25",
    )
    seen: list[int] = []

    def show(line: Mapping[str, Any]) -> None:
        if "round" in line:
            seen.append(resident())

    run(of, tmp_path / "run", show=show)
    assert len(seen) >= 500
    early, late = statistics.median(seen[100:150]), statistics.median(seen[-50:])
    print(f"{strategy}: {early / 1e6:.1f} MB after 100 rounds, {late / 1e6:.1f} MB after 500")
    assert late - early < 8e6  # 20 kB a round, of half a gigabyte


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_killed_every_5_seconds(tmp_path: Path) -> None:
    from fedsim import tree

    pytest.importorskip("fedsim.grids.ray")
    long = ("rounds=300", "strategy.epochs=4", "strategy.cohort=12")
    undisturbed = run(experiment(*long), tmp_path / "inline")["params_sha256"]
    session = build(experiment(*long, "engine.kind=ray", "engine.workers=2"))
    pool = session.grid.pool  # type: ignore[attr-defined]
    stop, killed = threading.Event(), []

    def kill() -> None:
        while not stop.wait(5):
            for pid in pool.pids[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        state = session.driver.begin()
        for number in range(1, 301):
            state, _ = session.driver.train(state, number)
            if number == 300 or len(killed) >= 5:
                stop.set()
        assert tree.digest(session.driver.params(state)) == undisturbed
    finally:
        stop.set()
        killer.join()
        session.close()
    print(f"{len(killed)} workers were killed")
    assert len(killed) >= 2
