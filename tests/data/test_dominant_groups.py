"""The partition with dominant groups: exact counts, nothing held twice, and what cannot be met."""

import numpy as np
import pytest
import torch

from fedsim.data import dominant_groups
from fedsim.data.dataset import Dataset, Split
from fedsim.errors import DataError
from fedsim.rng import Key

KEY = Key.root(5)


def dataset(classes: int = 10, each: int = 300) -> Dataset:
    y = torch.arange(classes).repeat(each)
    split = Split(torch.zeros(len(y), 1), y)
    return Dataset("even", split, split, classes)


def test_counts_by_hand() -> None:
    """100 examples: 20 over ten labels, 80 over three: 27, 27 and 26 on top."""
    partition = dominant_groups.build(dominant_groups.Config(clients=12, size=100), dataset(), KEY)
    y = dataset().train.y.numpy()
    held = [np.bincount(y[partition[i]], minlength=10).tolist() for i in range(12)]
    assert held[0] == [29, 29, 28, 2, 2, 2, 2, 2, 2, 2]
    assert held[4] == [28, 2, 2, 2, 2, 2, 2, 2, 29, 29]  # the group 8, 9, 0
    assert held[5] == held[0] and held[11] == held[1]
    everyone = np.concatenate([partition[i] for i in range(12)])
    assert len(np.unique(everyone)) == 1200


def test_own_groups_and_no_spread() -> None:
    config = dominant_groups.Config(clients=2, size=10, spread=0.0, groups=[[0], [1, 2]])
    partition = dominant_groups.build(config, dataset(classes=3), KEY)
    y = dataset(classes=3).train.y.numpy()
    assert set(y[partition[0]]) == {0} and np.bincount(y[partition[1]]).tolist() == [0, 5, 5]


def test_the_key_decides() -> None:
    config = dominant_groups.Config(clients=3, size=50)
    a, b, c = (dominant_groups.build(config, dataset(), key)[0].tolist() for key in (KEY, KEY, Key.root(6)))
    assert a == b != c


@pytest.mark.parametrize(
    ("settings", "classes", "message"),
    [
        ({"clients": 20, "size": 600}, 10, "data.partition.size: 20 clients of 600 need 1520 examples of label 0"),
        ({"clients": 1, "size": 5}, 3, "data.partition.groups: missing; even has 3 labels"),
        ({"clients": 1, "size": 5, "groups": [[0, 7]]}, 3, r"has labels 0\.\.2 \(got 7\)"),
    ],
)
def test_what_cannot_be_met(settings: dict[str, object], classes: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dominant_groups.build(dominant_groups.Config.model_validate(settings), dataset(classes), KEY)
