"""Ray with clients on a device of their own."""

from typing import Any

import pytest
import torch
from accelerator import accelerator

from fedsim import run as running
from fedsim import tree
from fedsim.config import Experiment
from fedsim.grids.place import Placement
from fedsim.run import build
from runs import experiment

ray_grid = pytest.importorskip("fedsim.grids.ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def digest(of: Experiment) -> str:
    session = build(of)
    state = session.driver.begin()
    for number in (1, 2):
        state, _ = session.driver.train(state, number)
    return tree.digest(session.driver.params(state))


def test_on_a_gpu_the_first_block_says_how_many_workers_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs in the driver, whose memory is then looked at; what comes of it counts as if a worker had run it."""
    used, asked, inline = [], [], digest(experiment())
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: used.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 << 30)

    def place(machines: Any, workers: Any, need: int, room: int, of_gpu: int) -> Placement:
        asked.append(of_gpu)
        return Placement(2, 0.0, ["two"])

    monkeypatch.setattr(ray_grid, "place", place)
    with accelerator() as device:
        monkeypatch.setattr(running, "device", lambda name: device)
        session = build(experiment("engine.kind=ray", "engine.workers=auto"))
        try:
            assert session.grid._workers is None  # type: ignore[attr-defined]
            state, _ = session.driver.train(session.driver.begin(), 1)
            assert used == [device] and asked == [(5 << 30) + ray_grid.CONTEXT]
            state, _ = session.driver.train(state, 2)
            assert used == [device] and tree.digest(session.driver.params(state)) == inline
        finally:
            session.close()
