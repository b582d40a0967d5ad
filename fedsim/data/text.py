"""Texts as data sets: how they are kept, and what a model gets of them.

A model's own tokenizer makes ``x`` int64 (N, length), cut or padded at the end; with ``encoding = "tfidf"``, for linear
models, ``x`` is float32 (N, features). ``tokenizer`` names a fetched model (``minilm``) or a folder with a
``tokenizer.json``. Needs the extra [text]; nothing is downloaded.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim.config import DatasetConfig
from fedsim.data import fetch, pretrained
from fedsim.data.dataset import Dataset, Split
from fedsim.errors import DataError
from fedsim.rng import Key

CHARACTERS = 40  # of a text that are read for each token that is kept


class TextConfig(DatasetConfig):
    """What every text data set is told."""

    tokenizer: str = Field("minilm", description="a fetched model, or a folder with a tokenizer.json")
    length: int = Field(64, ge=2, le=8192, description="tokens of an example")
    encoding: Literal["tokens", "tfidf"] = "tokens"
    test: int | None = Field(
        None, ge=1, description="at most so many test texts, chosen by a fixed draw; all if absent"
    )
    features: int = Field(5000, ge=1, le=100_000, description="columns, for encoding 'tfidf'")


def pack(texts: Sequence[str]) -> fetch.Arrays:
    """``text`` uint8, all in UTF-8 one after the other, and where each begins, ``bounds`` (n + 1,)."""
    encoded = [t.encode("utf-8", "replace") for t in texts]
    return {
        "text": np.frombuffer(b"".join(encoded), np.uint8),
        "bounds": np.cumsum([0, *map(len, encoded)]),
    }


def unpack(arrays: fetch.Arrays, part: str) -> list[str]:
    """The texts of ``{part}_text`` and ``{part}_bounds``."""
    data, bounds = arrays[f"{part}_text"].tobytes(), arrays[f"{part}_bounds"].tolist()
    return [data[a:b].decode("utf-8") for a, b in pairwise(bounds)]


def part(name: str, texts: Sequence[str], labels: Sequence[str]) -> fetch.Arrays:
    """Arrays of one part ("train", "test") of a set: its texts and its labels."""
    return {f"{name}_{key}": x for key, x in pack(texts).items()} | {f"{name}_label": np.array(labels)}


def load(name: str, config: TextConfig) -> Dataset:
    """A fetched set, encoded. Labels are numbered in the order of their names. Raises ``DataError``."""
    arrays = fetch.load(name)
    names = np.unique(arrays["train_label"])
    texts = {p: unpack(arrays, p) for p in ("train", "test")}
    label = {p: np.searchsorted(names, arrays[f"{p}_label"]) for p in texts}
    if config.test is not None and config.test < len(texts["test"]):
        chosen = np.sort(Key.root(0).at(name, "test").numpy().permutation(len(texts["test"]))[: config.test])
        texts["test"], label["test"] = [texts["test"][i] for i in chosen], label["test"][chosen]
    if config.encoding == "tfidf":
        x = dict(zip(texts, _tfidf(texts["train"], texts["test"], config.features)))
    else:
        x = {p: tokens(t, config.tokenizer, config.length) for p, t in texts.items()}

    def split(p: str) -> Split:
        return Split(x[p], torch.from_numpy(label[p]))

    return Dataset(name, split("train"), split("test"), len(names))


def tokens(texts: Sequence[str], tokenizer: str, length: int) -> Tensor:
    """Token numbers, int64 (N, length). Raises ``DataError``: no such tokenizer, or the extra [text] is missing."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError("data.tokenizer: needs the extra [text]: pip install 'fedsim-engine[text]'") from None
    file = pretrained.folder(tokenizer, "data.tokenizer") / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"data.tokenizer: {file.parent} has no tokenizer.json")
    own = Tokenizer.from_file(str(file))
    own.enable_truncation(length)
    own.enable_padding(length=length, pad_id=pretrained.pad(file.parent))
    # The end of a long text would be read and thrown away. Tokens have about five characters, and are never this long.
    encoded = own.encode_batch([t[: CHARACTERS * length] for t in texts])
    return torch.tensor([e.ids for e in encoded], dtype=torch.int64)


def _tfidf(train: Sequence[str], test: Sequence[str], features: int) -> tuple[Tensor, Tensor]:
    """Weights of the most frequent words of the training texts; their frequencies are those of all clients together."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(max_features=features, sublinear_tf=True, dtype=np.float32)
    return torch.from_numpy(words.fit_transform(train).toarray()), torch.from_numpy(words.transform(test).toarray())


def key(text: str) -> bytes:
    """What two texts have in common when they are the same text."""
    return hashlib.blake2b(" ".join(text.split()).lower().encode()).digest()
