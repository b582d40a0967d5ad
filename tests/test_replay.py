"""Recorded steps: when one recording serves, when another is made, and what is done where there can be none."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim import replay
from fedsim.replay import Again, Cuda, described, recording
from runs import has_gpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    replay._KEPT.clear()
    yield
    replay._KEPT.clear()


class Counting(Again):
    """Counts what is recorded."""

    made = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.made += 1
        return super().record(run)


def advance(carry: dict[str, Tensor], by: Tensor) -> dict[str, Tensor]:
    return {"n": carry["n"] + by}


def inputs(n: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return {"n": torch.zeros(n, dtype=dtype)}, torch.ones(n, dtype=dtype)


def test_a_step_plays_at_fixed_places() -> None:
    given = inputs()
    made = recording(Again(), "step", advance, given, CPU)
    assert made is not None and given[0]["n"].tolist() == [0, 0]
    made.put(*given)
    place = made.carry["n"].data_ptr()
    for n in (1, 2, 3):
        made.play()
        assert made.carry["n"].tolist() == [n, n] and made.carry["n"].data_ptr() == place
    made.put(torch.tensor([10.0, 20.0]), first=1)
    made.play()
    assert made.carry["n"].tolist() == [13, 23]


def test_one_recording_for_equal_shapes() -> None:
    recorder = Counting()
    first = recording(recorder, "step", advance, inputs(), CPU)
    assert recording(recorder, "step", advance, inputs(), CPU) is first and recorder.made == 1
    for of, given in (("other", inputs()), ("step", inputs(3)), ("step", inputs(2, torch.float64))):
        assert recording(recorder, of, advance, given, CPU) is not first
    assert recorder.made == 4
    for i in range(replay.KEPT):
        recording(recorder, i, advance, inputs(), CPU)
    assert len(replay._KEPT) == replay.KEPT and recording(recorder, "step", advance, inputs(), CPU) is not first


def test_what_lies_on_the_host_is_part_of_a_recording() -> None:
    """A step may read it there, and a recording would go on with what it read."""
    one, two = torch.tensor(1), torch.tensor(2)
    gpu = torch.device("cuda")
    assert described(({}, one), gpu) == described(({}, one.clone()), gpu) != described(({}, two), gpu)
    assert described(({}, one), CPU) == described(({}, two), CPU)


def test_what_cannot_be_recorded_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def record(self, run: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING, logger="fedsim"):
        for _ in range(2):
            assert recording(Broken(), "step", advance, inputs(), CPU) is None
    (said,) = caplog.messages
    assert said == (
        "steps cannot be recorded, and are taken from Python:"
        " RuntimeError: operation not permitted when stream is capturing"
    )


def test_no_memory_is_another_matter() -> None:
    class Full:
        def record(self, run: Callable[[], None]) -> Callable[[], None]:
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        recording(Full(), "step", advance, inputs(), CPU)


@pytest.mark.skipif(not has_gpu(), reason="needs a GPU")
def test_a_graph_is_the_function() -> None:
    gpu = torch.device("cuda")
    given = ({"n": torch.zeros(2, device=gpu)}, torch.ones(2, device=gpu))
    made = recording(Cuda(), "step", advance, given, gpu)
    assert made is not None
    made.put(*given)
    for _ in range(3):
        made.play()
    assert made.carry["n"].tolist() == [3, 3]
