"""Running clients: one by one, or a block of them at once. The only loops over batches in the project are here.

Both ways take the same batches in the same order and the same draws from the same named streams, so they agree to
rounding. In a block, parameters are stacked along a new first axis, clients are sorted by their number of steps, and
the block shrinks to the clients that still have work: only the last, partial batch of an epoch is padded.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.data.dataset import Federation, Indices
from fedsim.rng import Key
from fedsim.types import Batch, Done, Local, Payload, Schedule, Visit


class Work(NamedTuple):
    """What every client of a phase is asked to do. ``key`` is the run's root; phase −1 is evaluation."""

    round: int
    phase: int
    local: Local
    shared: Payload
    key: Key

    def stream(self, client: int) -> Key:
        """The root of this client's streams in this round and phase."""
        return self.key.at("round", self.round, "phase", self.phase, "client", client)


class Guest(NamedTuple):
    """A client that is at work: its number and what it remembers (None on its first visit)."""

    client: int
    memory: Payload | None


def batches(schedule: Schedule, examples: int, key: Key) -> list[Indices]:
    """The positions 0..examples-1 of each batch. Epochs are reshuffled; a batch never spans two of them.

    Poisson batches have any size, and may be empty; there are as many as there would be shuffled ones.
    """
    size, rng = schedule.batch_size, key.numpy()
    if schedule.sampling == "poisson":
        rate = min(1.0, size / examples) if examples else 0.0
        return [np.flatnonzero(rng.random(examples) < rate) for _ in range(_steps(schedule, examples))]
    out: list[Indices] = []
    while examples and (
        len(out) < schedule.steps if schedule.steps is not None else len(out) < _steps(schedule, examples)
    ):
        order = rng.permutation(examples) if schedule.shuffle else np.arange(examples)
        out += [order[i : i + size] for i in range(0, examples, size)]
    return out[: schedule.steps] if schedule.steps is not None else out


def _steps(schedule: Schedule, examples: int) -> int:
    if schedule.steps is not None:
        return schedule.steps if examples else 0
    return schedule.epochs * -(-examples // schedule.batch_size)


def visit(work: Work, federation: Federation, client: int) -> tuple[Visit, int]:
    """What the client knows, and its number of examples."""
    schedule = work.local.passes[0].schedule if work.local.passes else Schedule(1)
    n = len(federation.indices(client, schedule.split))
    device = federation.dataset.train.x.device
    return Visit(work.round, torch.tensor(n, device=device), torch.tensor(_steps(schedule, n), device=device)), n


def remembered(work: Work, guest: Guest) -> Payload:
    """The client's memory; on a first visit, what it begins with."""
    if guest.memory is not None:
        return guest.memory
    if work.local.remember is None:
        return {}
    return work.local.remember(work.shared, work.key.at("remember", guest.client).torch())


def one_by_one(work: Work, federation: Federation, guests: Sequence[Guest]) -> Iterator[tuple[Done, int]]:
    """Each client's work and number of examples, in the order given."""
    for guest in guests:
        yield one(work, federation, guest)


def one(work: Work, federation: Federation, guest: Guest) -> tuple[Done, int]:
    """One client's work and its number of examples."""
    local, data = work.local, federation.dataset.train
    about, n = visit(work, federation, guest.client)
    key = work.stream(guest.client)
    carry = local.init(work.shared, remembered(work, guest), about)
    draws = key.at("draw").wide() if local.draw else None
    for p, (step, schedule) in enumerate(local.passes):
        rows = torch.from_numpy(federation.indices(guest.client, schedule.split)).to(data.x.device)
        x, y = data.x[rows], data.y[rows]
        for positions in batches(schedule, len(rows), key.at("batches", p)):
            at = torch.from_numpy(positions).to(x.device)
            draw = local.draw(work.shared, draws) if local.draw and draws else None
            carry = step(work.shared, carry, Batch(x[at], y[at]), draw)
    return local.final(work.shared, carry), n


def batched(work: Work, federation: Federation, guests: Sequence[Guest]) -> list[tuple[Done, int]]:
    """The same work for all guests at once, with stacked tensors; results in the order given."""
    local, shared, data = work.local, work.shared, federation.dataset.train
    first = local.passes[0].schedule if local.passes else Schedule(1)
    abouts, sizes = zip(*(visit(work, federation, g.client) for g in guests), strict=True)
    # Descending number of steps, so that the clients still at work are always the first ones.
    order = sorted(range(len(guests)), key=lambda i: -_steps(first, sizes[i]))
    guests = [guests[i] for i in order]
    keys = [work.stream(g.client) for g in guests]
    draws = [key.at("draw").wide() for key in keys] if local.draw else None

    about = Visit(
        work.round,
        torch.stack([abouts[i].examples for i in order]),
        torch.stack([abouts[i].steps for i in order]),
    )
    memory = _stack([remembered(work, g) for g in guests])
    begin = torch.vmap(lambda m, examples, steps: local.init(shared, m, Visit(work.round, examples, steps)))
    carry = begin(memory, about.examples, about.steps)

    for p, (step, schedule) in enumerate(local.passes):
        plans = [
            (federation.indices(g.client, schedule.split), key.at("batches", p))
            for g, key in zip(guests, keys, strict=True)
        ]
        chosen = [[rows[b] for b in batches(schedule, len(rows), key)] for rows, key in plans]
        if any(len(a) < len(b) for a, b in zip(chosen, chosen[1:], strict=False)):
            raise ValueError("passes over splits of different order cannot run in a block")
        run = torch.vmap(partial(step, shared), in_dims=(0, 0, None if draws is None else 0))
        carry = _loop(run, carry, chosen, data.x, data.y, local, shared, draws)

    done = torch.vmap(lambda c: local.final(shared, c))(carry)
    results: list[tuple[Done, int] | None] = [None] * len(guests)
    for row, i in enumerate(order):
        results[i] = (pytree.tree_map_only(Tensor, lambda t, row=row: t[row], done), sizes[i])
    return [r for r in results if r is not None]


def _loop(
    run: Any,
    carry: Any,
    chosen: list[list[Indices]],
    x: Tensor,
    y: Tensor,
    local: Local,
    shared: Payload,
    draws: list[torch.Generator] | None,
) -> Any:
    """Step the block until its longest client is done, letting go of clients as they finish."""
    lengths = [len(c) for c in chosen]
    width = max((len(b) for c in chosen for b in c), default=1) or 1  # Poisson batches may all be empty
    rows = np.zeros((lengths[0], len(chosen), width), dtype=np.int64)
    weight = np.zeros((lengths[0], len(chosen), width), dtype=np.float32)
    for k, mine in enumerate(chosen):
        for s, positions in enumerate(mine):
            rows[s, k, : len(positions)] = positions
            weight[s, k, : len(positions)] = 1
    at, mask = torch.from_numpy(rows).to(x.device), torch.from_numpy(weight).to(x.device)
    if x.is_floating_point():
        mask = mask.to(x.dtype)

    finished: list[Any] = []  # carries of clients that are done, the shortest first
    alive = len(chosen)
    for s in range(lengths[0]):
        still = sum(n > s for n in lengths)
        if still < alive:
            finished.append(pytree.tree_map_only(Tensor, lambda t, still=still: t[still:], carry))
            carry = pytree.tree_map_only(Tensor, lambda t, still=still: t[:still], carry)
            alive = still
        now = at[s, :alive]
        draw = _stack([local.draw(shared, g) for g in draws[:alive]]) if local.draw and draws else None
        carry = run(carry, Batch(x[now], y[now], mask[s, :alive]), draw)
    for part in reversed(finished):
        carry = pytree.tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, carry, part)
    return carry


def _stack(values: Sequence[Any]) -> Any:
    """Equal structures, stacked leaf by leaf."""
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *values)
