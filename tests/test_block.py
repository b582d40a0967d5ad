"""The only loop over batches: which batches, in which order, with which draws; one by one and in blocks."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import block
from fedsim.block import Guest, Work, batches
from fedsim.replay import Again
from fedsim.rng import Key
from fedsim.types import Batch, Done, Local, Pass, Payload, Schedule, Visit

KEY = Key.root(5)


# Batches


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 40), st.integers(1, 15), st.integers(1, 4))
def test_epochs(examples: int, size: int, epochs: int) -> None:
    """Each epoch has every example once; batches are full but for the last of an epoch."""
    plan = batches(Schedule(size, epochs), examples, KEY)
    per_epoch = -(-examples // size)
    assert len(plan) == epochs * per_epoch
    for e in range(epochs):
        mine = plan[e * per_epoch : (e + 1) * per_epoch]
        assert sorted(np.concatenate([*mine, np.empty(0, np.int64)]).tolist()) == list(range(examples))
        assert all(len(b) == size for b in mine[:-1])
        assert not mine or len(mine[-1]) == (examples - 1) % size + 1


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(0, 40), st.integers(1, 15), st.integers(1, 30))
def test_steps(examples: int, size: int, steps: int) -> None:
    """So many batches from as many epochs as it takes, which are those of the epochs."""
    plan = batches(Schedule(size, steps=steps), examples, KEY)
    assert len(plan) == (steps if examples else 0)
    longer = batches(Schedule(size, epochs=steps), examples, KEY)
    assert all(np.array_equal(a, b) for a, b in zip(plan, longer, strict=False))


def test_secret_draws_are_of_the_broadcast() -> None:
    """Asked again with another model, a client must not answer with the same noise."""
    local, other = recorder(Schedule(3)), {c: {n: x + 1 for n, x in part.items()} for c, part in SHARED.items()}
    secret = local._replace(secret=True)
    first, again = (block.asked(1, 0, secret, SHARED, KEY).key for _ in range(2))
    assert first == again and len({KEY, first, block.asked(1, 0, secret, other, KEY).key}) == 3
    assert block.asked(1, 0, local, SHARED, KEY).key == KEY


def test_shuffling() -> None:
    plan = batches(Schedule(10, epochs=2), 10, KEY)
    assert not np.array_equal(plan[0], plan[1]), "epochs are shuffled anew"
    assert np.array_equal(plan[0], batches(Schedule(10), 10, KEY)[0])
    assert not np.array_equal(plan[0], batches(Schedule(10), 10, KEY.at("another client"))[0])
    assert [b.tolist() for b in batches(Schedule(2, shuffle=False), 5, KEY)] == [[0, 1], [2, 3], [4]]


def test_poisson_batches() -> None:
    """Each example is in each batch with probability size/n, independently: mean and variance within 4.5 s.e."""
    n, size, steps = 50, 10, 4000
    plan = batches(Schedule(size, steps=steps, sampling="poisson"), n, KEY)
    assert len(plan) == steps
    counts = np.array([len(b) for b in plan])
    q = size / n
    assert abs(counts.mean() - size) < 4.5 * np.sqrt(n * q * (1 - q) / steps)
    assert abs(counts.var() / (n * q * (1 - q)) - 1) < 4.5 * np.sqrt(2 / steps)
    each = np.bincount(np.concatenate(plan), minlength=n) / steps
    assert np.abs(each - q).max() < 5 * np.sqrt(q * (1 - q) / steps)


# A local update that writes down what it sees


class Seen(NamedTuple):
    total: Tensor  # Σ w x over everything seen
    power: Tensor  # tells the order: power ← 2 power + Σ w x of a batch
    noise: Tensor
    steps: Tensor
    visits: Tensor


def recorder(*schedules: Schedule, draws: bool = True) -> Local:
    def init(shared: Payload, memory: Payload, visit: Visit) -> Seen:
        zero = shared["params"]["w"].sum() * 0
        return Seen(zero, zero, zero, zero + visit.steps, memory["count"]["n"] + 1)

    def step(shared: Payload, c: Seen, batch: Batch, draw: Any) -> Seen:
        weight = torch.ones(len(batch.y), dtype=batch.x.dtype) if batch.weight is None else batch.weight
        s = (weight * batch.x[:, 0]).sum()
        return c._replace(total=c.total + s, power=2 * c.power + s, noise=c.noise + draw if draws else c.noise)

    def final(shared: Payload, c: Seen) -> Done:
        value = {"seen": {"total": c.total, "power": c.power, "noise": c.noise, "steps": c.steps}}
        return Done(value, {"count": {"n": c.visits}}, {})

    def remember(shared: Payload, generator: torch.Generator) -> Payload:
        return {"count": {"n": torch.rand((), generator=generator, dtype=torch.float64)}}

    def draw(shared: Payload, generator: torch.Generator) -> Tensor:
        return torch.rand((), generator=generator, dtype=torch.float64)

    return Local(init, tuple(Pass(step, s) for s in schedules), final, remember, draw if draws else None)


SIZES = (1, 7, 4, 2, 12, 5, 8, 3)
WORLD = worlds.points([[[2.0**i + k] for i in range(n)] for k, n in enumerate(SIZES)])
SHARED: Payload = {"params": {"w": torch.zeros(1, dtype=torch.float64)}}


def flat(results: list[tuple[Done, int]]) -> list[dict[str, float]]:
    return [
        {n: float(x) for n, x in done.value["seen"].items()} | {"memory": float(done.memory["count"]["n"]), "n": n}
        for done, n in results
    ]


@pytest.mark.parametrize(
    "schedules",
    [
        (Schedule(3),),
        (Schedule(3, epochs=3),),
        (Schedule(100, epochs=2),),
        (Schedule(1),),
        (Schedule(4, steps=5),),
        (Schedule(3, epochs=2), Schedule(5)),
        (),
    ],
)
def test_a_block_sees_what_each_client_sees(schedules: tuple[Schedule, ...]) -> None:
    """The same examples in the same order with the same draws and the same memory; whole numbers, so exactly."""
    local, guests = recorder(*schedules), [Guest(c, None) for c in range(len(SIZES))]
    work = Work(3, 0, local, SHARED, KEY)
    single = flat([block.one(work, WORLD, g) for g in guests])
    together = flat(block.batched(work, WORLD, guests))
    for a, b in zip(single, together, strict=True):
        assert a == pytest.approx(b, rel=1e-15)
    # In any grouping and order, and what a client does depends on nobody else.
    for group in ([4, 0, 2], [7, 6, 5, 3, 1], [3]):
        some = flat(block.batched(work, WORLD, [guests[i] for i in group]))
        assert some == [pytest.approx(single[i], rel=1e-15) for i in group]
    # By a recorded step too, and by the same one for other clients.
    for _ in range(2):
        played = flat(block.stacked(work, WORLD, guests, Again()).split())
        assert played == [pytest.approx(a, rel=1e-15) for a in single]


def test_everything_is_seen_once_an_epoch() -> None:
    work = Work(1, 0, recorder(Schedule(3, epochs=2)), SHARED, KEY)
    for c, n in enumerate(SIZES):
        (seen,) = flat([block.one(work, WORLD, Guest(c, None))])
        assert seen["total"] == 2 * sum(2.0**i + c for i in range(n))
        assert seen["steps"] == 2 * -(-n // 3) and seen["n"] == n


def test_streams_are_named() -> None:
    """By round, phase and client; a second visit in one round is the same visit."""

    def noise(round: int, phase: int, client: int) -> float:
        work = Work(round, phase, recorder(Schedule(3)), SHARED, KEY)
        return flat([block.one(work, WORLD, Guest(client, None))])[0]["noise"]

    assert noise(1, 0, 4) == noise(1, 0, 4)
    assert len({noise(1, 0, 4), noise(2, 0, 4), noise(1, 1, 4)}) == 3


def test_memory_begins_once() -> None:
    """Where a client has none it is drawn, the same in every round; then it is what the client has left."""
    work = [Work(r, 0, recorder(Schedule(3)), SHARED, KEY) for r in (1, 2)]
    first = [block.one(w, WORLD, Guest(2, None))[0].memory["count"]["n"] for w in work]
    assert torch.equal(*first)
    second = block.one(work[1], WORLD, Guest(2, {"count": {"n": first[0]}}))[0].memory["count"]["n"]
    assert float(second) == pytest.approx(float(first[0]) + 1)


def test_a_clients_nan_is_its_own() -> None:
    """In a block, neither its neighbours nor the padding bring one client's NaN to another."""
    x = WORLD.dataset.train.x.clone()
    x[np.asarray(WORLD.partition[0])] = float("nan")  # also the first row of the data set
    sick = replace(WORLD, dataset=WORLD.dataset._replace(train=WORLD.dataset.train._replace(x=x)))
    work = Work(1, 0, recorder(Schedule(3, epochs=2)), SHARED, KEY)
    results = flat(block.batched(work, sick, [Guest(c, None) for c in range(len(SIZES))]))
    assert [np.isnan(r["total"]) for r in results] == [True] + [False] * (len(SIZES) - 1)
    sound = flat(block.batched(work, WORLD, [Guest(c, None) for c in range(len(SIZES))]))
    assert results[1:] == sound[1:]


def test_without_a_recording_a_block_runs_all_the_same() -> None:
    class Broken:
        def record(self, run: Any) -> Any:
            raise RuntimeError("no")

    work = Work(3, 0, recorder(Schedule(3, epochs=2), Schedule(5)), SHARED, KEY)
    guests = [Guest(c, None) for c in range(len(SIZES))]
    expected = flat(block.batched(work, WORLD, guests))
    assert flat(block.stacked(work, WORLD, guests, Broken()).split()) == [pytest.approx(a, rel=1e-15) for a in expected]
