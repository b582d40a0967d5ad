"""What clients remember between visits. It belongs to the engine: a strategy's server half never sees it."""

from collections.abc import Iterator, Mapping

from fedsim.types import Payload


class Memory:
    """Clients' memories by client number, with the set that changed since the last checkpoint."""

    def __init__(self, initial: Mapping[int, Payload] | None = None) -> None:
        self._of: dict[int, Payload] = dict(initial or {})
        self.changed: set[int] = set()

    def get(self, client: int) -> Payload | None:
        return self._of.get(client)

    def update(self, new: Mapping[int, Payload]) -> None:
        """Keep the new memories of these clients."""
        self._of |= new
        self.changed |= new.keys()

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._of))

    def __len__(self) -> int:
        return len(self._of)
