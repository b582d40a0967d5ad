"""`fashion_mnist`: 60,000 + 10,000 pictures of clothes, 28×28 pixels (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747).

Source: the Debian package dataset-fashion-mnist (Expat). Labels: T-shirt, trouser, pullover, dress, coat, sandal,
shirt, sneaker, bag, ankle boot. ``x`` float32 (N, 1, 28, 28) in [0, 1], ``y`` int64 (N,), 10 classes; the original
test set.
"""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Literal

from fedsim.config import DatasetConfig
from fedsim.data import fetch, idx
from fedsim.data.dataset import Dataset
from fedsim.errors import DataError

INSIDE = "./usr/share/datasets/fashion-mnist/{}.gz"


class Config(DatasetConfig):
    """No options."""

    name: Literal["fashion_mnist"] = "fashion_mnist"


def contents(deb: bytes, name: str) -> bytes:
    """The tar file of a Debian package's files. Raises ``DataError`` where there is none.

    A .deb is an ``ar`` archive: 8 bytes of magic, then members of a 60-byte header (name 16, …, size 10 at 48) and as
    many bytes, padded to an even number. Read here, since ``dpkg`` is only on Debian.
    """
    at = 8
    while deb[:8] == b"!<arch>\n" and at + 60 <= len(deb):
        header = deb[at : at + 60]
        size = int(header[48:58])
        if header[:16].startswith(b"data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise DataError(f"data.name: fashion_mnist: {name} is not a Debian package")


def convert(archive: Path) -> fetch.Arrays:
    """uint8 arrays ``train_x`` (60000, 28, 28), ``train_y`` (60000,), ``test_x`` and ``test_y``, from the .deb."""
    with tarfile.open(fileobj=io.BytesIO(contents(archive.read_bytes(), archive.name))) as tar:
        arrays = {}
        for key, file in idx.FILES.items():
            member = tar.extractfile(INSIDE.format(file))
            if member is None:
                raise DataError(f"data.name: fashion_mnist: {file} in {archive.name} is not a file")
            arrays[key] = idx.parse(gzip.decompress(member.read()), file)
        return arrays


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where the set was not fetched."""
    return idx.dataset("fashion_mnist", fetch.load("fashion_mnist"))
