"""Files that are there whole or not at all, whatever happens while they are written."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

AT_ONCE = 16  # files on their way to the disk


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file in one step: it holds the old bytes or the new ones, never a part, also after a power cut.

    For a file with one writer (``contribute`` is for others): what a killed one leaves, the next one writes over.
    ``mode`` holds for a file that is new; a link that stands where the temporary file goes is not followed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def contribute(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A file that any of several processes may make at once: each writes its own, and the last one to finish stays."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix, delete=False) as f:
        try:
            yield f
            f.flush()
            os.fchmod(f.fileno(), mode)
            os.fsync(f.fileno())
            os.replace(f.name, path)
        except BaseException:
            Path(f.name).unlink(missing_ok=True)
            raise
    sync(path.parent)


def first(path: Path, data: bytes, mode: int = 0o644) -> bytes:
    """What is in a file that any of several processes may make at once, and that the first one has made for good."""
    if path.exists():
        return path.read_bytes()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-") as f:
        f.write(data)
        f.flush()
        os.fchmod(f.fileno(), mode)
        os.fsync(f.fileno())
        with suppress(FileExistsError):
            os.link(f.name, path)
            sync(path.parent)
    return path.read_bytes()


def write_new(folder: Path, contents: Iterable[tuple[str, bytes]]) -> None:
    """Files that nothing refers to yet, by name; all are on the disk when this returns, and any of them before.

    They go there together: one after the other, each would wait for a commit of the file system.
    """
    paths = []
    for name, data in contents:
        path = folder / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "wb") as f:
            f.write(data)
        paths.append(path)
    if not paths:
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(sync, paths):
            pass
    sync(folder)


def append(file: int, data: bytes) -> None:
    """Add to an open file, and sync; where the disk is full, take the half back, or the next would grow on it."""
    start = os.fstat(file).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, start)
        raise


class Lines:
    """A file that grows by a line at a time; each is on the disk when ``add`` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[str]:
        """The lines. One that was cut short when it was written is cut off: whoever wrote it had not gone on."""
        if not self._path.exists():
            return []
        whole, end, _ = self._path.read_bytes().rpartition(b"\n")
        os.truncate(self._path, len(whole + end))
        return whole.decode().splitlines()

    def add(self, line: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            append(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Make what was written to a file, or the new names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
