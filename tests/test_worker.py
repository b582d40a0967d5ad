"""What a worker makes of a run of positions: reports folded, memories kept on its side, failures with names."""

import re
import weakref
from typing import Any

import pytest
import torch
import worlds

from fedsim import block, worker
from fedsim.block import Guest, Work
from fedsim.errors import FedsimError
from fedsim.fold import Fold
from fedsim.rng import Key
from fedsim.types import Batch, Done, Local, Pass, Payload, Reducer, Report, Schedule, Visit
from server.reduce import collect, weighted_mean

KEY = Key.root(5)
SIZES = (4, 1, 3, 2, 5)
WORLD = worlds.points([[[float(10 * k + i)] for i in range(n)] for k, n in enumerate(SIZES)])
SHARED: Payload = {"params": {"w": torch.zeros(1, dtype=torch.float64)}}


def summing(trouble: Any = None, unbatchable: str | None = "it asks for numbers") -> Local:
    """Sends the sum of a client's points, remembers it; ``trouble(sum) -> Done | None`` may do something else."""

    def init(shared: Payload, memory: Payload, visit: Visit) -> torch.Tensor:
        return shared["params"]["w"].sum() * 0

    def step(shared: Payload, total: torch.Tensor, batch: Batch, draw: None) -> torch.Tensor:
        weight = 1 if batch.weight is None else batch.weight
        return total + (weight * batch.x[:, 0]).sum()

    def final(shared: Payload, total: torch.Tensor) -> Done:
        done = Done({"sum": {"s": total}}, {"own": {"s": total}}, {"loss": total})
        return (trouble(total) or done) if trouble else done

    return Local(init, (Pass(step, Schedule(2)),), final, unbatchable=unbatchable)


def go(local: Local, reduce: Reducer[Any, Any] | None = None, batched: bool = False, clients: Any = range(5)) -> Any:
    work = Work(2, 0, local, SHARED, KEY)
    return worker.run(work, WORLD, [Guest(c, None) for c in clients], 0, len(clients), reduce or collect(), batched)


def folded(part: worker.Partial, n: int, reduce: Reducer[Any, Any]) -> Any:
    fold: Fold[Any] = Fold(n, reduce.merge)
    for node in part.nodes:
        fold.add(node)
    return reduce.finish(fold.result())


TOTALS = [sum(10.0 * k + i for i in range(n)) for k, n in enumerate(SIZES)]


@pytest.mark.parametrize("batched", [False, True])
def test_reports(batched: bool) -> None:
    part = go(summing(unbatchable=None), batched=batched)
    reports: tuple[Report, ...] = folded(part, 5, collect())
    assert [(r.client, r.examples, float(r.value["sum"]["s"]), r.metrics["loss"]) for r in reports] == [
        (k, n, TOTALS[k], TOTALS[k]) for k, n in enumerate(SIZES)
    ]
    assert {c: float(m["own"]["s"]) for c, m in part.memory.items()} == dict(enumerate(TOTALS))
    assert (part.clients, part.examples, part.bytes_up, part.failures) == (5, sum(SIZES), 5 * 8, ())


def test_the_mean_by_hand() -> None:
    mean = folded(go(summing(), weighted_mean()), 5, weighted_mean())
    assert float(mean.value["sum"]["s"]) == pytest.approx(sum(n * t for n, t in zip(SIZES, TOTALS, strict=True)) / 15)
    uniform = folded(go(summing(), weighted_mean("uniform")), 5, weighted_mean("uniform"))
    assert float(uniform.value["sum"]["s"]) == pytest.approx(sum(TOTALS) / 5)
    # Metrics are weighted by examples either way.
    assert uniform.metrics["loss"] == mean.metrics["loss"]


def raises(total: torch.Tensor) -> None:
    if float(total) == TOTALS[2]:
        raise ValueError("first line\nsecond line")


def nan_sent(total: torch.Tensor) -> Done | None:
    bad = total * float("nan")
    return Done({"sum": {"s": bad}}, {"own": {"s": total}}, {}) if float(total) == TOTALS[2] else None


def nan_kept(total: torch.Tensor) -> Done | None:
    bad = total * float("inf")
    return Done({"sum": {"s": total}}, {"own": {"s": bad}}, {"loss": total}) if float(total) == TOTALS[2] else None


def nan_measured(total: torch.Tensor) -> Done | None:
    bad = total * float("nan")
    return Done({"sum": {"s": total}}, {}, {"loss": bad}) if float(total) == TOTALS[2] else None


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (raises, "ValueError: first line (test_worker.py:LINE)"),
        (nan_sent, "NaN or Inf in its update (sum: s)"),
        (nan_kept, "NaN or Inf in its memory (own: s)"),
        (nan_measured, "loss is nan"),
    ],
)
def test_failures(trouble: Any, reason: str) -> None:
    """One client is out, with its number and one line; the others count, and it leaves no memory."""
    part = go(summing(trouble))
    assert [(f.client, re.sub(r"py:\d+", "py:LINE", f.reason)) for f in part.failures] == [(2, reason)]
    assert sorted(part.memory) == [0, 1, 3, 4]
    assert (part.clients, part.examples, part.bytes_up) == (4, sum(SIZES) - SIZES[2], 4 * 8)
    assert [r.client for r in folded(part, 5, collect())] == [0, 1, 3, 4]


def test_a_block_that_fails_finds_who_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """A block fails as a whole; it is then run one by one, and that is said."""
    part = go(summing(raises, unbatchable=None), batched=True)
    assert [f.client for f in part.failures] == [2]
    assert part.failures[0].reason.startswith("ValueError: first line (test_worker.py:")
    assert "block of 5 clients failed" in caplog.text and "one by one" in caplog.text


def test_the_servers_screen() -> None:
    """A reducer may refuse a report; the client is then a failure like any other."""
    mean = weighted_mean()

    def screen(shared: Payload, report: Report) -> Report:
        if report.client == 3:
            raise ValueError("norm 31 is above 30")
        return report

    part = go(summing(), mean._replace(screen=screen))
    assert part.failures == (worker.Failure(3, "norm 31 is above 30"),)
    assert 3 not in part.memory


def test_nobody_is_left() -> None:
    def all_fail(total: torch.Tensor) -> None:
        raise RuntimeError("all")

    part = go(summing(all_fail), weighted_mean())
    assert len(part.failures) == 5 and part.clients == 0
    assert folded(part, 5, weighted_mean()) is None


def test_what_a_client_sends_is_not_summed_in_place() -> None:
    """The fold adds in place, and a client's memory may be the very tensor that it has sent."""
    shared_tensor: list[torch.Tensor] = []

    def both(total: torch.Tensor) -> Done:
        shared_tensor.append(total)
        return Done({"sum": {"s": total}}, {"own": {"s": total}}, {})

    part = go(summing(both), weighted_mean())
    folded(part, 5, weighted_mean())
    assert [float(x) for x in shared_tensor] == TOTALS
    assert [float(part.memory[c]["own"]["s"]) for c in range(5)] == TOTALS


def test_a_block_that_does_not_fit_is_run_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would say it: no memory for more than two clients, in a block of five."""
    stacked, sizes, attempts = block.stacked, [], []

    def small(work: Work, federation: Any, guests: Any, recorder: Any) -> Any:
        sizes.append(len(guests))
        assert not any(attempt() for attempt in attempts), "what failed still holds its memory"
        held = torch.zeros(1)
        attempts.append(weakref.ref(held))
        if len(guests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stacked(work, federation, guests, recorder)

    whole = go(summing(unbatchable=None), weighted_mean(), batched=True)
    monkeypatch.setattr(block, "stacked", small)
    parts = go(summing(unbatchable=None), weighted_mean(), batched=True)
    assert sizes == [5, 4, 2, 2]  # and the fifth on its own
    assert parts.memory.keys() == whole.memory.keys() and parts.examples == whole.examples == sum(SIZES)
    expected, found = (folded(p, 5, weighted_mean()) for p in (whole, parts))
    assert torch.equal(found[0]["sum"]["s"], expected[0]["sum"]["s"])


def test_one_client_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(block, "stacked", full)
    monkeypatch.setattr(block, "one", full)
    part = go(summing(unbatchable=None), batched=True)
    assert [f.client for f in part.failures] == list(range(5))
    assert all("OutOfMemoryError" in f.reason for f in part.failures)


def test_a_broadcast_that_clients_change_is_refused() -> None:
    """The next client would start from what the last one made of it, and results would depend on their order."""

    def init(shared: Payload, memory: Payload, visit: Visit) -> torch.Tensor:
        return shared["params"]["w"].mul_(0).sum()

    for batched in (False, True):
        with pytest.raises(FedsimError, match=r"change their broadcast in place \(w\)"):
            go(summing(unbatchable=None)._replace(init=init), batched=batched)


def test_complex_numbers_are_refused() -> None:
    """A mean in float64 would keep their real parts without a word."""
    part = go(summing(lambda total: Done({"sum": {"s": total * 1j}}, {}, {})))
    assert len(part.failures) == 5 and "complex numbers in its update (sum)" in part.failures[0].reason
