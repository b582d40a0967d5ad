"""The IDX format of MNIST and of the sets made to replace it: a magic number, the sizes, then the bytes."""

import math

import numpy as np
import numpy.typing as npt
import torch

from fedsim.data.dataset import Dataset, Split
from fedsim.data.fetch import Arrays
from fedsim.errors import DataError

Bytes = npt.NDArray[np.uint8]

# The key of each array and the file that it is in, the same for MNIST and Fashion-MNIST.
FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}


def parse(data: bytes, name: str) -> Bytes:
    """The array in an IDX file of unsigned bytes. Raises ``DataError`` for anything else."""
    # Magic: two zeros, 8 for unsigned bytes, and the number of dimensions; then each size as a big-endian uint32.
    dims = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    if dims and len(data) >= 4 + 4 * dims:
        sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
        if len(data) == 4 + 4 * dims + math.prod(sizes):
            return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(sizes)
    raise DataError(f"data.name: {name} is not an IDX file of bytes, or is cut short")


def dataset(name: str, arrays: Arrays) -> Dataset:
    """Images as float32 (N, 1, 28, 28) in [0, 1], labels as int64 (N,), 10 classes."""

    def split(part: str) -> Split:
        x = torch.from_numpy(arrays[f"{part}_x"]).float().div_(255).unsqueeze(1)
        return Split(x, torch.from_numpy(arrays[f"{part}_y"]).long())

    return Dataset(name, split("train"), split("test"), classes=10)
