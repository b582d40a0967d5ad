"""Running clients: one by one, or a block of them at once. The only loops over batches in the project are here.

Both ways take the same batches in the same order and the same draws from the same named streams, so they agree to
rounding. In a block, parameters are stacked along a new first axis, clients are sorted by their number of steps, and
the block shrinks to the clients that still have work: only the last, partial batch of an epoch is padded. With a
recorder (``fedsim.replay``) the block keeps its size, and clients that are done keep their carry.

A client works where the data set lies, and the broadcast has to be there too (``fedsim.worker`` brings it). What
clients remember lies in the host's memory before and after: a population's may be larger than a GPU's.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim import replay, tree
from fedsim.data.dataset import Federation, Indices
from fedsim.rng import Key
from fedsim.tasks.module import seeded
from fedsim.types import Batch, Done, Fused, Local, Pass, Payload, Schedule, Visit

AHEAD = 1 << 18  # elements that are gathered at once: a few batches ahead, but no more than stays in the cache


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


def asked(round: int, phase: int, local: Local, shared: Payload, key: Key) -> Work:
    """The work of a phase.

    Draws that protect somebody are named by the broadcast as well. A round that is run again after a crash may have
    another one (a client was missing the first time): with the same noise, the difference of the two answers would
    have none.
    """
    if local.secret:
        key = key.at("broadcast", tree.payload_digest(shared))
    return Work(round, phase, local, shared, key)


class Guest(NamedTuple):
    """A client that is at work: its number and what it remembers (None on its first visit)."""

    client: int
    memory: Payload | None


class Stack(NamedTuple):
    """The finished work of a block: the first axis of every tensor is the clients, in the order given."""

    done: Done
    examples: list[int]

    def split(self) -> list[tuple[Done, int]]:
        """Client by client. What a client remembers has memory of its own, or it would hold that of the whole block."""
        value, memory, metrics = self.done
        memory = tree.moved(memory, tree.HOST)
        return [
            (
                Done(
                    {c: {n: x[k] for n, x in part.items()} for c, part in value.items()},
                    {c: {n: x[k].clone() for n, x in part.items()} for c, part in memory.items()},
                    {n: x[k] for n, x in metrics.items()},
                ),
                examples,
            )
            for k, examples in enumerate(self.examples)
        ]


def batches(schedule: Schedule, examples: int, key: Key) -> list[Indices]:
    """The positions 0..examples-1 of each batch. Epochs are reshuffled; a batch never spans two of them.

    Poisson batches have any size, and may be empty; there are as many as there would be shuffled ones.
    """
    size = schedule.batch_size
    if schedule.sampling == "poisson":
        rng = key.numpy()
        rate = min(1.0, size / examples) if examples else 0.0
        return [np.flatnonzero(rng.random(examples) < rate) for _ in range(steps_in(schedule, examples))]
    out = [order[i : i + size] for order in _epochs(schedule, examples, key) for i in range(0, examples, size)]
    return out[: schedule.steps] if schedule.steps is not None else out


def _epochs(schedule: Schedule, examples: int, key: Key) -> list[Indices]:
    """The order of the examples in each epoch that is begun; not for Poisson sampling."""
    if not examples:
        return []
    of_epoch = -(-examples // schedule.batch_size)
    epochs = -(-steps_in(schedule, examples) // of_epoch)
    if not schedule.shuffle:
        return [np.arange(examples)] * epochs
    rng = key.numpy()
    return [rng.permutation(examples) for _ in range(epochs)]


def steps_in(schedule: Schedule, examples: int) -> int:
    if schedule.steps is not None:
        return schedule.steps if examples else 0
    return schedule.epochs * -(-examples // schedule.batch_size)


def _first(local: Local) -> Schedule:
    return local.passes[0].schedule if local.passes else Schedule(1)


def remembered(work: Work, guest: Guest) -> Payload:
    """The client's memory; on a first visit, what it begins with."""
    if guest.memory is not None:
        return guest.memory
    if work.local.remember is None:
        return {}
    return first_memory(work.local.remember, work.shared, work.key.at("remember", guest.client).torch())


def first_memory(
    remember: Callable[[Payload, torch.Generator], Payload], shared: Payload, generator: torch.Generator
) -> Payload:
    """What ``Local.remember`` gives, made and kept on the host."""
    return tree.moved(remember(tree.moved(shared, tree.HOST), generator), tree.HOST)


def one(work: Work, federation: Federation, guest: Guest) -> tuple[Done, int]:
    """One client's work and its number of examples."""
    if work.local.unbatchable is None:
        return _one(work, federation, guest)
    # Dropout, the usual reason, draws from the global generator: it is lent this client's own stream.
    with seeded(work.stream(guest.client).at("model").torch(federation.dataset.train.x.device)):
        return _one(work, federation, guest)


def _one(work: Work, federation: Federation, guest: Guest) -> tuple[Done, int]:
    local, data = work.local, federation.dataset.train
    first, device = _first(local), data.x.device
    n = federation.size(guest.client, first.split)
    key = work.stream(guest.client)
    about = Visit(work.round, torch.tensor(n, device=device), torch.tensor(steps_in(first, n), device=device))
    carry = local.init(work.shared, tree.placed(remembered(work, guest), device), about)
    draws = key.at("draw").wide(device) if local.draw else None
    for p, (step, schedule, _) in enumerate(local.passes):
        rows = federation.indices(guest.client, schedule.split)
        for batch in _ahead(data.x, data.y, rows, batches(schedule, len(rows), key.at("batches", p))):
            draw = local.draw(work.shared, draws) if local.draw and draws else None
            carry = step(work.shared, carry, batch, draw)
    done = local.final(work.shared, carry)
    return done._replace(memory=tree.moved(done.memory, tree.HOST)), n


def _ahead(x: Tensor, y: Tensor, rows: Indices, plan: Sequence[Indices]) -> Iterator[Batch]:
    """The batches of a plan, as views of examples that are gathered for several of them at once."""
    width = max(1, x[0].numel())
    i = 0
    while i < len(plan):
        end, elements = i + 1, len(plan[i]) * width
        while end < len(plan) and elements + len(plan[end]) * width <= AHEAD:
            elements += len(plan[end]) * width
            end += 1
        at = torch.from_numpy(rows[np.concatenate(plan[i:end])]).to(x.device)
        xs, ys = x.index_select(0, at), y.index_select(0, at)
        begin = 0
        for positions in plan[i:end]:
            stop = begin + len(positions)
            yield Batch(xs[begin:stop], ys[begin:stop])
            begin = stop
        i = end


def batched(work: Work, federation: Federation, guests: Sequence[Guest]) -> list[tuple[Done, int]]:
    """The same work for all guests at once; results in the order given."""
    return stacked(work, federation, guests).split()


def stacked(
    work: Work, federation: Federation, guests: Sequence[Guest], recorder: replay.Recorder | None = None
) -> Stack:
    """The same work for all guests at once, as stacked tensors; with a recorder, steps are played from a recording."""
    local, shared, data = work.local, work.shared, federation.dataset.train
    first, device = _first(local), data.x.device
    given = [federation.size(g.client, first.split) for g in guests]
    # Descending number of steps, so that the clients still at work are always the first ones.
    order = sorted(range(len(guests)), key=lambda i: -steps_in(first, given[i]))
    guests, sizes = [guests[i] for i in order], [given[i] for i in order]
    keys = [work.stream(g.client) for g in guests]
    draws = [key.at("draw").wide(device) for key in keys] if local.draw else None

    memory = tree.moved(tree.stack([remembered(work, g) for g in guests]), device)
    begin = torch.vmap(lambda m, examples, steps: local.init(shared, m, Visit(work.round, examples, steps)))
    steps = [steps_in(first, n) for n in sizes]
    carry = begin(memory, torch.tensor(sizes, device=device), torch.tensor(steps, device=device))

    for p, part in enumerate(local.passes):
        rows = [federation.indices(g.client, part.schedule.split) for g in guests]
        plan = _plan(part.schedule, rows, [key.at("batches", p) for key in keys], data.x)
        if any(a < b for a, b in zip(plan.lengths, plan.lengths[1:], strict=False)):
            raise ValueError("passes over splits of different order cannot run in a block")
        course = _Course(plan, data.x, data.y, local, shared, draws)
        if recorder is not None and plan.alive:
            carry = _played(recorder, part, carry, course)
        elif (fused := lowered(part)) is not None:
            carry = _in_place(fused, carry, course)
        else:
            carry = _loop(part, carry, course)

    done: Done = torch.vmap(lambda c: local.final(shared, c))(carry)
    if order != list(range(len(order))):
        back = torch.tensor(np.argsort(order), device=device)
        done = tree.each(lambda t: t.index_select(0, back), done)
    return Stack(done, given)


def lowered(of: Pass) -> Fused | None:
    """The fused formulation of a pass, where it has one and it is that of the step itself (and not of one inside)."""
    return of.fused if of.fused is not None and of.fused.of is of.step else None


class _Plan(NamedTuple):
    """Which examples a block sees: positions and weights [S, K, B], and how many steps each of the K clients takes."""

    at: Tensor
    weight: Tensor
    lengths: list[int]
    alive: list[int]  # at each step: the clients that take it, which are the first ones
    whole: list[bool]  # at each step: whether all their batches are full


def _plan(schedule: Schedule, rows: Sequence[Indices], keys: Sequence[Key], x: Tensor) -> _Plan:
    if schedule.sampling == "poisson":
        chosen = [batches(schedule, len(mine), key) for mine, key in zip(rows, keys, strict=True)]
        lengths = [len(c) for c in chosen]
        width = max((len(b) for c in chosen for b in c), default=1) or 1  # they may all be empty
    else:
        chosen = []
        lengths = [steps_in(schedule, len(mine)) for mine in rows]
        width = max(1, min(schedule.batch_size, max(len(mine) for mine in rows)))
    most = max(lengths)
    at = np.zeros((most, len(rows), width), dtype=np.int64)
    count = np.zeros((most, len(rows)), dtype=np.int64)
    for k, mine in enumerate(rows):
        # Padding is a client's own example: 0 · NaN is NaN, and one client's must not become its neighbours'.
        filler = mine[0] if len(mine) else 0
        at[:, k] = filler
        if schedule.sampling == "poisson":
            for s, positions in enumerate(chosen[k]):
                at[s, k, : len(positions)] = mine[positions]
                count[s, k] = len(positions)
            continue
        n, of_epoch = len(mine), -(-len(mine) // width)
        for e, positions in enumerate(_epochs(schedule, n, keys[k])):
            padded = np.full(of_epoch * width, filler, dtype=np.int64)
            padded[:n] = mine[positions]
            begin, end = e * of_epoch, min((e + 1) * of_epoch, lengths[k])
            at[begin:end, k] = padded.reshape(of_epoch, width)[: end - begin]
            count[begin:end, k] = width
            if end == begin + of_epoch:
                count[end - 1, k] = n - (of_epoch - 1) * width
    weight = (np.arange(width) < count[:, :, None]).astype(np.float64 if x.dtype == torch.float64 else np.float32)
    alive = [sum(n > s for n in lengths) for s in range(most)]
    # Every step has the full width: a client's numbers are then the same alone and in a block, where layers allow it.
    whole = [bool((count[s, :k] == width).all()) for s, k in enumerate(alive)]
    masks = torch.from_numpy(weight).to(x.device)
    return _Plan(
        torch.from_numpy(at).to(x.device),
        masks.to(x.dtype) if x.is_floating_point() else masks,
        lengths,
        alive,
        whole,
    )


def _gather(x: Tensor, at: Tensor) -> Tensor:
    return x.index_select(0, at.reshape(-1)).view(*at.shape, *x.shape[1:])


class _Course(NamedTuple):
    """What a block goes through in a pass: a plan, the data set that it is of, and what its steps are given."""

    plan: _Plan
    x: Tensor
    y: Tensor
    local: Local
    shared: Payload
    draws: list[torch.Generator] | None

    def batch(self, at: Tensor, weight: Tensor | None) -> Batch:
        """The examples at these positions."""
        return Batch(_gather(self.x, at), _gather(self.y, at), weight)

    def draw(self, alive: int) -> Any:
        """A step's randomness of the first clients, each from its own stream."""
        if not self.local.draw or not self.draws:
            return None
        return tree.stack([self.local.draw(self.shared, g) for g in self.draws[:alive]])


def _in_place(fused: Fused, carry: Any, course: _Course) -> Any:
    """Step the block in memory of its own. Clients that are done are simply no longer among the first."""
    carry, plan = fused.own(carry), course.plan
    now, alive = carry, len(plan.lengths)
    for s, still in enumerate(plan.alive):
        if still < alive:
            now, alive = _part(carry, slice(None, still)), still
        weight = None if plan.whole[s] else plan.weight[s, :alive]
        fused.step(course.shared, now, course.batch(plan.at[s, :alive], weight), course.draw(alive))
    return tree.each(lambda t: t.contiguous(), carry)


def _loop(of: Pass, carry: Any, course: _Course) -> Any:
    """Step the block until its longest client is done, letting go of clients as they finish."""
    plan = course.plan
    run = torch.vmap(partial(of.step, course.shared), in_dims=(0, 0, None if course.draws is None else 0))
    finished: list[Any] = []  # carries of clients that are done, the shortest first
    alive = len(plan.lengths)
    for s, still in enumerate(plan.alive):
        if still < alive:
            finished.append(_part(carry, slice(still, None)))
            carry = _part(carry, slice(None, still))
            alive = still
        carry = run(carry, course.batch(plan.at[s, :alive], plan.weight[s, :alive]), course.draw(alive))
    for part in reversed(finished):
        carry = pytree.tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, carry, part)
    return carry


def _played(recorder: replay.Recorder, of: Pass, carry: Any, course: _Course) -> Any:
    """Step the block by a recording of one step."""
    plan, x, y, device = course.plan, course.x, course.y, course.x.device
    fused, clients = lowered(of), len(plan.lengths)
    vectorized = torch.vmap(of.step, in_dims=(None, 0, 0, None if course.draws is None else 0))

    def advance(carry: Any, shared: Payload, at: Tensor, weight: Tensor, working: Tensor, draw: Any) -> Any:
        batch, before = Batch(_gather(x, at), _gather(y, at), weight), carry  # a recording keeps no course
        if fused is None:
            after = vectorized(shared, carry, batch, draw)
        else:
            before, after = tree.each(torch.clone, carry), carry
            fused.step(shared, after, batch, draw)

        def keep(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(working.view(-1, *[1] * (new.ndim - 1)), new, old)

        return pytree.tree_map(lambda a, b: keep(a, b) if isinstance(a, Tensor) else a, after, before)

    working = torch.tensor([[n > s for n in plan.lengths] for s in range(len(plan.alive))], device=device)
    own = fused.own(carry) if fused is not None else carry

    def inputs(s: int) -> tuple[Any, ...]:
        # Who is done draws no more: streams go on in the next pass.
        draw = course.draw(plan.alive[s])
        filled = tree.each(lambda t: torch.cat([t, t[:1].expand(clients - len(t), *t.shape[1:])]), draw)
        return plan.at[s], plan.weight[s], working[s], filled

    step = inputs(0)
    made = replay.recording(
        recorder, (of.step, x.data_ptr(), y.data_ptr()), advance, (own, course.shared, *step), device
    )
    if made is not None:
        made.put(own, course.shared)
    for s in range(len(plan.alive)):
        now = step if s == 0 else inputs(s)
        if made is None:
            own = advance(own, course.shared, *now)
        else:
            made.put(*now, first=2)
            made.play()
    return tree.each(lambda t: t.clone(memory_format=torch.contiguous_format), own if made is None else made.carry)


def _part(carry: Any, clients: slice) -> Any:
    """The carry of some of the clients."""
    return tree.each(lambda t: t[clients], carry)
