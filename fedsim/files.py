"""Files that are there whole or not at all, whatever happens while they are written."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
def contribute(path: Path) -> Iterator[IO[bytes]]:
    """A file that any of several processes may make at once: each writes its own, and the last one to finish stays."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix, delete=False) as f:
        try:
            yield f
            f.flush()
            os.fchmod(f.fileno(), 0o644)
            os.fsync(f.fileno())
            os.replace(f.name, path)
        except BaseException:
            Path(f.name).unlink(missing_ok=True)
            raise
    sync(path.parent)


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


def sync(path: Path) -> None:
    """Make what was written to a file, or the new names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
