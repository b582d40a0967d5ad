"""What clients remember between visits. It belongs to the engine: a strategy's server half never sees it.

A population's memories need not fit into a machine's: what was used longest ago goes to files when a bound in bytes is
passed, and comes back, bit for bit, when its client does. The files are scratch; a checkpoint is what lasts.
"""

import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.errors import FedsimError
from fedsim.types import Payload

LIMIT = 1 << 30
ENTRY = 512  # bytes that an entry costs beside its tensors, about


class Memory:
    """Clients' memories by client number, with the set that changed since the last checkpoint.

    Tensors are the host's, wherever clients work.

    limit:  bytes of tensors that are kept in this process; one memory always is
    folder: where the others go; a temporary folder that ends with this object where None
    """

    def __init__(
        self, initial: Mapping[int, Payload] | None = None, limit: int = LIMIT, folder: Path | None = None
    ) -> None:
        self.changed: set[int] = set()
        self._limit, self._folder = limit, folder
        self._number: dict[int, int] = {}  # client -> the number of its memory; a new memory has a new number
        self._here: OrderedDict[int, tuple[Payload, int]] = (
            OrderedDict()
        )  # number -> memory and bytes; oldest use first
        self._filed: set[int] = set()  # numbers that have a file
        self._bytes = self._next = 0
        self.update(initial or {})
        self.changed.clear()

    @property
    def resident(self) -> int:
        """Bytes of what is kept in this process."""
        return self._bytes

    def get(self, client: int) -> Payload | None:
        """What the client remembers; None for one that has never been here."""
        number = self._number.get(client)
        if number is None:
            return None
        if number in self._here:
            self._here.move_to_end(number)
            return self._here[number][0]
        from fedsim.checkpoint import unpack  # which knows this class

        memory: Payload = unpack(self._path(number), {})
        self._keep(number, memory)
        return memory

    def update(self, new: Mapping[int, Payload]) -> None:
        """Keep the new memories of these clients."""
        for client, memory in new.items():
            self._replace(client, self._take(memory))

    @contextmanager
    def together(self) -> Iterator[Callable[[Mapping[int, Payload]], None]]:
        """All updates made by what this gives, when the block ends, or none of them if it raises."""
        waiting: dict[int, int] = {}

        def update(new: Mapping[int, Payload]) -> None:
            for client, memory in new.items():
                if client in waiting:
                    self._drop(waiting[client])
                waiting[client] = self._take(memory)

        try:
            yield update
        except BaseException:
            for number in waiting.values():
                self._drop(number)
            raise
        for client, number in waiting.items():
            self._replace(client, number)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._number))

    def __len__(self) -> int:
        return len(self._number)

    def _take(self, memory: Payload) -> int:
        number, self._next = self._next, self._next + 1
        self._keep(number, memory)
        return number

    def _replace(self, client: int, number: int) -> None:
        if client in self._number:
            self._drop(self._number[client])
        self._number[client] = number
        self.changed.add(client)

    def _keep(self, number: int, memory: Payload) -> None:
        """Hold a memory here; others go until the bound is met."""
        size = _bytes(memory) + ENTRY
        self._here[number] = memory, size
        self._bytes += size
        while self._bytes > self._limit and len(self._here) > 1:
            oldest, (gone, freed) = self._here.popitem(last=False)
            self._bytes -= freed
            if oldest not in self._filed:
                from fedsim.checkpoint import pack

                path = self._path(oldest)
                try:
                    path.write_bytes(pack(gone))
                except OSError as e:
                    raise FedsimError(f"what clients remember cannot be written to {path.parent}: {e.strerror}") from e
                self._filed.add(oldest)

    def _drop(self, number: int) -> None:
        if number in self._here:
            self._bytes -= self._here.pop(number)[1]
        if number in self._filed:
            self._filed.remove(number)
            self._path(number).unlink()

    def _path(self, number: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedsim-memory-"))
            weakref.finalize(self, shutil.rmtree, self._folder, True)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{number}.safetensors"


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(value: Any) -> int:
    """Bytes of the tensors inside a value."""
    return sum(t.numel() * t.element_size() for t in _tensors(value))
