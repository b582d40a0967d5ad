"""`digits`: 1,797 handwritten digits of 8×8 pixels, bundled with scikit-learn. Nothing to download.

Source: the test part of UCI "Optical recognition of handwritten digits" (Alpaydin and Kaynak, 1998), CC BY 4.0.
``x`` float32 (N, 1, 8, 8) in [0, 1] (the source has 0..16), ``y`` int64 (N,), 10 classes; 1,437 train, 360 test.
"""

from typing import Literal

import torch

from fedsim.config import DatasetConfig
from fedsim.data.dataset import Dataset, Split
from fedsim.rng import Key

TEST = 360


class Config(DatasetConfig):
    """No options: the split is the same in every experiment, whatever its seed."""

    name: Literal["digits"] = "digits"


def build(config: Config) -> Dataset:
    # scikit-learn takes a second to import; a command that only reads a config should not wait for it.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().div(16).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    order = torch.from_numpy(Key.root(0).at("digits", "split").numpy().permutation(len(y)))
    test, train = order[:TEST].sort().values, order[TEST:].sort().values
    return Dataset("digits", Split(x[train], y[train]), Split(x[test], y[test]), classes=10)
