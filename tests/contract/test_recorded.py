"""Every registered strategy by recorded steps, as a GPU would take them: the numbers of a block."""

import pytest

import runs
from fedsim import check, registry
from fedsim.check import play, same, world
from fedsim.replay import Again


@pytest.mark.parametrize("name", registry.installed("strategies"))
def test_a_recorded_step_is_the_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = check.subject(name)
    plain = play(world(of, dtype="float64", execution="batched", block=4), 4)
    recorded = runs.recording(monkeypatch, Again())
    played = play(world(of, dtype="float64", execution="batched", block=4), 4)
    if not any(recorded):
        pytest.skip("its clients run one by one")
    for number, (a, b) in enumerate(zip(plain.states, played.states, strict=True)):
        same(a, b, f"recorded and stacked after round {number}", 1e-10)
    same(plain.memory, played.memory, "recorded and stacked, clients' memories", 1e-10)
