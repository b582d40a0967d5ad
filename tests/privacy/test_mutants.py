# ruff: noqa: E501 - a table is read by its rows
"""Twenty known ways to get privacy wrong (D1–D20), planted into our own code: each must be caught, and nothing else.

What catches a mutant is the audit, or a test of this folder that is named here and called as it stands.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import privacy.test_client_level as at_clients
import privacy.test_example_level as of_examples
import privacy.test_ledger as accountants
import privacy.test_runs as whole_runs
import pytest
import torch
from _pytest.outcomes import Failed
from torch import Tensor

import clients.dp_sgd as dp_sgd
from fedsim import audit, block, tree
from fedsim import privacy as of_runs
from fedsim.rng import Key
from fedsim.types import Phase, Report
from server import ledger, sampling, wrap
from server.ledger import EMPTY, Entry
from server.wrap import Clipped, Mechanism

Patch = Callable[[pytest.MonkeyPatch], None]
Detector = Callable[[Path], bool]
KEY = Key.root(11)


def failed(checks: list[audit.Check]) -> bool:
    return not all(check.passed for check in checks)


def audit_of_clients(_: Path) -> bool:
    return failed(audit.client_level(Mechanism(1.3, 0.5, 200, None), 8, KEY))


def audit_of_examples(_: Path) -> bool:
    return failed(audit.example_level(1.3, 0.5, "batched", 16, KEY))


def audit_of_the_sampler(_: Path) -> bool:
    return failed(audit.sampler(lambda r: sampling.poisson(KEY.at("cohort", r), 100, 0.1), 100, 0.1))


def caught_by(test: Callable[..., None], *args: Any) -> Detector:
    """Whether a test of ours fails."""

    def detect(folder: Path) -> bool:
        try:
            test(*(folder if a is Path else a for a in args))
        except (Exception, Failed):
            return True
        return False

    return detect


def killed_and_resumed(folder: Path) -> bool:
    """The kill-and-resume test, with a monkeypatch of its own."""
    with pytest.MonkeyPatch.context() as patch:
        return caught_by(
            whole_runs.test_after_a_kill_everything_is_the_same_bit_for_bit, Path, whole_runs.CLIENT, 2, patch
        )(folder)


def rewrap(change: Callable[[Phase[Any]], Phase[Any]]) -> Patch:
    """Change what ``wrap.noisy`` makes of a phase."""
    right = wrap.noisy
    return lambda patch: patch.setattr(wrap, "noisy", lambda *args: change(right(*args)))


def put(module: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """Replace a function by what ``make`` does of the right one."""
    right = getattr(module, name)
    return lambda patch: patch.setattr(module, name, make(right))


# --- the mutants -----------------------------------------------------------------------------------------------------


def divided_twice(right: Any) -> Any:
    """D1: noise for a mean, added to a sum that is divided once more."""
    return lambda total, like, deviation, n, key: right(total, like, deviation / math.sqrt(n), n, key)


def weighted(phase: Phase[Any]) -> Phase[Any]:
    """D2: weights by examples (mean 1 over the canaries), noise for uniform ones."""
    screen = phase.reduce.screen
    assert screen

    def heavy(shared: Any, report: Report) -> Clipped:
        clipped = screen(shared, report)
        share = report.examples / 20.5
        return Clipped({c: {n: x * share for n, x in p.items()} for c, p in clipped.value.items()}, clipped.bit)

    return phase._replace(reduce=phase.reduce._replace(screen=heavy))


class Counter:
    """How many updates were clipped since the last release: what the server must not divide by."""

    def __init__(self) -> None:
        self.n = 0

    def clip(self, right: Any) -> Any:
        def counted(value: Any, bound: float) -> Clipped:
            self.n += 1
            return Clipped(*right(value, bound))

        return counted


def survivors(noise_too: bool) -> Patch:
    """D3, D20: divide by those who came back; the noise as planned (D3), or by that number too (D20)."""
    counter = Counter()

    def make(right: Any) -> Any:
        def release(total: Clipped, template: Any, mechanism: Mechanism, bound: float, key: Key) -> Any:
            came, counter.n = max(counter.n, 1), 0
            if noise_too:
                return right(
                    total, template, Mechanism(mechanism.sigma, mechanism.clip, came, mechanism.key), bound, key
                )
            raised = {c: {n: x * mechanism.cohort / came for n, x in p.items()} for c, p in total.value.items()}
            return right(Clipped(raised, total.bit), template, mechanism, bound, key)

        return release

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        put(wrap, "clip", counter.clip)(monkeypatch)
        put(wrap, "release", make)(monkeypatch)

    return patch


def per_tensor(right: Any) -> Any:
    """D4: each tensor clipped to C."""

    def clip(value: Any, bound: float) -> Clipped:
        parts = {c: {n: right({c: {n: x}}, bound).value[c][n] for n, x in p.items()} for c, p in value.items()}
        return Clipped(parts, 0.5)

    return clip


def examples_per_tensor(right: Any) -> Any:
    """D4 at the clients."""

    def total(task: Any, params: Any, batch: Any, clip: float) -> Any:
        loss_and_grad = dp_sgd.value_and_grad(task.loss)
        grads = torch.vmap(lambda x, y: loss_and_grad(params, dp_sgd.Batch(x[None], y[None]))[1])(batch.x, batch.y)
        return {n: dp_sgd.weighted(g, dp_sgd.factors(dp_sgd.norms({n: g}), clip)) for n, g in grads.items()}

    return total


def never(right: Any) -> Any:
    """D5: nothing is clipped at a client."""
    return lambda value, bound: Clipped({c: {n: x * 1.0 for n, x in p.items()} for c, p in value.items()}, 0.5)


def without_the_first(right: Any) -> Any:
    """D6: one tensor has no noise."""

    def release(total: Clipped, template: Any, mechanism: Mechanism, bound: float, key: Key) -> Any:
        out = right(total, template, mechanism, bound, key)
        for channel, part in out.items():
            name = next(iter(part))
            raw = total.value.get(channel, {}).get(name, torch.zeros_like(template[channel][name]))
            out[channel] = part | {name: (raw / mechanism.cohort).to(part[name].dtype)}
        return out

    return release


def only_the_first(right: Any) -> Any:
    """D6: the norm is that of one tensor."""

    def norm(value: Any) -> float:
        (channel, part), *_ = value.items()
        name = next(iter(part))
        return float(right({channel: {name: part[name]}}))

    return norm


def naive_norm(right: Any) -> Any:
    """D7: the square root of a sum of squares, and min(1, C/NaN) is 1."""
    return lambda value: min(float(sum((x**2).sum() for p in value.values() for x in p.values())) ** 0.5, 1e300)


def nan_passes(right: Any) -> Any:
    """D7: NaN ≤ 0 is false, so it was not caught."""

    def clip(value: Any, bound: float) -> Clipped:
        size = wrap.norm(value)
        factor = bound / size if size > bound else 1.0
        return Clipped({c: {n: x * factor for n, x in p.items()} for c, p in value.items()}, 0.5)

    return clip


def fixed_size(right: Any) -> Any:
    """D8: as many clients in each round."""
    return lambda key, population, rate: sampling.uniform(key, population, round(population * rate))


def shuffled(right: Any) -> Any:
    """D8: batches are a permutation cut in pieces."""
    return lambda schedule, examples, key: right(schedule._replace(sampling="shuffle"), examples, key)


def entry(change: Callable[[float, float, int], tuple[float, float, int]]) -> Patch:
    """What is written into the ledger."""
    return lambda patch: patch.setattr(of_runs, "Entry", lambda sigma, q, steps: Entry(*change(sigma, q, steps)))


def added_up(right: Any) -> Any:
    """D11: ε of a step times the number of steps, which no accountant says."""
    return lambda history, delta: sum(right((e._replace(steps=1),), delta) * math.sqrt(e.steps) for e in history)


def one_stream(right: Any) -> Any:
    """D12: the same noise in every round."""
    return lambda mechanism, round, phase, total: right(mechanism, 0, phase, Clipped({}, 0.0))


def one_tensor_stream(right: Any) -> Any:
    """D12: the same noise in every tensor."""

    def release(total: Clipped, template: Any, mechanism: Mechanism, bound: float, key: Key) -> Any:
        return {
            c: {
                n: wrap.noised(total.value.get(c, {}).get(n), x, mechanism.value_sigma * bound, mechanism.cohort, key)
                for n, x in p.items()
            }
            for c, p in template.items()
        }

    return release


def from_the_seed(right: Any) -> Any:
    """D12: the noise follows from the experiment's seed."""
    return lambda experiment, checkpoint: Key.root(experiment.seed).at("noise")


def only_the_large(right: Any) -> Any:
    """D13: what is small is sent as it is, without noise."""

    def noised(total: Tensor | None, like: Tensor, deviation: float, n: int, key: Key) -> Tensor:
        out: Tensor = right(total, like, deviation, n, key)
        if total is None:
            return out
        small = total.abs() < total.abs().median()
        return torch.where(small, (total / n).to(out.dtype), out)

    return noised


def free_bits(patch: pytest.MonkeyPatch) -> None:
    """D14: the bits of adaptive clipping cost nothing."""
    patch.setattr(Mechanism, "value_sigma", property(lambda self: self.sigma))


def from_below(right: Any) -> Any:
    """D15: the end of the bracket that costs too much."""
    return lambda *args: right(*args) * 0.99


def unclamped(patch: pytest.MonkeyPatch) -> None:
    """D16: what the conversion says, below zero too."""
    patch.setattr(ledger, "epsilon", lambda h, delta, accountant: ledger._ACCOUNTANTS[accountant](h, delta))


def skipped_when_empty(right: Any) -> Any:
    """D17: where nobody was drawn, nothing is added."""

    def noised(total: Any, noise: Any, deviation: float) -> Any:
        anybody = torch.stack([x.abs().sum() for x in total.values()]).sum() > 0
        return tree.map(lambda a, b: torch.where(anybody, a, b), right(total, noise, deviation), total)

    return noised


def silent_when_empty(phase: Phase[Any]) -> Phase[Any]:
    """D17 at the server: an empty cohort releases nothing."""
    finish = phase.finish
    return phase._replace(finish=lambda s, total: finish(s, total) if total.value else s._replace(round=s.round + 1))


def forgetful(right: Any) -> Any:
    """D18: a resumed run begins with an empty ledger."""
    return lambda private, extra: of_runs.Account(private, EMPTY)


def in_float32(right: Any) -> Any:
    """D19: noise of float32 on a sum of float32, every bit of it published."""

    def noised(total: Tensor | None, like: Tensor, deviation: float, n: int, key: Key) -> Tensor:
        noise = torch.randn(like.shape, generator=key.wide()) * deviation
        return ((noise if total is None else total.float() + noise) / n).to(like.dtype)

    return noised


def by_the_batch(right: Any) -> Any:
    """D20 at the clients: the sum over those who were drawn is divided by how many they were."""

    def clipped(task: Any, params: Any, batch: Any, clip: float) -> Any:
        share = 0.3 * len(batch.y) / max(len(batch.y) // 2, 1)
        return tree.scale(1 / share, right(task, params, batch, clip))

    return clipped


def tiny_budgets(_: Path) -> None:
    accountants.test_tiny_budgets_are_not_negative()


def few_calibrations(_: Path) -> None:
    accountants._calibrated("rdp", accountants._cases(3))


def poisson_batches(_: Path) -> None:
    of_examples.test_poisson_batches_have_the_rate_that_is_accounted_for()


SENSITIVITY = caught_by(at_clients.test_whatever_a_client_sends_moves_the_sum_by_at_most_c)
CLIPPER = caught_by(at_clients.test_the_clipper_alone_is_safe, math.nan, 1.0)
DENOMINATOR = caught_by(at_clients.test_the_denominator_is_the_expected_cohort)
CLIENT_COSTS = caught_by(whole_runs.test_the_client_level_ledger_is_known_beforehand, Path)
EXAMPLE_COSTS = caught_by(whole_runs.test_each_client_pays_for_its_own_visits, Path)
ROW = caught_by(accountants.test_reference_rows, *accountants.ROWS[0][1:])


class Mutant(NamedTuple):
    name: str
    patch: Patch
    detect: Detector


MUTANTS = [
    Mutant("D1 noise divided twice", put(wrap, "noised", divided_twice), audit_of_clients),
    Mutant("D2 weights by examples", rewrap(weighted), audit_of_clients),
    Mutant("D3 mean over survivors", survivors(False), DENOMINATOR),
    Mutant("D4 clipped per tensor", put(wrap, "clip", per_tensor), audit_of_clients),
    Mutant("D4 examples clipped per tensor", put(dp_sgd, "clipped_sum", examples_per_tensor), audit_of_examples),
    Mutant("D5 not clipped", put(wrap, "clip", never), audit_of_clients),
    Mutant("D5 the model is clipped", put(wrap, "rehearse", lambda right: _rehearse), caught_by(at_clients.test_the_model_itself_is_not_clipped)),
    Mutant("D6 a tensor without noise", put(wrap, "release", without_the_first), audit_of_clients),
    Mutant("D6 the norm of one tensor", put(wrap, "norm", only_the_first), audit_of_clients),
    Mutant("D7 naive norm", put(wrap, "norm", naive_norm), SENSITIVITY),
    Mutant("D7 NaN passes", put(wrap, "clip", nan_passes), CLIPPER),
    Mutant("D8 cohorts of fixed size", put(sampling, "poisson", fixed_size), audit_of_the_sampler),
    Mutant("D8 shuffled batches", put(block, "batches", shuffled), audit_of_examples),
    Mutant("D9 rate of the wrong length", entry(lambda s, q, n: (s, q / 45, n)), EXAMPLE_COSTS),
    Mutant("D10 rate of local batches", entry(lambda s, q, n: (s, 32 / 500, n)), CLIENT_COSTS),
    Mutant("D10 rate of one client", entry(lambda s, q, n: (s, 1 / 1000, n)), CLIENT_COSTS),
    Mutant("D10 local steps counted", entry(lambda s, q, n: (s, q, 5 * n)), CLIENT_COSTS),
    Mutant("D10 steps not counted", entry(lambda s, q, n: (s, q, 1)), EXAMPLE_COSTS),
    Mutant("D11 a formula of its own", lambda p: p.setitem(ledger._ACCOUNTANTS, "rdp", added_up(ledger._rdp)), ROW),
    Mutant("D12 noise repeats", put(wrap, "stream", one_stream), audit_of_clients),
    Mutant("D12 noise of tensors repeats", put(wrap, "release", one_tensor_stream), audit_of_clients),
    Mutant("D12 noise from the seed", put(of_runs, "secret", from_the_seed), caught_by(whole_runs.test_the_key_is_secret_kept_and_needed, Path, whole_runs.CLIENT)),
    Mutant("D13 small numbers escape", put(wrap, "noised", only_the_large), audit_of_clients),
    Mutant("D14 free bits", free_bits, caught_by(at_clients.test_adaptive_clipping_pays_for_its_bits)),
    Mutant("D15 calibrated from below", put(accountants, "calibrate", from_below), caught_by(few_calibrations, Path)),
    Mutant("D16 negative epsilon", unclamped, caught_by(tiny_budgets, Path)),
    Mutant("D17 empty batches skipped", put(dp_sgd, "noised", skipped_when_empty), audit_of_examples),
    Mutant("D17 empty cohorts skipped", rewrap(silent_when_empty), audit_of_clients),
    Mutant("D18 the ledger forgets", put(of_runs, "opened", forgetful), killed_and_resumed),
    Mutant("D19 float32", put(wrap, "noised", in_float32), caught_by(at_clients.test_a_release_lies_on_a_grid_that_noise_does_not_notice)),
    Mutant("D20 the cohort's size is used", survivors(True), DENOMINATOR),
    Mutant("D20 the batch's size is used", put(dp_sgd, "clipped_sum", by_the_batch), audit_of_examples),
]  # fmt: skip


def _rehearse(phase: Phase[Any], i: int, state: Any, memory: Any) -> Any:
    """``wrap.rehearse`` without its look at what is sent."""
    from fedsim.types import Visit

    shared, one = phase.broadcast(state), torch.ones(())
    return phase.local.final(shared, phase.local.init(shared, memory, Visit(1, one.long(), one.long())))


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_caught(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mutated").mkdir()
    with monkeypatch.context() as patch:
        mutant.patch(patch)
        assert mutant.detect(tmp_path / "mutated")


DETECTORS = {m.detect: m.name for m in MUTANTS}


@pytest.mark.parametrize("detect", DETECTORS, ids=[name.split()[0] for name in DETECTORS.values()])
def test_the_truth_is_not(detect: Detector, tmp_path: Path) -> None:
    assert not detect(tmp_path)


def test_all_twenty_are_planted() -> None:
    assert {m.name.split()[0] for m in MUTANTS} == {f"D{i}" for i in range(1, 21)}


def alarms(seeds: range) -> list[float]:
    """One trial a seed, of either level in turn; the estimates' z, which must be standard normal over the seeds."""
    z = []
    for seed in seeds:
        key = Key.root(1000 + seed)
        checks = (
            audit.client_level(Mechanism(0.9, 0.5, 200, None), 1, key)
            if seed % 2
            else audit.example_level(0.9, 0.5, "batched", 1, key)
        )
        assert not failed(checks), (seed, checks)
        z.append(checks[0].z)
    return z


def test_no_false_alarm() -> None:
    assert abs(float(np.mean(alarms(range(30))))) < 4 / math.sqrt(30)


@pytest.mark.slow
def test_no_false_alarm_in_200_seeds() -> None:
    z = alarms(range(200))
    assert abs(float(np.mean(z))) < 4 / math.sqrt(200)
    assert 0.75 < float(np.std(z)) < 1.25
