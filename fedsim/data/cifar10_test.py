"""`cifar10_test`: the 10,000 test images of CIFAR-10 (Krizhevsky 2009); the 50,000 training images are in no package.

Source: the task cifar10_classification in the source archive of bigbench 1.0.0 (BIG-bench, Apache-2.0), where they are
lossless PNGs in base64. Read out of the archive, which is neither installed nor run. Labels: airplane, automobile,
bird, cat, deer, dog, frog, horse, ship, truck. ``x`` float32 (N, 3, 32, 32) in [0, 1], ``y`` int64 (N,), 10 classes.

Of each label the first 800 images are the training part and the last 200 the test part, so accuracies are not
comparable with published ones. The file asks that its contents stay out of the training data of language models.
"""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedsim.config import DatasetConfig
from fedsim.data import fetch
from fedsim.data.dataset import Dataset, Split
from fedsim.errors import DataError

INSIDE = "benchmark_tasks/cifar10_classification/base64/task.json"
TRAIN = 800  # of each label


class Config(DatasetConfig):
    """No options."""

    name: Literal["cifar10_test"] = "cifar10_test"


def convert(archive: Path) -> fetch.Arrays:
    """``x`` uint8 (10000, 3, 32, 32) and ``y`` uint8 (10000,), from the source archive."""
    from PIL import Image

    with tarfile.open(archive, "r|gz") as tar:  # as a stream: the task is early in an archive of 358 MB
        for member in tar:
            if member.name.endswith(INSIDE) and (file := tar.extractfile(member)) is not None:
                examples = json.load(file)["examples"]
                break
        else:
            raise DataError(f"data.name: cifar10_test: {archive.name} has no {INSIDE}")
    labels = sorted(examples[0]["target_scores"])
    x, y = np.empty((len(examples), 3, 32, 32), np.uint8), np.empty(len(examples), np.uint8)
    for i, example in enumerate(examples):
        with Image.open(io.BytesIO(base64.b64decode(example["input"]))) as image:
            x[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        scores = example["target_scores"]
        y[i] = labels.index(max(scores, key=scores.get))
    return {"x": x, "y": y}


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where the set was not fetched."""
    arrays = fetch.load("cifar10_test")
    x, y = torch.from_numpy(arrays["x"]).float().div_(255), torch.from_numpy(arrays["y"]).long()
    first = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        first[(y == label).nonzero()[:TRAIN, 0]] = True
    return Dataset("cifar10_test", Split(x[first], y[first]), Split(x[~first], y[~first]), classes=10)
