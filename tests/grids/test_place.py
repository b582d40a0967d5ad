"""Workers are placed by what there is: cores, memory that is free, GPUs."""

from pathlib import Path

import pytest

from fedsim.grids import place
from fedsim.grids.place import Machine, fit, free, need

GB = 10**9


@pytest.mark.parametrize(
    ("gpus", "memory", "one", "cores", "expected"),
    [
        (1, 80 << 30, 10 << 30, 16, (7, 1 / 7)),
        (2, 80 << 30, 10 << 30, 8, (8, 1 / 4)),  # four cores a GPU
        (1, 80 << 30, 1 << 30, 64, (8, 1 / 8)),  # eight a GPU, not seventy-two
        (4, 16 << 30, 40 << 30, 4, (4, 1.0)),  # does not fit, but somebody must try
    ],
)
def test_workers_on_gpus(gpus: int, memory: int, one: int, cores: int, expected: tuple[int, float]) -> None:
    assert fit(gpus, memory, one, cores) == expected


def test_as_many_as_there_are_cores_and_memory() -> None:
    machines = [Machine("a", 16, 0, 64 * GB), Machine("b", 16, 0, 5 * GB), Machine("c", 4, 0, GB)]
    found = place.place(machines, None, GB)
    assert (found.workers, found.share) == (16 + 4 + 0, 0.0)
    assert [line.partition(" workers")[0] for line in found.table] == ["a: 16", "b: 4", "c: 0"]


def test_somebody_must_try() -> None:
    assert place.place([Machine("a", 8, 0, GB // 2)], None, GB).workers == 1


def test_what_was_asked_for_is_done() -> None:
    found = place.place([Machine("a", 2, 0, GB)], 64, GB)
    assert found.workers == 64 and found.table == ["64 workers, as asked, on 2 cores"]
    assert place.place([Machine("a", 16, 2, 64 * GB)], 8, GB).share == 0.25


def test_gpus_are_shared_alike_on_all_machines() -> None:
    """b has cores for one worker a GPU only, so a GPU of a's has one as well."""
    machines = [Machine("a", 16, 2, 64 * GB), Machine("b", 2, 2, 64 * GB), Machine("head", 8, 0, 64 * GB)]
    found = place.place(machines, None, GB, 80 * GB, 10 * GB)
    assert (found.workers, found.share) == (4, 1.0)
    alone = place.place(machines[:1], None, GB, 80 * GB, 10 * GB)
    assert (alone.workers, alone.share) == (14, 1 / 7)


def test_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    total = place._field("/proc/meminfo", "MemTotal:")
    assert 0 < free() <= total
    assert place.LEAST <= need(0) < total and need(1 << 50) == int(place.MORE * place.LEAST)
    # A container that may take a gigabyte and has taken a quarter of it.
    given = {"/sys/fs/cgroup/memory.max": str(GB), "/sys/fs/cgroup/memory.current": str(GB // 4)}
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self: given.get(str(self)) or read(self))
    assert free() == GB * 3 // 4
