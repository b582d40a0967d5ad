"""What a process and all its descendants use, read from ``/proc`` (Linux)."""

import os
import threading
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def tree(root: int) -> list[int]:
    """``root`` and its descendants, as far as they can be seen."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                children.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
            except (OSError, IndexError):
                continue  # gone in the meantime
    out, queue = [], [root]
    while queue:
        pid = queue.pop()
        out.append(pid)
        queue += children.get(pid, [])
    return out


def cpu(root: int) -> float:
    """CPU seconds of the tree: of those that live, and of the dead whom a living member has waited for."""
    ticks = 0
    for pid in tree(root):
        try:
            ticks += sum(int(field) for field in _stat(pid)[11:15])
        except (OSError, IndexError):
            continue
    return ticks / TICK


def pss(root: int) -> int:
    """Bytes of memory of the tree, shared pages divided among those that share them."""
    total = 0
    for pid in tree(root):
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


class Peak:
    """Samples the memory of a tree until it is stopped."""

    def __init__(self, root: int, every: float = 0.5) -> None:
        self.bytes = 0
        self._root, self._every, self._stop = root, every, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self.bytes = max(self.bytes, pss(self._root))

    def stop(self) -> int:
        """The peak so far, in bytes."""
        self._stop.set()
        self._thread.join()
        return self.bytes
