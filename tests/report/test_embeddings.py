"""Embeddings of clients with like data move alike; the picture, and when there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import config
from fedsim.report import embeddings
from fedsim.run import run

TABLES: dict[str, Any] = {
    "name": "embeddings",
    "seed": 1,
    "rounds": 2,
    "data": {"name": "digits", "partition": {"name": "dominant_groups", "clients": 10, "size": 60}},
    "task": {"model": "mlp", "hidden": [24]},
    "strategy": {"name": "hyperfl", "cohort": 10, "hidden": 32, "embedding": 16, "batch_size": 20},
}


def test_separation_by_hand() -> None:
    moves = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    groups = torch.tensor([0, 0, 1, 1])
    assert embeddings.separation(moves, groups) == pytest.approx(1 / 10)
    assert embeddings.separation(moves, torch.tensor([0, 1, 0, 1])) == pytest.approx(10 / 5.5)  # 1, 11, 9, 1


def test_moves_are_from_the_clients_own_draws(tmp_path: Path) -> None:
    e = config.parse(TABLES)
    run(e, tmp_path / "run")
    moved = embeddings.read(e, tmp_path / "run")
    assert moved is not None and moved.clients == list(range(10))
    assert moved.names == ["0, 1, 2", "0, 8, 9", "2, 3, 4", "4, 5, 6", "6, 7, 8"]
    assert moved.groups.tolist() == [0, 2, 3, 4, 1] * 2
    assert 0 < float(moved.moves.norm(dim=1).max()) < 1  # the draws themselves have norm 4
    embeddings.draw(e, tmp_path / "run")
    assert "Moves of the clients" in (tmp_path / "run" / "embeddings.svg").read_text()


def test_no_embeddings_no_picture(tmp_path: Path) -> None:
    e = config.parse(TABLES | {"strategy": {"name": "fedper", "cohort": 10}})
    run(e, tmp_path / "run")
    embeddings.draw(e, tmp_path / "run")
    assert not (tmp_path / "run" / "embeddings.svg").exists()


@pytest.mark.slow
def test_clients_of_one_group_move_alike(tmp_path: Path) -> None:
    """Within groups embeddings' moves are closer than between: about 0.96, a trend and not a cluster."""
    e = config.parse(TABLES | {"rounds": 40})
    run(e, tmp_path / "run")
    moved = embeddings.read(e, tmp_path / "run")
    assert moved is not None
    assert embeddings.separation(moved.moves, moved.groups) < 1
