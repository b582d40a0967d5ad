"""Reductions: how the reports of a cohort become one value."""

from collections.abc import Callable
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedsim.types import Mean, Payload, Reducer, Report, Reports

PIECE = 1 << 17  # numbers of float64 that fit the cache beside what is read
Weighting = Literal["examples", "uniform"]


class Sum(NamedTuple):
    """A weighted sum in float64, and what it takes to make a mean of it."""

    value: Payload
    dtypes: dict[str, dict[str, torch.dtype]]
    weight: float
    metrics: dict[str, float]
    measured: float  # what the metrics are weighted by: always the number of examples
    gauges: dict[str, float]  # weighted as the values are
    clients: int
    examples: int


def weighted_mean(
    weighting: Weighting = "examples", gauge: Callable[[Report], dict[str, float]] | None = None
) -> Reducer[Sum, Mean]:
    """Σ pₖ xₖ / Σ pₖ with pₖ the client's number of examples, or 1.

    Sums are in float64, so the mean of equal values is that value, bit for bit. ``gauge`` adds numbers that the server
    works out from each report, averaged with the weights pₖ.
    """

    def lift(report: Report) -> Sum:
        weight = float(report.examples) if weighting == "examples" else 1.0
        gauges = gauge(report) if gauge else {}
        return Sum(
            # A copy even of float64: the sum is changed in place, and what a client sent may be its memory as well.
            {
                c: {n: x.to(torch.float64, copy=True).mul_(weight) for n, x in p.items()}
                for c, p in report.value.items()
            },
            {c: {n: x.dtype for n, x in part.items()} for c, part in report.value.items()},
            weight,
            {n: v * report.examples for n, v in report.metrics.items()},
            float(report.examples),
            {n: v * weight for n, v in gauges.items()},
            1,
            report.examples,
        )

    def stack(reports: Reports) -> Sum:
        weights = [float(n) if weighting == "examples" else 1.0 for n in reports.examples]
        measured = [float(n) for n in reports.examples]
        return Sum(
            {c: {n: _weighted(x, weights) for n, x in part.items()} for c, part in reports.value.items()},
            {c: {n: x.dtype for n, x in part.items()} for c, part in reports.value.items()},
            sum(weights),
            {n: pairwise([a * b for a, b in zip(v, measured, strict=True)]) for n, v in reports.metrics.items()},
            sum(measured),
            {},
            len(reports.clients),
            sum(reports.examples),
        )

    def merge(a: Sum, b: Sum) -> Sum:
        for channel, part in a.value.items():
            for name, x in part.items():
                x.add_(b.value[channel][name])
        return Sum(
            a.value,
            a.dtypes,
            a.weight + b.weight,
            {n: v + b.metrics[n] for n, v in a.metrics.items()},
            a.measured + b.measured,
            {n: v + b.gauges[n] for n, v in a.gauges.items()},
            a.clients + b.clients,
            a.examples + b.examples,
        )

    def finish(s: Sum | None) -> Mean | None:
        if s is None or s.weight == 0:
            return None
        value = {c: {n: (x / s.weight).to(s.dtypes[c][n]) for n, x in part.items()} for c, part in s.value.items()}
        metrics = {n: v / max(s.measured, 1.0) for n, v in s.metrics.items()}
        return Mean(value, metrics | {n: v / s.weight for n, v in s.gauges.items()}, s.clients, s.examples)

    if gauge:
        return Reducer(lift, merge, finish)
    return Reducer(lift, merge, finish, mean=weighting, stack=stack)


def pairwise(terms: list[float]) -> float:
    """The sum of at least one term, by neighbours: ((a + b) + (c + d)) + e, as the fold adds."""
    while len(terms) > 1:
        ends = terms[len(terms) & ~1 :]
        terms = [a + b for a, b in zip(terms[0::2], terms[1::2], strict=False)] + ends
    return terms[0]


def _weighted(x: Tensor, weights: list[float]) -> Tensor:
    """Σ weights_k x_k of x [K, …] in float64, added by neighbours, with the bits of the fold of one client at a time.

    In pieces, so that the K products in float64 stay in the cache.
    """
    clients, flat = len(x), x.reshape(len(x), -1)
    w = torch.tensor(weights, dtype=torch.float64, device=x.device).unsqueeze(1)
    out = torch.empty(flat.shape[1], dtype=torch.float64, device=x.device)
    width = max(1, PIECE // clients)
    for begin in range(0, flat.shape[1], width):
        terms = flat[:, begin : begin + width].to(torch.float64, copy=True).mul_(w)
        while len(terms) > 1:
            pairs = len(terms) // 2
            sums = terms[0 : 2 * pairs : 2].add_(terms[1 : 2 * pairs : 2])
            terms = torch.cat([sums, terms[-1:]]) if len(terms) % 2 else sums
        out[begin : begin + width] = terms[0]
    return out.view(x.shape[1:])


class Ranged(NamedTuple):
    """Another reduction's accumulator, and what each client said of some metrics."""

    inner: Any
    seen: dict[str, tuple[float, ...]]


def ranged(reduce: Reducer[Any, Mean], *names: str) -> Reducer[Ranged, Mean]:
    """The same mean, and for these metrics ``name_min``, ``name_median`` and ``name_max`` over the clients.

    Memory is a few numbers a client. Whoever puts another reduction in its place (noise) loses these numbers alone.
    """

    def lift(report: Report) -> Ranged:
        return Ranged(reduce.lift(report), {n: (report.metrics[n],) for n in names if n in report.metrics})

    def stack(reports: Reports) -> Ranged:
        assert reduce.stack
        return Ranged(reduce.stack(reports), {n: tuple(reports.metrics[n]) for n in names if n in reports.metrics})

    def merge(a: Ranged, b: Ranged) -> Ranged:
        keys = a.seen.keys() | b.seen.keys()
        return Ranged(reduce.merge(a.inner, b.inner), {n: a.seen.get(n, ()) + b.seen.get(n, ()) for n in sorted(keys)})

    def finish(a: Ranged | None) -> Mean | None:
        mean = reduce.finish(a.inner if a else None)
        if a is None or mean is None:
            return mean
        of = (("min", min), ("median", median), ("max", max))
        return mean._replace(metrics=mean.metrics | {f"{n}_{k}": f(v) for n, v in a.seen.items() for k, f in of})

    return reduce._replace(lift=lift, merge=merge, finish=finish, stack=stack if reduce.stack else None)


def collect() -> Reducer[tuple[Report, ...], tuple[Report, ...]]:
    """All reports, in order of position. Memory is O(cohort): for rules that need every update, and for metrics."""
    return Reducer(lambda report: (report,), lambda a, b: a + b, lambda all: all)
