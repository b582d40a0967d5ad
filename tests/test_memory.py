"""Clients' memories: bounded, and the same to the bit whether they were in the process, in a file, or resumed."""

import errno
from pathlib import Path

import pytest
import torch

from fedsim import checkpoint, tree
from fedsim.errors import FedsimError
from fedsim.memory import ENTRY, Memory
from fedsim.types import Payload


def payload(client: int, numbers: int = 256) -> Payload:
    generator = torch.Generator().manual_seed(client)
    return {"embed": {"v": torch.randn(numbers, generator=generator)}, "head": {"b": torch.tensor(float(client))}}


def equal(a: Payload | None, b: Payload) -> bool:
    return a is not None and a.keys() == b.keys() and all(tree.digest(a[c]) == tree.digest(b[c]) for c in b)


def test_ten_thousand_clients_in_a_bound(tmp_path: Path) -> None:
    limit, one = 100 * 1024, tree.nbytes(payload(0)) + ENTRY
    memory = Memory(limit=limit, folder=tmp_path)
    for start in range(0, 10_000, 50):
        memory.update({c: payload(c) for c in range(start, start + 50)})
        assert memory.resident <= limit
    assert len(memory) == 10_000 and list(memory) == list(range(10_000))
    assert len(list(tmp_path.iterdir())) >= 10_000 - limit // one
    for client in (0, 1, 4_999, 9_999, 0):
        assert equal(memory.get(client), payload(client))
        assert memory.resident <= limit
    assert memory.get(10_000) is None


def test_a_new_memory_replaces_the_old_and_its_file(tmp_path: Path) -> None:
    memory = Memory(limit=1, folder=tmp_path)
    memory.update({0: payload(0), 1: payload(1), 2: payload(2)})
    assert len(list(tmp_path.iterdir())) == 2  # one memory is always here
    memory.update({0: payload(7)})
    assert equal(memory.get(0), payload(7)) and equal(memory.get(1), payload(1))
    memory.update({c: payload(c + 10) for c in range(3)})
    assert [equal(memory.get(c), payload(c + 10)) for c in range(3)] == [True] * 3
    assert len(list(tmp_path.iterdir())) <= 3


def test_a_client_in_use_stays_and_the_oldest_goes(tmp_path: Path) -> None:
    one = tree.nbytes(payload(0)) + ENTRY
    memory = Memory(limit=2 * one, folder=tmp_path)
    memory.update({0: payload(0), 1: payload(1)})
    kept = memory.get(0)
    memory.update({2: payload(2)})  # 1 was used longest ago
    assert memory.get(0) is kept
    assert equal(memory.get(1), payload(1))


def test_together_is_all_or_nothing(tmp_path: Path) -> None:
    memory = Memory({0: payload(0)}, limit=1, folder=tmp_path)
    assert memory.changed == set()

    def failing() -> None:
        with memory.together() as update:
            update({0: payload(5), 1: payload(1)})
            assert equal(memory.get(0), payload(0)) and memory.get(1) is None
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert equal(memory.get(0), payload(0)) and len(memory) == 1 and memory.changed == set()
    with memory.together() as update:
        update({0: payload(5)})
        update({0: payload(6), 1: payload(1)})
    assert equal(memory.get(0), payload(6)) and equal(memory.get(1), payload(1)) and memory.changed == {0, 1}
    assert len(list(tmp_path.iterdir())) <= 2


def test_checkpoint_of_memories_that_are_in_files(tmp_path: Path) -> None:
    memory = Memory(limit=1, folder=tmp_path / "scratch")
    memory.update({c: payload(c) for c in range(20)})
    store = checkpoint.Store(tmp_path / "checkpoint", keep=1)
    store.save(1, {}, None, memory, {})
    found = checkpoint.Store(tmp_path / "checkpoint", keep=1).load({})
    assert memory.changed == set()
    again = Memory(limit=1, folder=tmp_path / "again")
    again.update(found.memory)
    assert again.resident < 2 * (tree.nbytes(payload(0)) + ENTRY)
    assert all(equal(again.get(c), payload(c)) for c in range(20))


def test_scratch_files_end_with_the_memory() -> None:
    memory = Memory(limit=1)
    memory.update({0: payload(0), 1: payload(1)})
    folder = memory._folder
    assert folder is not None and folder.exists()
    del memory
    assert not folder.exists()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    mine = Memory(limit=1, folder=tmp_path / "scratch")
    with pytest.raises(FedsimError, match=r"what clients remember cannot be written to .*scratch: No space left"):
        mine.update({c: {"w": {"x": torch.zeros(4)}} for c in range(2)})
