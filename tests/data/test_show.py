"""The picture and the table of a partition."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import registry
from fedsim.config import DataConfig
from fedsim.data import federation, show
from fedsim.data.dataset import Dataset, Federation, Split
from fedsim.errors import ConfigError
from fedsim.rng import Key


def digits(partition: dict[str, Any], holdout: float = 0.0) -> Federation:
    plugin = registry.load("partitioners", partition["name"])
    config = DataConfig(
        dataset=registry.load("datasets", "digits").Config(), partition=plugin.Config(**partition), holdout=holdout
    )
    return federation(config, 0)


def test_summary_counts_every_example() -> None:
    f = digits({"name": "dirichlet", "clients": 20}, holdout=0.1)
    rows = show.summary(f)
    assert [row.client for row in rows] == list(range(20))
    assert sum(row.examples + row.holdout for row in rows) == 1437 and all(row.holdout for row in rows)
    assert all(row.labels.sum() == row.examples for row in rows)
    y = f.dataset.train.y.numpy()
    assert np.array_equal(rows[3].labels, np.bincount(y[f.indices(3, "train")], minlength=10))


def test_summary_of_many_spans_the_sizes() -> None:
    f = digits({"name": "size", "partition_sizes": [*range(2, 51), 1]})
    sizes = [row.examples for row in show.summary(f, limit=7)]
    assert len(sizes) == 7 and sizes == sorted(sizes)
    assert sizes[0] == 1 and sizes[-1] == 50


def test_lines_say_what_is_shown() -> None:
    all_of_them = show.lines(digits({"name": "iid", "clients": 3}, holdout=0.1))
    assert all_of_them[0] == "digits: 3 clients"
    assert all_of_them[1].split() == ["client", "examples", "holdout", "labels", "(label:examples)"]
    client, examples, holdout, *labels = all_of_them[2].split()
    assert (client, examples, holdout) == ("0", "431", "48")
    assert [label.partition(":")[0] for label in labels] == list("0123456789")
    assert sum(int(label.partition(":")[2]) for label in labels) == 431
    many = show.lines(digits({"name": "iid", "clients": 100}))
    assert many[0] == "digits: 100 clients; 60 of them, from the smallest to the largest" and len(many) == 62
    assert "holdout" not in many[1]
    lazy = show.lines(digits({"name": "sampled", "clients": 10**6, "size": 5}))
    assert lazy[0] == "digits: 1,000,000 clients; 60 of them, from the smallest to the largest of 2,000"


def test_lines_of_owners_and_many_labels() -> None:
    labels = torch.cat([torch.arange(20), torch.full((5,), 3), torch.full((3,), 17)])
    split = Split(torch.zeros(28, 1), labels, np.repeat(["ann", "bob"], [27, 1]))
    f = Federation(Dataset("mine", split, split, 20), [np.arange(27), [27]], 0.0, Key.root(0))
    assert show.lines(f)[1].split()[:3] == ["client", "owner", "examples"]
    assert show.lines(f)[2:] == [
        "0       ann    27        0:1 1:1 2:1 3:6 4:1 5:1 6:1 7:1 8:1 17:3 and 10 others",
        "1       bob    1         17:1",
    ]


def test_picture(tmp_path: Path) -> None:
    f = digits({"name": "sampled", "clients": 10**6, "size": 5, "alpha": 0.1})
    svg = show.draw(f, tmp_path / "partition.svg")
    assert (tmp_path / "partition.svg").read_text() == svg == show.draw(f)
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg") and svg.startswith("<svg")
    text = " ".join(e.text or "" for e in root.iter() if e.tag.endswith("text"))
    assert "digits: 1,000,000 clients" in text and "60 of 1,000,000" in text
    assert all(colour.lower() in svg for colour in show.COLOURS)
    with pytest.raises(ConfigError, match="cannot be written"):
        show.draw(f, tmp_path / "no" / "partition.svg")


@pytest.mark.parametrize("clients", [1, 2, 60, 61])
def test_picture_of_any_number(clients: int) -> None:
    assert show.draw(digits({"name": "iid", "clients": clients})).rstrip().endswith("</svg>")
