"""Private runs from end to end: the ledger over kill and resume, the key, the statement, plan and audit."""

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
from fedsim import audit, plan, privacy
from fedsim import run as running
from fedsim.errors import ResumeError
from fedsim.privacy import EVERYBODY
from runs import experiment, lines
from server import loop
from server.ledger import Entry
from strategies import fedavg

CLIENT = (
    "strategy.name=fedavg", "strategy.weighting=uniform", "data.holdout=0.0", "privacy.mode=client",
    "privacy.clip=0.5", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3",
)  # fmt: skip
EXAMPLE = (
    "strategy.name=scaffold", "data.holdout=0.0", "privacy.mode=example", "privacy.max_grad_norm=1.0",
    "privacy.noise_multiplier=1.1", "privacy.delta=1e-3",
)  # fmt: skip
LEVELS = pytest.mark.parametrize("level", [CLIENT, EXAMPLE], ids=["client", "example"])


def ledger_of(out: Path) -> dict[str, Any]:
    newest = sorted((out / "checkpoint").glob("round-*"))[-1]
    return dict(json.loads((newest / "manifest.json").read_bytes())["extra"]["privacy"])


class Killed(Exception):
    pass


@LEVELS
@pytest.mark.parametrize("at", [1, 2, 3])
def test_after_a_kill_everything_is_the_same_bit_for_bit(
    tmp_path: Path, level: tuple[str, ...], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secret key is the same, so the replayed round is the release that was already made, and is paid for once."""
    setup = experiment(*level, "checkpoint.every=2", "rounds=5")
    key = privacy.secret(setup, None)
    monkeypatch.setattr(privacy.os, "urandom", lambda n: key.digest)
    whole = running.run(setup, tmp_path / "whole")

    def show(line: Any) -> None:
        if line["round"] == at:
            raise Killed

    with pytest.raises(Killed):
        running.run(setup, tmp_path / "killed", show=show)
    monkeypatch.undo()  # from here on the operating system gives other bytes; the kept key must be used
    again = running.run(setup, tmp_path / "killed", resume=True)
    assert again["params_sha256"] == whole["params_sha256"]
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert ledger_of(tmp_path / "killed") == ledger_of(tmp_path / "whole")
    assert (tmp_path / "killed/privacy.txt").read_text() == (tmp_path / "whole/privacy.txt").read_text()


@LEVELS
def test_the_key_is_secret_kept_and_needed(tmp_path: Path, level: tuple[str, ...]) -> None:
    out, setup = tmp_path / "out", experiment(*level, "rounds=2")
    running.run(setup, out)
    key = out / "checkpoint" / privacy.KEY
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    text = key.read_text()
    assert len(text) == 32
    for path in out.rglob("*"):
        if path.is_file() and path != key:
            content = path.read_bytes()
            assert text.encode() not in content and bytes.fromhex(text) not in content
    key.unlink()
    with pytest.raises(ResumeError, match="other noise would be a second release"):
        running.run(experiment(*level, "rounds=3"), out, resume=True)


@LEVELS
def test_a_replay_that_is_another_release_is_paid_for(
    tmp_path: Path, level: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds are released and no checkpoint is left; then a client is missing from the first one."""
    out = tmp_path / "out"
    setup = experiment(*level, "checkpoint.every=5", "rounds=3")

    def show(line: Any) -> None:
        if line["round"] == 2:
            raise Killed

    for _ in range(2):  # the second time is the same release, and costs nothing
        with pytest.raises(Killed):
            running.run(setup, out, show=show, resume=(out / "config.toml").exists())
    seen = (out / "checkpoint" / privacy.RELEASES).read_text().splitlines()
    assert [line.split()[:2] for line in seen] == [["1", "0"], ["2", "0"]]
    run_round = loop.run_round

    def without_one(strategy: Any, state: Any, round: int, cohort: list[int], *rest: Any) -> Any:
        return run_round(strategy, state, round, cohort[:-1] if round == 1 else cohort, *rest)

    monkeypatch.setattr(loop, "run_round", without_one)
    private = running.build(setup).private
    running.run(setup, out, resume=True)
    spent = privacy.Ledger.load(ledger_of(out)["ledger"])
    assert private
    expected = privacy.EMPTY
    for round in (1, 1, 2, 2, 3):
        expected = expected.spend(private.costs(round))
    assert spent == expected


def test_a_replay_may_use_up_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy.Releases, "others", lambda self, round: 1)  # every round was something else before
    four = privacy.ledger.epsilon((Entry(1.0, 4 / 12, 4),), 1e-3, "rdp")
    out = running.run(experiment(*CLIENT, "rounds=9", f"privacy.max_epsilon={four}"), tmp_path / "out")
    assert out["status"] == "stopped" and "round 3 would have spent more" in out["error"]
    assert ledger_of(tmp_path / "out")["ledger"] == {str(EVERYBODY): [[1.0, 4 / 12, 4]]}


@LEVELS
def test_the_seed_does_not_say_what_the_noise_is(tmp_path: Path, level: tuple[str, ...]) -> None:
    setup = experiment(*level, "rounds=1")
    a, b = (running.run(setup, tmp_path / name)["params_sha256"] for name in "ab")
    assert a != b
    seeded = experiment(*level, "rounds=1", "privacy.noise=seeded")
    c, d = (running.run(seeded, tmp_path / name)["params_sha256"] for name in "cd")
    assert c == d
    assert "claim         none: the noise follows from the config's seed" in (tmp_path / "c/privacy.txt").read_text()


@LEVELS
def test_seeded_noise_is_no_privacy_and_nothing_says_otherwise(
    fedsim: Callable[..., runs.Answer], tmp_path: Path, level: tuple[str, ...]
) -> None:
    file, out = runs.write(tmp_path / "a.toml", *level, "rounds=2", "privacy.noise=seeded"), tmp_path / "out"
    answer = fedsim("run", file, "--out", out)
    assert answer.code == 0
    assert re.search(r"^ epsilon +no bound: the noise is seeded", answer.out, re.MULTILINE)
    assert "no bound (seeded)" in (out / "report.html").read_text()
    assert all("epsilon" not in row and row["epsilon_if_secret"] > 0 for row in [*lines(out), runs.summary(out)])
    text = (out / "privacy.txt").read_text()
    assert "secret key" not in text and "not covered" not in text
    assert "covered       nothing: whoever has the config can take the noise away again" in text
    assert "claim             none: the noise is seeded" in fedsim("privacy", "plan", file).out


def test_a_checkpoint_without_a_ledger_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(privacy.Account, "dump", lambda self: {})
    running.run(experiment(*CLIENT, "rounds=1"), out)
    monkeypatch.undo()
    with pytest.raises(ResumeError, match="no privacy ledger"):
        running.run(experiment(*CLIENT, "rounds=2"), out, resume=True)


def test_rounds_cannot_change_under_a_target(tmp_path: Path) -> None:
    level = [a for a in CLIENT if "noise" not in a] + ["privacy.target_epsilon=5.0"]
    running.run(experiment(*level, "rounds=2"), tmp_path / "out")
    with pytest.raises(ResumeError, match="sigma was"):
        running.run(experiment(*level, "rounds=3"), tmp_path / "out", resume=True)


def test_the_client_level_ledger_is_known_beforehand(tmp_path: Path) -> None:
    running.run(experiment(*CLIENT, "rounds=3"), tmp_path / "out")
    assert ledger_of(tmp_path / "out")["ledger"] == {str(EVERYBODY): [[1.0, 4 / 12, 3]]}
    assert [row["epsilon"] for row in lines(tmp_path / "out")] == pytest.approx(
        [privacy.ledger.epsilon((Entry(1.0, 4 / 12, r),), 1e-3, "rdp") for r in (1, 2, 3)], rel=1e-12
    )
    assert all("train_loss" not in row and "examples" not in row for row in lines(tmp_path / "out"))


def test_exchanges_of_a_round_are_one_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are answered by one sample of clients, so sampling amplifies them together and not one by one: with k of
    them Gaussians of σ/√k. Counted as releases on samples of their own, 100 rounds at q = .05 and σ = .8 would be
    ε = 5.15 where it is 8.71."""
    build = fedavg.build
    monkeypatch.setattr(fedavg, "build", lambda *of: (s := build(*of))._replace(phases=s.phases * 2, sends=s.sends * 2))
    running.run(experiment(*CLIENT, "rounds=3"), tmp_path / "out")
    ((sigma, q, steps),) = ledger_of(tmp_path / "out")["ledger"][str(EVERYBODY)]
    assert (sigma, q, steps) == (pytest.approx(1 / 2**0.5, rel=1e-15), 4 / 12, 3)
    assert "6 noisy sums" in (tmp_path / "out" / "privacy.txt").read_text()
    both, apart = [(Entry(0.8 / 2**0.5, 0.05, 100),), (Entry(0.8, 0.05, 200),)]
    assert privacy.ledger.epsilon(both, 1e-3, "pld") == pytest.approx(8.71, abs=0.01)
    assert privacy.ledger.epsilon(apart, 1e-3, "pld") == pytest.approx(5.15, abs=0.01)
    level = [a for a in CLIENT if "noise" not in a] + ["privacy.target_epsilon=5.0"]
    private = running.build(experiment(*level, "rounds=3")).private
    assert private and 0.99 * 5 < private.epsilon(private.after(3)) <= 5


def test_each_client_pays_for_its_own_visits(tmp_path: Path) -> None:
    """Counted from the rounds themselves: client k's rate min(1, B/n_k), its ⌈n_k/B⌉ steps, once for each visit."""
    setup = experiment(
        *EXAMPLE, "rounds=4", "data.partition={name='dirichlet',clients=12,alpha=0.5,min_partition_size=2}"
    )
    session = running.build(setup)
    visits: dict[int, int] = {}
    for round in range(1, 5):
        for client in session.driver._choose(round):  # type: ignore[attr-defined]
            visits[client] = visits.get(client, 0) + 1
    running.run(setup, tmp_path / "out")
    expected = {}
    for client, times in visits.items():
        n = len(session.federation.indices(client, "train"))
        expected[str(client)] = [[1.1, min(1.0, 32 / n), times * -(-n // 32)]]
    assert ledger_of(tmp_path / "out")["ledger"] == expected
    assert all("train_loss" not in row for row in lines(tmp_path / "out"))


@LEVELS
def test_messages_of_flower_are_as_private_and_give_the_same_bits(tmp_path: Path, level: tuple[str, ...]) -> None:
    ends = []
    for paths in ("fast", "messages"):
        setup = experiment(
            *level, "rounds=2", "privacy.noise=seeded", f"engine.paths={paths}", "engine.execution=plain"
        )
        ends.append(running.run(setup, tmp_path / paths)["params_sha256"])
    assert ends[0] == ends[1]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_workers_of_ray_draw_the_same_noise(tmp_path: Path) -> None:
    """Their key comes from the driver, and their noise multiplier too: they search for none."""
    ends = []
    level = [a for a in EXAMPLE if "noise" not in a] + ["privacy.target_epsilon=5.0"]
    key = privacy.secret(experiment(*EXAMPLE), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(privacy.os, "urandom", lambda n: key.digest)
        for kind in ("inline", "ray"):
            setup = experiment(*level, "rounds=2", f"engine.kind={kind}", "engine.execution=plain")
            ends.append(running.run(setup, tmp_path / kind)["params_sha256"])
    assert ends[0] == ends[1]


CLIENT_STATEMENT = """\
Privacy statement
claim         epsilon = 3.4734 at delta = 0.001
unit          one client with all of its examples
adjacency     add or remove one unit
releases      3 noisy sums of clipped updates
mechanism     Gaussian; updates clipped to norm 0.5; noise multiplier 1; uniform weights, denominator 4 always
sampler       Poisson: each of 12 clients with probability 4/12 in each round, from the secret key
accountant    Rényi DP (rdp, opacus {version}): an upper bound
noise key     128 bits from the operating system, kept beside the checkpoint
covered       the model after every round, and all that is worked out from these models
not covered   - one person at several clients: epsilon is for one client
              - other runs on the same data, those for choosing settings included: epsilons add up
              - this run's folder: numbers of clients and bytes, failures, times, clients' memories, the noise key. Publish models, not the folder
              - a stop because a client failed; timing; the low bits of floating-point noise beyond what rounding removes
"""  # noqa: E501


def test_the_statement_says_all_of_it(tmp_path: Path) -> None:
    from importlib.metadata import version

    running.run(experiment(*CLIENT, "rounds=3"), tmp_path / "out")
    text = (tmp_path / "out/privacy.txt").read_text()
    assert text == CLIENT_STATEMENT.format(version=version("opacus"))
    running.run(experiment(*EXAMPLE, "rounds=3"), tmp_path / "example")
    text = (tmp_path / "example/privacy.txt").read_text()
    for part in (
        "unit          one example of one client",
        "sampler       Poisson: each of a client's n examples with probability min(1, 32/n) in each batch",
        "nothing is claimed for the sampling of clients",
        "how many examples each client has, and which clients took part: taken as public",
    ):
        assert part in text


@pytest.fixture
def fedsim(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., runs.Answer]:
    return runs.inside(capsys, monkeypatch)


@LEVELS
def test_a_plan_is_what_the_run_then_costs(
    fedsim: Callable[..., runs.Answer], tmp_path: Path, level: tuple[str, ...]
) -> None:
    file = runs.write(tmp_path / "a.toml", *level, "rounds=3")
    answer = fedsim("privacy", "plan", file, "--out", tmp_path / "plan.svg")
    assert answer.code == 0
    running.run(experiment(*level, "rounds=3"), tmp_path / "out")
    epsilon = lines(tmp_path / "out")[-1]["epsilon"]
    assert f"round 3    {epsilon:>12.4f}" in answer.out.replace("round 3         ", "round 3    ")
    assert "smallest reachable epsilon" in answer.out
    assert (tmp_path / "plan.svg").read_text().startswith("<")
    assert plan.rounds(1000) == [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]


@LEVELS
def test_the_audit_passes_on_what_is_built(
    fedsim: Callable[..., runs.Answer], tmp_path: Path, level: tuple[str, ...]
) -> None:
    file = runs.write(tmp_path / "a.toml", *level)
    answer = fedsim("privacy", "audit", file, "--trials", "3")
    assert answer.code == 0, answer.out + answer.err
    assert "FAILED" not in answer.out
    assert "1200 canaries" in answer.out


def test_the_audit_fails_where_noise_is_missing(
    fedsim: Callable[..., runs.Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server import wrap

    right = wrap.gaussian
    monkeypatch.setattr(wrap, "gaussian", lambda key, deviation, shape: right(key, deviation * 0.7, shape))
    answer = fedsim("privacy", "audit", runs.write(tmp_path / "a.toml", *CLIENT), "--trials", "3")
    assert answer.code == 1
    assert "FAILED  canaries told apart" in answer.out
    assert "the mechanism does not give what is claimed" in answer.err


def test_the_estimate_is_within_five_percent() -> None:
    """4,000 canaries at σ = 2, T = 10 (μ = 1.58; standard error 3.6 %) through the real path; seeds fixed."""
    from fedsim.rng import Key
    from server.wrap import Mechanism

    mu = audit.client_level(Mechanism(2.0, 0.5, 200, None), 5, Key.root(3))[0]
    assert mu.claimed == pytest.approx(10**0.5 / 2)
    assert abs(mu.found / mu.claimed - 1) < 0.1
    mu = audit.example_level(2.0, 0.5, "batched", 25, Key.root(3))[0]
    assert abs(mu.found / mu.claimed - 1) < 0.05
