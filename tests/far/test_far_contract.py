"""Every registered strategy with its clients on a device of their own (accelerator.py): the numbers of a CPU."""

import logging
from collections.abc import Callable

import pytest
import torch
from accelerator import Machine, accelerator, formed

import runs
from fedsim import check, registry, replay
from fedsim.check import World, play, same, world
from fedsim.tasks import adapters

STRATEGIES = registry.installed("strategies")
# Their steps ask the device for something, and a CUDA graph cannot: they are taken from Python.
ASKS: set[str] = set()


@pytest.fixture(autouse=True)
def without_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters._Sum, "of", formed)


def there(w: World, device: torch.device) -> World:
    return w._replace(federation=w.federation.to(device, torch.float64))


@pytest.mark.parametrize("execution", ["batched", "plain"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_accelerator_changes_no_number(name: str, execution: str) -> None:
    w = world(check.subject(name), execution=execution, block=4)
    near = play(w, 2)
    with accelerator() as device:
        far = play(there(w, device), 2)
        scores = far.session.driver.evaluate(far.states[-1], 2)
    for number, (a, b) in enumerate(zip(near.states, far.states, strict=True)):
        same(a, b, f"here and there after round {number}", 1e-10)
    same(near.memory, far.memory, "here and there, clients' memories", 1e-10)
    same(near.session.driver.evaluate(near.states[-1], 2), scores, "here and there, evaluated", 1e-10)


@pytest.mark.parametrize("name", STRATEGIES)
def test_messages_from_an_accelerator(name: str) -> None:
    w = world(check.subject(name), execution="batched", block=4, paths="messages")
    near = play(w, 1)
    with accelerator() as device:
        far = play(there(w, device), 1)
    same(near.states[-1], far.states[-1], "here and there by messages", 1e-10)


class Capture:
    """Runs as a CUDA graph would record them: a step that asks the device for anything cannot be."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        for _ in range(replay.WARM):
            run()
        self.play(run)
        return lambda: self.play(run)

    def play(self, run: Callable[[], None]) -> None:
        Machine.strict = True
        try:
            run()
        finally:
            Machine.strict = False


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_can_be_recorded(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    w = world(check.subject(name), execution="batched", block=4)
    near = play(w, 2)
    stacked = runs.recording(monkeypatch, Capture())
    replay._KEPT.clear()
    with accelerator() as device, caplog.at_level(logging.WARNING, logger="fedsim"):
        far = play(there(w, device), 2)
    replay._KEPT.clear()
    if not any(stacked):
        pytest.skip("its clients run one by one")
    said = [message for message in caplog.messages if "cannot be recorded" in message]
    assert (name in ASKS) == bool(said), said
    same(near.states[-1], far.states[-1], "recorded there and stacked here", 1e-10)
