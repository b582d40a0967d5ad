"""`fine_foods`: is an Amazon review of food "great" (five stars) or "other"? About two in three are.

Source: the data frames training_data (4,000) and testing_data (1,000) of the R package modeldata (MIT), in the Debian
package r-cran-modeldata 1.1.0-1. Seven reviews are in both parts and some are repeated: of the training part, what is
in the test part or was there before is left out, which leaves 3,972. ``x`` as ``fedsim.data.text`` says, ``y`` int64
(N,): 0 great, 1 other.
"""

import io
import tarfile
from pathlib import Path
from typing import Literal

from fedsim.data import fetch, rdata, text
from fedsim.data.dataset import Dataset
from fedsim.data.fashion_mnist import contents
from fedsim.errors import DataError

INSIDE = "./usr/lib/R/site-library/modeldata/data/Rdata"


class Config(text.TextConfig):
    """How texts are encoded."""

    name: Literal["fine_foods"] = "fine_foods"


def convert(archive: Path) -> fetch.Arrays:
    """``{train,test}_{text,bounds,label}``."""
    with tarfile.open(fileobj=io.BytesIO(contents(archive.read_bytes(), archive.name))) as tar:
        files = [tar.extractfile(f"{INSIDE}.{end}") for end in ("rdx", "rdb")]
        if None in files:
            raise DataError(f"data.name: fine_foods: {archive.name} has no data in it")
        rdx, rdb = (f.read() for f in files if f)
    train, test = (rdata.frame(rdx, rdb, name) for name in ("training_data", "testing_data"))
    seen = {text.key(review) for review in test["review"]}
    kept = []
    for review, score in zip(train["review"], train["score"]):
        if text.key(review) not in seen:
            seen.add(text.key(review))
            kept.append((review, score))
    reviews, scores = zip(*kept)
    return text.part("train", reviews, scores) | text.part("test", test["review"], test["score"])


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where the set was not fetched."""
    return text.load("fine_foods", config)
