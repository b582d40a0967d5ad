"""`reuters`: Reuters-21578 R8, 5,485 + 2,189 news wires of eight topics, half of them "earn".

Source: as `newsgroups`, in the same archive. ``x`` as ``fedsim.data.text`` says, ``y`` int64 (N,), 8 classes.
"""

from pathlib import Path
from typing import Literal

from fedsim.data import fetch, newsgroups, text
from fedsim.data.dataset import Dataset


class Config(text.TextConfig):
    """How texts are encoded."""

    name: Literal["reuters"] = "reuters"


def convert(archive: Path) -> fetch.Arrays:
    """``{train,test}_{text,bounds,label}``."""
    return newsgroups.tables(archive, "reuters-r8")


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where the set was not fetched."""
    return text.load("reuters", config)
