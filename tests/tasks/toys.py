"""Small data sets of every kind of input that the tasks know."""

import torch

from fedsim.data.dataset import Dataset, Split


def dataset(*shape: int, n: int = 6, classes: int = 10) -> Dataset:
    """Floating inputs (n, *shape), labels (n,)."""
    g = torch.Generator().manual_seed(len(shape))
    split = Split(torch.rand(n, *shape, generator=g), torch.arange(n) % classes)
    return Dataset("toy", split, split, classes)


def text(length: int = 7, n: int = 6, vocabulary: int = 11) -> Dataset:
    """Characters (n, length), and the next one of each."""
    tokens = torch.randint(vocabulary, (n, length + 1), generator=torch.Generator().manual_seed(3))
    split = Split(tokens[:, :-1], tokens[:, 1:])
    return Dataset("toy text", split, split, vocabulary)
