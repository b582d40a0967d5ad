"""How many workers run where, from what is measured: cores, free memory, GPUs, and what one of them needs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SPARE = 0.9  # of the memory that is free; the rest stays so
LEAST = 1 << 28  # bytes that a worker needs at least: torch alone is as large
MORE = 1.25  # of what this process needs: a worker also holds a block at work
MOST_A_GPU = 8


class Machine(NamedTuple):
    """What is free on one of the machines; memory in bytes."""

    name: str
    cores: int
    gpus: int
    memory: int


class Placement(NamedTuple):
    """Workers in all, each one's share of a GPU, and how they are spread."""

    workers: int
    share: float
    table: list[str]


def place(
    machines: Sequence[Machine], asked: int | None, need: int, gpu_memory: int = 0, gpu_need: int = 0
) -> Placement:
    """``asked`` workers; None: as many as cores, memory and GPUs allow, and one at least.

    ``need``: bytes that a worker takes; ``gpu_memory`` and ``gpu_need``: of a GPU, and what a worker takes of it.
    """
    gpus = sum(m.gpus for m in machines)
    if asked is not None:
        on = f"{gpus} GPUs" if gpus else f"{sum(m.cores for m in machines)} cores"
        return Placement(asked, min(1.0, gpus / asked), [f"{asked} workers, as asked, on {on}"])
    rooms = [min(m.cores, int(m.memory * SPARE) // max(need, 1)) for m in machines]
    share = 0.0
    if gpus:
        counts = [fit(m.gpus, gpu_memory, gpu_need, room) for m, room in zip(machines, rooms, strict=True)]
        share = max((part for n, part in counts if n), default=1.0)
        rooms = [int(m.gpus / share) for m in machines]
    elif not any(rooms):
        rooms[0] = 1  # somebody must try
    table = []
    for m, n in zip(machines, rooms, strict=True):
        of = f"{m.cores} cores, {m.memory / 1e9:.1f} GB free, {need / 1e9:.1f} GB a worker"
        table.append(
            f"{m.name}: {n} workers ({of}" + (f", {m.gpus} GPUs, {share:.2g} of one a worker)" if gpus else ")")
        )
    return Placement(sum(rooms), share, table)


def fit(gpus: int, memory: int, one: int, cores: int) -> tuple[int, float]:
    """Workers, and each one's share of a GPU: as many as a GPU's ``memory`` holds of ``one``, both in bytes.

    A tenth of the memory stays free. No more workers than cores, and no more than eight a GPU: they queue for its
    units. At least one a GPU, whatever it measures: blocks get smaller before workers do.
    """
    each = max(1, min(MOST_A_GPU, int(memory * SPARE) // max(one, 1), cores // max(gpus, 1)))
    return gpus * each, 1 / each


def here(gpus: int) -> Machine:
    """This machine."""
    return Machine("this machine", len(os.sched_getaffinity(0)), gpus, free())


def free() -> int:
    """Bytes that this process could still take: of the machine's, and of its container's where that has a limit."""
    found = [_field("/proc/meminfo", "MemAvailable:")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or no limit ("max")
    return max(0, min(found))


def need(data: int) -> int:
    """Bytes that a worker takes, from what this process takes, which has loaded the same, without its ``data``."""
    return int(MORE * max(_field("/proc/self/status", "RssAnon:") - data, LEAST))


def _field(file: str, name: str) -> int:
    """A size in kB, in bytes."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
