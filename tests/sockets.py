"""Who listens and speaks where, as the kernel says it."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
LISTENS = "0A"


def sockets(pids: Iterable[int], kinds: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(local address, remote address, state) in hex, as /proc writes them and without ports, of processes' sockets."""
    inodes = set()
    for pid in pids:
        try:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(fd)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        except OSError:
            continue
    for kind in kinds:
        for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            part = row.split()
            if part[9] in inodes:
                yield part[1].partition(":")[0], part[2].partition(":")[0], part[3]


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses on which processes listen."""
    return {local for local, _, state in sockets(pids, ("tcp", "tcp6")) if state == LISTENS}
