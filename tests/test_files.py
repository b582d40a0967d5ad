"""Files that several may write, and that are whole all the same."""

import threading
from pathlib import Path

import pytest

from fedsim import files


def test_several_contribute_one_file(tmp_path: Path) -> None:
    """The two write in turns, into files of their own; whoever looks meanwhile sees nothing or all of one of them."""
    path, turn, seen = tmp_path / "made.npz", [threading.Semaphore(1), threading.Semaphore(0)], []

    def make(me: int) -> None:
        with files.contribute(path) as f:
            for _ in range(100):
                turn[me].acquire()
                f.write(str(me).encode() * 100)
                f.flush()
                seen.append(path.read_bytes() if path.exists() else b"")
                turn[1 - me].release()

    threads = [threading.Thread(target=make, args=(me,)) for me in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(seen) == 200 and set(seen) <= {b"", b"0" * 10_000}
    assert path.read_bytes() in (b"0" * 10_000, b"1" * 10_000)
    assert [p.name for p in tmp_path.iterdir()] == ["made.npz"] and path.stat().st_mode & 0o777 == 0o644


def test_a_contribution_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with files.contribute(tmp_path / "made.npz") as f:
            f.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_line_that_was_cut_short_is_cut_off(tmp_path: Path) -> None:
    """Else the next one would be appended to it, and both would be lost."""
    lines = files.Lines(tmp_path / "new" / "lines")
    assert lines.read() == []
    lines.add("1 0 abc")
    with (tmp_path / "new" / "lines").open("a") as f:
        f.write("2 0 3fa")
    lines = files.Lines(tmp_path / "new" / "lines")
    assert lines.read() == ["1 0 abc"]
    lines.add("2 0 def")
    assert lines.read() == ["1 0 abc", "2 0 def"]


def test_the_first_one_makes_a_file_for_good(tmp_path: Path) -> None:
    """Several at once: all of them get what one of them has made, and nothing else is left."""
    path, start, got = tmp_path / "noise.key", threading.Barrier(8), []

    def make(me: int) -> None:
        start.wait()
        got.append(files.first(path, f"key {me}".encode(), mode=0o600))

    threads = [threading.Thread(target=make, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8 and set(got) == {path.read_bytes()} and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o600
