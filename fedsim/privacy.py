"""The privacy of a run: what is protected, how much noise that takes, what has been spent, and what may be said of it.

Like ``fedsim.run`` this puts kernel, clients and server together: noise at the clients is ``clients.dp_sgd``, noise at
the server ``server.wrap``, and what they cost is ``server.ledger``.

Which sampler each level relies on, and what is counted:

    client    the cohort of each round is a Poisson sample drawn with the secret key; one entry a round. The k exchanges
              of a round are answered by one sample: together they are one Gaussian of σ/√k on it, not k releases on
              samples of their own
    example   each client's batches are Poisson samples drawn with the secret key; the cohort is drawn with the public
              seed, so no amplification by it is claimed: each client's own visits are counted, and the worst is ε

Costs depend on the config and the key alone, never on data: how many rounds a budget pays for is known beforehand.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from clients import dp_sgd
from fedsim import block, files, registry, tree
from fedsim.config import Experiment, PrivacyConfig
from fedsim.data.dataset import Federation
from fedsim.errors import BudgetSpent, ConfigError, ResumeError
from fedsim.rng import Key
from fedsim.types import Schedule, Strategy, Task, wellformed
from server import ledger, sampling, wrap
from server.ledger import EMPTY, Entry, History, Ledger
from server.wrap import Mechanism

KEY, RELEASES, STATEMENT = "noise.key", "releases", "privacy.txt"
EVERYBODY = -1  # the ledger's unit at client level: all clients spend the same
SLACK = 1 + 1e-9  # ε after the last affordable round may differ from the budget by rounding


@dataclass(frozen=True)
class Private:
    """A run's privacy, prepared: nothing in it changes while the run goes on."""

    config: PrivacyConfig
    sigma: float
    key: Key  # names noise and batches, and cohorts at client level
    costs: Callable[[int], Mapping[int, History]]  # of a round
    choose: Callable[[int], list[int]]  # a round's cohort
    rounds: int
    population: int
    cohort: int
    exchanges: int  # noisy sums a round at client level
    batch_size: int  # B at example level
    way: str  # how gradients of examples are had
    holdout: bool

    def after(self, rounds: int, start: Ledger = EMPTY, done: int = 0) -> Ledger:
        """The ledger when rounds ``done + 1 … rounds`` have been added to ``start``."""
        spent = start
        for cost in _totals(self.costs, done + 1, rounds):
            spent = spent.spend(cost)
        return spent

    def epsilon(self, spent: Ledger) -> float:
        return spent.epsilon(self.config.delta, self.config.accountant)

    @property
    def budget(self) -> float | None:
        """ε that must not be exceeded."""
        limits = [x for x in (self.config.max_epsilon, self.config.target_epsilon) if x is not None]
        return min(limits, default=None)


def _totals(costs: Callable[[int], Mapping[int, History]], first: int, last: int) -> Iterable[Mapping[int, History]]:
    """The cost of rounds ``first … last`` in one, so that a million rounds are not a million ledgers."""
    total: dict[int, dict[tuple[float, float], int]] = {}
    for round in range(first, last + 1):
        for unit, history in costs(round).items():
            steps = total.setdefault(unit, {})
            for sigma, q, n in history:
                steps[sigma, q] = steps.get((sigma, q), 0) + n
    if total:
        yield {unit: tuple(Entry(s, q, n) for (s, q), n in steps.items()) for unit, steps in total.items()}


class Account(NamedTuple):
    """A run's privacy and what it has spent so far."""

    private: Private
    spent: Ledger

    def after(self, round: int, times: int = 1) -> "Account":
        """The account when this round has been released, so many times."""
        cost = self.private.costs(round)
        return self._replace(spent=self.spent.spend({unit: history * times for unit, history in cost.items()}))

    @property
    def epsilon(self) -> float:
        return self.private.epsilon(self.spent)

    def affordable(self, done: int, last: int) -> int:
        """The last round, at most ``last``, after which ε is within the budget. ``ConfigError`` where there is none."""
        private, budget = self.private, self.private.budget
        if budget is None or done >= last:
            return last

        def within(round: int) -> bool:
            return private.epsilon(private.after(round, self.spent, done)) <= budget * SLACK

        if within(last):
            return last
        if not within(done + 1):
            name = "max_epsilon" if budget == private.config.max_epsilon else "target_epsilon"
            cost = private.epsilon(private.after(done + 1, self.spent, done))
            if done:
                raise BudgetSpent(
                    f"privacy.{name}: {budget:g} is spent after round {done} (epsilon {self.epsilon:.4g}); one more "
                    f"round would make it {cost:.4g}"
                )
            raise ConfigError(
                f"privacy.{name}: must be at least {cost:.4g}, the cost of the first round (got {budget:g})"
            )
        low, high = done + 1, last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        return low

    def last(self, done: int, planned: int) -> int:
        """The last round that can be paid for; ``done`` where no more can be."""
        try:
            return self.affordable(done, planned)
        except ConfigError:
            return done

    def dump(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        c = self.private.config
        return {
            "mode": c.mode,
            "sigma": self.private.sigma,
            "delta": c.delta,
            "accountant": c.accountant,
            "ledger": self.spent.dump(),
        }


class Releases:
    """What each exchange came to, by its digest, on disk before anybody sees it.

    A round that is run again after a crash is usually the same release, and is paid for once. Where it is another one
    (clients of a deployment come and go, and a policy may drop some) both were seen, and both are paid for.
    """

    def __init__(self, path: Path) -> None:
        self._lines = files.Lines(path)
        self._seen: dict[tuple[int, int], set[str]] = {}
        for line in self._lines.read():
            round, phase, digest = line.split()
            self._seen.setdefault((int(round), int(phase)), set()).add(digest)

    def note(self, round: int, phase: int, state: Any) -> None:
        """A phase of a round has led to this state."""
        found, _ = pytree.tree_flatten_with_path(state)
        digest = tree.digest({pytree.keystr(path): leaf for path, leaf in found if isinstance(leaf, Tensor)})
        seen = self._seen.setdefault((round, phase), set())
        if digest in seen:
            return
        self._lines.add(f"{round} {phase} {digest}")
        seen.add(digest)

    def others(self, round: int) -> int:
        """How many releases of this round there have been besides one."""
        return max((len(seen) - 1 for (of, _), seen in self._seen.items() if of == round), default=0)


def opened(private: Private, extra: Mapping[str, Any] | None) -> Account:
    """The account of a run that begins, or that goes on from a checkpoint with these extras.

    Raises ``ResumeError`` where the checkpoint has no account, or one with other noise.
    """
    if extra is None:
        return Account(private, EMPTY)
    extra = extra.get("privacy") or {}
    if "ledger" not in extra:
        raise ResumeError(
            "the checkpoint has no privacy ledger: what was spent is unknown, so nothing more is released"
        )
    account = Account(private, Ledger.load(extra["ledger"]))
    for name, value in Account(private, EMPTY).dump().items():
        if name != "ledger" and extra.get(name) != value:
            raise ResumeError(
                f"privacy: {name} was {extra.get(name)} and is {value} now; with target_epsilon neither rounds nor the "
                "version of the accountant may change in a run"
            )
    return account


def secret(experiment: Experiment, checkpoint: Path | None) -> Key:
    """The key of a run's noise: seeded, or from the operating system and kept beside the checkpoint for a resume.

    With the key that a round was released with, its replay after a crash is the same release, bit for bit, if the same
    clients answer the same: nothing is spent twice. (Where they do not, see ``Releases``.) Raises ``ResumeError`` where
    there are checkpoints and the key is gone.
    """
    assert experiment.privacy
    if experiment.privacy.noise == "seeded":
        return Key.root(experiment.seed).at("privacy")
    if checkpoint is None or not checkpoint.exists():
        return Key(experiment.seed, os.urandom(16))
    try:
        digest = bytes.fromhex((checkpoint / KEY).read_text())
    except FileNotFoundError:
        if any(checkpoint.glob("round-*")):
            raise ResumeError(f"{checkpoint / KEY}: missing; other noise would be a second release") from None
        return Key(experiment.seed, os.urandom(16))
    except (OSError, ValueError) as e:
        raise ResumeError(f"{checkpoint / KEY}: damaged ({type(e).__name__})") from e
    if len(digest) != 16:
        raise ResumeError(f"{checkpoint / KEY}: damaged ({len(digest)} bytes)")
    return Key(experiment.seed, digest)


def keep(private: Private, checkpoint: Path) -> None:
    """Put the key where ``secret`` finds it, readable by its owner alone; before the first round."""
    if private.config.noise == "os" and not (checkpoint / KEY).exists():
        checkpoint.mkdir(parents=True, exist_ok=True)
        files.write(checkpoint / KEY, private.key.digest.hex().encode(), mode=0o600)


def protect(
    experiment: Experiment, federation: Federation, task: Task, key: Key | None = None
) -> tuple[Strategy[Any], Private]:
    """The experiment's strategy under its ``[privacy]``. Raises ``ConfigError`` for all that cannot be promised."""
    config = experiment.privacy
    assert config
    key = key or secret(experiment, None)
    plugin = registry.load("strategies", experiment.strategy.name)

    def build(task: Task) -> Strategy[Any]:
        strategy = plugin.build(experiment.strategy, task)
        if not isinstance(strategy, Strategy):
            raise ConfigError(
                "strategy.name: a strategy of Flower's brings a sampler and an average of its own, which [privacy] "
                "cannot account for; take one of ours"
            )
        wellformed(strategy, experiment.strategy.name)
        return strategy

    if config.mode == "client":
        return _client_level(experiment, len(federation), build(task), key)
    return _example_level(experiment, federation, task, build, key)


def _client_level(
    experiment: Experiment, population: int, strategy: Strategy[Any], key: Key
) -> tuple[Strategy[Any], Private]:
    config, cohort = experiment.privacy, experiment.strategy.cohort
    assert config and config.clip
    _check_delta(config, population, "clients")
    q, exchanges = cohort / population, len(strategy.phases)
    sigma = config.noise_multiplier or ledger.calibrate(
        lambda s: [(Entry(s / math.sqrt(exchanges), q, experiment.rounds),)],
        _target(config),
        config.delta,
        config.accountant,
    )
    mechanism = Mechanism(sigma, config.clip, cohort, key, config.adaptive, repeatable=config.noise == "seeded")
    cost = {EVERYBODY: (Entry(sigma / math.sqrt(exchanges), q, 1),)}
    private = Private(
        config, sigma, key, lambda round: cost, lambda round: sampling.poisson(key.at("cohort", round), population, q),
        experiment.rounds, population, cohort, exchanges, 0, "", bool(experiment.data.holdout),
    )  # fmt: skip
    guarded = wrap.client_level(strategy, mechanism)
    _ask(private)
    return guarded, private


def _example_level(
    experiment: Experiment, federation: Federation, task: Task, build: Callable[[Task], Strategy[Any]], key: Key
) -> tuple[Strategy[Any], Private]:
    config, population, cohort = experiment.privacy, len(federation), experiment.strategy.cohort
    assert config and config.max_grad_norm
    bound, asked = config.max_grad_norm, config.grad_sample
    size: int | None = getattr(experiment.strategy, "batch_size", None)
    if size is None:
        raise ConfigError("privacy.mode: 'example' needs a strategy with local gradient steps (batch_size)")

    def choose(round: int) -> list[int]:
        return sampling.uniform(Key.root(experiment.seed).at("cohort", round), population, cohort)

    strategy = build(dp_sgd.private(task, 1.0, bound, size, asked))
    _check_passes(strategy, federation)
    schedules = [p.schedule for phase in strategy.phases for p in phase.local.passes]
    visits: dict[int, int] = {}
    for round in range(1, experiment.rounds + 1):
        for client in choose(round):
            visits[client] = visits.get(client, 0) + 1
    examples: dict[tuple[int, str], int] = {}

    def visit(client: int, sigma: float) -> History:
        """What one visit costs the client's examples."""
        entries: list[Entry] = []
        for s in schedules:
            if (n := examples.get((client, s.split))) is None:
                n = examples[client, s.split] = federation.size(client, s.split)
            entries += of_batches(s, n, sigma)
        return ledger.merge(entries)

    def histories(sigma: float) -> list[History]:
        return [
            tuple(e._replace(steps=e.steps * times) for e in visit(client, sigma)) for client, times in visits.items()
        ]

    histories(1.0)
    _check_delta(config, max(examples.values(), default=1), "examples of the largest client")
    sigma = config.noise_multiplier or ledger.calibrate(histories, _target(config), config.delta, config.accountant)
    strategy = wrap.silent(build(dp_sgd.private(task, sigma, bound, size, asked)), secret=config.noise == "os")
    private = Private(
        config, sigma, key, lambda round: {client: visit(client, sigma) for client in choose(round)}, choose,
        experiment.rounds, population, cohort, len(strategy.phases), size, dp_sgd.way(task, asked),
        bool(experiment.data.holdout),
    )  # fmt: skip
    _ask(private)
    return strategy, private


def of_batches(schedule: Schedule, n: int, sigma: float) -> History:
    """What the Poisson batches of one visit cost each of n examples; nothing where there are none."""
    steps = block.steps_in(schedule, n)
    return (Entry(sigma, min(1.0, schedule.batch_size / n), steps),) if n else ()


def _target(config: PrivacyConfig) -> float:
    assert config.target_epsilon
    return config.target_epsilon


def _check_delta(config: PrivacyConfig, units: int, what: str) -> None:
    if config.delta > 1 / units and not config.allow_weak_delta:
        raise ConfigError(
            f"privacy.delta: must be below 1/{units}, one over the number of {what}: else giving one away whole would "
            f"be allowed; privacy.allow_weak_delta = true accepts it (got {config.delta:g})"
        )


def _ask(private: Private) -> None:
    """Ask the accountant about the end of the run now: it may have no answer, or none that the budget allows."""
    private.epsilon(private.after(private.rounds))
    Account(private, EMPTY).affordable(0, private.rounds)


def _check_passes(strategy: Strategy[Any], federation: Federation) -> None:
    """Refuse a strategy whose clients touch examples in any way but ``clients.sgd``'s; found on a batch of nobody."""
    from fedsim.types import Batch, Visit

    x, y = (part[:0].cpu() for part in federation.dataset.train[:2])
    state = strategy.init(Key.root(0).at("template").torch())
    for i, phase in enumerate(strategy.phases):
        local, shared = phase.local, phase.broadcast(state)
        for p in local.passes:
            if p.schedule.sampling != "poisson" or local.draw is None:
                raise ConfigError(
                    f"privacy.mode: 'example' accounts for Poisson batches of noisy gradients, and exchange {i + 1} of "
                    "this strategy reads its clients' examples in another way"
                )
        generator = Key.root(0).at("template").wide()
        memory = local.remember(shared, generator) if local.remember else {}
        one = x.new_ones((), dtype=y.dtype)
        carry = local.init(shared, memory, Visit(1, one, one))
        for p in local.passes:
            assert local.draw
            carry = p.step(shared, carry, Batch(x, y), local.draw(shared, generator))


def resolved(experiment: Experiment, private: Private) -> Experiment:
    """The experiment with its noise multiplier found: a worker that builds it again has nothing to search for."""
    assert experiment.privacy
    found = {"noise_multiplier": private.sigma, "target_epsilon": None}
    return experiment.model_copy(update={"privacy": experiment.privacy.model_copy(update=found)})


def statement(account: Account) -> str:
    """What may be said of a run, and what may not; the text of ``privacy.txt``."""
    p, c = account.private, account.private.config
    secret = c.noise == "os"
    drawn = "from the secret key" if secret else "from the config's seed, which anybody may know"
    claim = f"epsilon = {account.epsilon:.4f} at delta = {c.delta:g}"
    if not secret:
        claim = f"none: the noise follows from the config's seed. (With secret noise it would be {claim}.)"
    if c.mode == "client":
        unit = "one client with all of its examples"
        bound = f"{c.clip:g}" + (", then following the clients' norms" if c.adaptive else "")
        lines = [
            f"releases      {account.spent.releases() * p.exchanges} noisy sums of clipped updates",
            f"mechanism     Gaussian; updates clipped to norm {bound}; noise multiplier {p.sigma:.6g}; uniform "
            f"weights, denominator {p.cohort} always",
            f"sampler       Poisson: each of {p.population} clients with probability {p.cohort}/{p.population} in each "
            f"round, {drawn}",
        ]
        if c.adaptive:
            mechanism = Mechanism(p.sigma, c.clip or 0.0, p.cohort, None, c.adaptive)
            lines.append(
                f"clipping      the share of unclipped clients is released too, with noise {mechanism.bit_sigma:g}; "
                f"the sums have {mechanism.value_sigma:.6g} instead, so that both together cost the noise multiplier"
            )
        covered = "the model after every round, and all that is worked out from these models"
        extra = ["one person at several clients: epsilon is for one client"]
    else:
        unit = "one example of one client"
        lines = [
            f"releases      {account.spent.releases()} noisy gradients at the client that took part most; epsilon is "
            f"the largest of {len(account.spent.histories)} clients'",
            f"mechanism     Gaussian; gradients clipped to norm {c.max_grad_norm:g}; noise multiplier {p.sigma:.6g}; "
            f"denominator min({p.batch_size}, n) always; computed by '{p.way}'",
            f"sampler       Poisson: each of a client's n examples with probability min(1, {p.batch_size}/n) in each "
            f"batch, {drawn}; nothing is claimed for the sampling of clients",
        ]
        covered = "every update that a client sends, hence every model, and all that is worked out from them"
        extra = [
            "how many examples each client has, and which clients took part: taken as public",
            "one person in several examples: epsilon is for one example",
        ]
    bounds = {"rdp": "an upper bound", "prv": "an upper bound", "pld": "an upper bound"}
    secrecy = "128 bits from the operating system, kept beside the checkpoint" if secret else "not secret"
    if not secret:
        covered = "nothing: whoever has the config can take the noise away again"
    uncovered = [
        *extra,
        "other runs on the same data, those for choosing settings included: epsilons add up",
        "this run's folder: numbers of clients and bytes, failures, times, clients' memories, the noise key. Publish "
        "models, not the folder",
        *(["the scores on clients' held-out examples, which are printed without noise"] if p.holdout else []),
        "a stop because a client failed; timing; the low bits of floating-point noise beyond what rounding removes",
    ]
    return "\n".join(
        [
            "Privacy statement",
            f"claim         {claim}",
            f"unit          {unit}",
            "adjacency     add or remove one unit",
            *lines,
            f"accountant    {ledger.title(c.accountant)}: {bounds[c.accountant]}",
            f"noise key     {secrecy}",
            f"covered       {covered}",
            *(f"{'not covered' if i == 0 else '':<13} - {text}" for i, text in enumerate(uncovered if secret else ())),
            "",
        ]
    )


def public(account: Account, line: Mapping[str, Any]) -> dict[str, Any]:
    """A round's line of metrics with ε; without the sum of clients' examples where a client's number is private.

    ε is ``epsilon``, or ``epsilon_if_secret`` where the noise is seeded: then it is claimed of nothing.
    """
    config = account.private.config
    hidden = {"examples"} if config.mode == "client" else set()
    name = "epsilon" if config.noise == "os" else "epsilon_if_secret"
    return {key: value for key, value in line.items() if key not in hidden} | {name: account.epsilon}


def write(account: Account, folder: Path) -> None:
    """Put the statement into a run's folder."""
    files.write(folder / STATEMENT, statement(account).encode())
