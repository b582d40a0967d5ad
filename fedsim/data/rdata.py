"""Reading the data sets of an R package (a pair of files ``Rdata.rdx`` and ``Rdata.rdb``), without R.

R's serialisation, as "R Internals" section 1.8 documents it: big-endian words, each item with a word of flags (type in
the low 8 bits, 0x200: has attributes, 0x400: has a tag). Vectors of numbers and strings, lists, and what these need are
read; anything that could carry code (closures, environments, calls) is refused.
"""

import lzma
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

NIL, PAIRS = 254, 2


class Value(NamedTuple):
    """An R vector or list: its elements, and its attributes by name."""

    items: Any
    attributes: dict[str, Any]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._references: list[Any] = []

    def word(self) -> int:
        self._at += 4
        return int(struct.unpack_from(">i", self._data, self._at - 4)[0])

    def take(self, n: int) -> bytes:
        self._at += n
        return self._data[self._at - n : self._at]

    def header(self) -> None:
        if self.take(2) != b"X\n":
            raise ValueError("not R's binary serialisation")
        version, _, _ = self.word(), self.word(), self.word()
        if version == 3:
            self.take(self.word())  # the name of the native encoding

    def item(self) -> Any:
        flags = self.word()
        kind, attributed, tagged = flags & 0xFF, flags & 0x200, flags & 0x400
        match kind:
            case 254:  # nil
                return None
            case 255:  # something that was read before
                return self._references[(flags >> 8 or self.word()) - 1]
            case 1:  # a symbol
                self._references.append(self.item())
                return self._references[-1]
            case 2:  # a pairlist
                return self._pairs(attributed, tagged)
            case 9:  # a string's characters
                n = self.word()
                return None if n == -1 else self.take(n).decode("utf-8", "replace")
            case 10 | 13:  # logicals, integers
                items: Any = np.frombuffer(self.take(4 * self.word()), ">i4")
            case 14:  # numbers
                items = np.frombuffer(self.take(8 * self.word()), ">f8")
            case 16 | 19:  # strings, a list
                items = [self.item() for _ in range(self.word())]
            case 238:  # a vector in a form of its own
                return self._alternative()
            case _:
                raise ValueError(f"R type {kind} is not read")
        return Value(items, self.item() if attributed else {})

    def _pairs(self, attributed: int, tagged: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        while True:
            if attributed:
                self.item()
            name = self.item() if tagged else str(len(out))
            out[name] = self.item()
            flags = self.word()
            if flags & 0xFF == NIL:
                return out
            if flags & 0xFF != PAIRS:
                raise ValueError("a pairlist that ends in something else")
            attributed, tagged = flags & 0x200, flags & 0x400

    def _alternative(self) -> Any:
        """A compact sequence (n, first, step), or a vector with something wrapped around it."""
        about, state = self.item(), self.item()
        self.item()
        if about["0"] == "compact_intseq":
            n, first, step = state.items
            return Value(first + step * np.arange(n), {})
        return state if isinstance(state, Value) and not isinstance(state.items, list) else state.items[0]


def parse(data: bytes) -> Any:
    """The value in R's binary serialisation. Raises ``ValueError`` for what it does not know."""
    reader = _Reader(data)
    reader.header()
    return reader.item()


def _inflated(chunk: bytes) -> bytes:
    """A record of an ``.rdb`` file: its length, then zlib data, or a letter and data of that kind."""
    if chunk[4:5] == b"Z":
        return lzma.decompress(chunk[5:], lzma.FORMAT_RAW, None, [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26}])
    return zlib.decompress(chunk[4:])


def frame(rdx: bytes, rdb: bytes, name: str) -> dict[str, Any]:
    """A data frame's columns by name: arrays, lists of strings, and factors as lists of their labels."""
    index = parse(zlib.decompress(rdx, 31))
    variables = dict(zip(index.attributes["names"].items, index.items))["variables"]
    places = dict(zip(variables.attributes["names"].items, variables.items))
    start, length = places[name].items.tolist()
    data = parse(_inflated(rdb[start : start + length]))
    columns = {}
    for column, value in zip(data.attributes["names"].items, data.items):
        levels = value.attributes.get("levels")
        columns[column] = [levels.items[i - 1] for i in value.items] if levels else value.items
    return columns
