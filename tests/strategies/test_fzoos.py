"""FZooS and the zeroth-order baselines: queries and bytes that are counted, edges that are equalities, and descent."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import grid, same

from clients.zeroth_order import orthonormal
from fedsim import block, config
from fedsim.block import Guest, Work
from fedsim.data.dataset import Federation
from fedsim.grids.inline import InlineGrid
from fedsim.memory import Memory
from fedsim.rng import Key
from fedsim.run import Session, build, run
from fedsim.types import Batch, Phase, Strategy, Task, Tree
from server.loop import run_round
from strategies import fedkseed, fedprox_zo, fedzo, fzoos, scaffold_zo

SMALL = {"features": 60, "fit": 80, "history": 160, "local": 80}
FD = {"directions": 4}


def experiment(
    strategy: str, dimension: int = 6, clients: int = 3, rounds: int = 3, **settings: Any
) -> config.Experiment:
    more = SMALL if strategy == "fzoos" else FD
    return config.parse(
        {
            "name": "zo",
            "rounds": rounds,
            "data": {
                "name": "quadratic",
                "clients": clients,
                "dimension": dimension,
                "heterogeneity": settings.pop("C", 5.0),
                "partition": {"name": "natural_id"},
            },
            "task": {"model": "quadratic", "dtype": "float64"},
            "strategy": {"name": strategy, "cohort": clients, **more, **settings},
            "engine": {"execution": "plain"},
        }
    )


def play(of: config.Experiment, rounds: int) -> tuple[Session, list[Any], list[Any]]:
    """The session, the states before the first round and after each, and what each round took."""
    session = build(of)
    states, took = [session.driver.begin()], []
    for r in range(1, rounds + 1):
        state, trained = session.driver.train(states[-1], r)
        states.append(state)
        took.append(trained)
    return session, states, took


def path(of: config.Experiment, rounds: int = 3) -> list[Tree]:
    return [state.x for state in play(of, rounds)[1]]


def counting(session: Session) -> tuple[Session, list[int]]:
    """The session with a task that counts how often it is asked, one point at a time."""
    asked = [0]
    task = session.task

    def loss(params: Tree, batch: Batch) -> Tensor:
        assert not params["u"].requires_grad and params["u"].grad_fn is None
        assert params["u"].min() >= 0 and params["u"].max() <= 1
        asked[0] += 1
        return task.loss(params, batch)

    return session._replace(task=task._replace(loss=loss, unbatchable="counts")), asked


CASES = [
    ("fedzo", {}, 10 * (4 + 1), 0),
    ("fedprox_zo", {}, 10 * (4 + 1), 0),
    ("scaffold_zo", {"type": 1}, 10 * (4 + 1) + 4 + 1, 0),
    ("scaffold_zo", {"type": 2}, 10 * (4 + 1), 0),
    ("fzoos", {}, 10 + 9 * 5 + 1 + 50, 0),
    ("fzoos", {"active": 0, "survey": 1}, 10 + 2, 0),
    ("fzoos", {"steps": 1}, 1 + 1 + 50, 0),
    ("fedzo", {"accept": "if-better"}, 10 * (4 + 1), 1),
    ("fzoos", {"accept": "if-better"}, 106, 1),
]


@pytest.mark.parametrize(("name", "settings", "each", "judged"), CASES)
def test_every_query_is_counted_and_is_in_the_domain(
    name: str, settings: dict[str, Any], each: int, judged: int
) -> None:
    session = build(experiment(name, **settings))
    session, asked = counting(session)
    module = {"fedzo": fedzo, "fedprox_zo": fedprox_zo, "scaffold_zo": scaffold_zo, "fzoos": fzoos}[name]
    strategy: Strategy[Any] = module.build(session.experiment.strategy, session.task)  # type: ignore[attr-defined]
    state, executor = strategy.init(Key.root(1).torch()), grid(session.federation)
    for r in (1, 2, 3):
        state, _ = run_round(strategy, state, r, [0, 1, 2], executor, Key.root(1))
        assert state.queries == asked[0] == 3 * r * (each + judged)
        assert strategy.gauges is not None and strategy.gauges(state) == {"queries": asked[0]}


def test_a_dropped_client_is_not_counted() -> None:
    session = build(experiment("fzoos"))

    def loss(params: Tree, batch: Batch) -> Tensor:
        value = session.task.loss(params, batch)
        return torch.where(batch.x[0, 0, 0] == session.federation.dataset.train.x[1, 0, 0], torch.nan, value)

    strategy = fzoos.build(session.experiment.strategy, session.task._replace(loss=loss))
    executor = grid(session.federation, on_error="drop")
    state, trained = run_round(strategy, strategy.init(Key.root(1).torch()), 1, [0, 1, 2], executor, Key.root(1))
    assert [f.client for f in trained.failures] == [1]  # once: it sits out the second exchange
    assert state.queries == 2 * 106 and executor.memory.get(1) is None


@pytest.mark.parametrize(
    ("name", "settings", "up", "down"),
    [
        ("fedzo", {}, 6, 6),
        ("scaffold_zo", {"type": 2}, 12, 12),
        ("scaffold_zo", {"type": 1}, 12, 18),
        ("fzoos", {}, 6 + 60, 6 + 60),
        ("fzoos", {"accept": "if-better"}, 6 + 60 + 2, 6 + 60 + 6),
    ],
)
def test_bytes(name: str, settings: dict[str, Any], up: int, down: int) -> None:
    """d + M numbers each way; who judges is sent the point once more, and is told two values."""
    _, _, took = play(experiment(name, **settings), 2)
    assert [(t.bytes_up, t.bytes_down) for t in took] == [(3 * 8 * up, 3 * 8 * down)] * 2


def test_fedprox_without_pull_is_fedzo() -> None:
    a, b = path(experiment("fedprox_zo", mu=0.0)), path(experiment("fedzo"))
    assert all(same(x, y) for x, y in zip(a, b, strict=True)) and not same(a[0], a[-1])


def test_fedprox_by_hand() -> None:
    """Plain steps: u₁ = x − η Δ(x), u₂ = u₁ − η (Δ(u₁) + μ (u₁ − x)); with one step the pull is nothing."""
    settings = {"optimizer": "sgd", "lr": 0.02, "clients": 1, "C": 0.0}
    one = [path(experiment(n, steps=1, **settings), 1)[1] for n in ("fedzo", "fedprox_zo")]
    assert same(*one)
    two, pulled = (path(experiment(n, steps=2, **settings), 1) for n in ("fedzo", "fedprox_zo"))
    u1 = one[0]["u"]
    torch.testing.assert_close(pulled[1]["u"], two[1]["u"] - 0.02 * 1.0 * (u1 - two[0]["u"]), rtol=1e-12, atol=1e-14)


def test_fedzo_by_hand() -> None:
    """All d directions of a linear function: Δ = ∇f/d whatever they are, and a step of η = 0.6 goes −0.6 ∇f/d."""

    def loss(params: Tree, batch: Batch) -> Tensor:
        return params["u"] @ torch.tensor([3.0, -1.0, 1.0], dtype=torch.float64)

    start = {"u": torch.full((3,), 0.5, dtype=torch.float64)}
    session = build(experiment("fedzo", dimension=3, directions=3))
    task = Task(lambda g: start, lambda p, x: x, loss, lambda p, b: {}, 0, 3)
    chosen = fedzo.Config(directions=3, steps=1, lr=0.6, optimizer="sgd", cohort=3)
    strategy = fedzo.build(chosen, task)
    state, _ = run_round(
        strategy, strategy.init(Key.root(0).torch()), 1, [0, 1, 2], grid(session.federation), Key.root(0)
    )
    # −0.6 · (3, −1, 1)/3 = (−0.6, 0.2, −0.2), and 0.5 − 0.6 is outside
    torch.testing.assert_close(state.x["u"], torch.tensor([0.0, 0.7, 0.3], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_scaffold_with_one_client_is_fedzo() -> None:
    a, b = path(experiment("scaffold_zo", clients=1)), path(experiment("fedzo", clients=1))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    # Type I asks in an exchange before, so FedZO is given one as well: its steps must be those of the second exchange.
    session = build(experiment("scaffold_zo", clients=1, type=1))
    built = scaffold_zo.build(session.experiment.strategy, session.task)  # type: ignore[arg-type]
    base = build(experiment("fedzo", clients=1))
    zo = fedzo.build(base.experiment.strategy, base.task)  # type: ignore[arg-type]
    idle: Phase[Any] = built.phases[0]._replace(finish=lambda state, mean: state)
    zo = zo._replace(phases=(idle, *zo.phases), sends=(built.sends[0], *zo.sends), init=built.init)
    ends = [_run(s, base.federation, 3).x for s in (built, zo)]
    assert same(*ends)


def _run(strategy: Strategy[Any], federation: Federation, rounds: int) -> Any:
    state, executor = strategy.init(Key.root(3).torch()), grid(federation)
    for r in range(1, rounds + 1):
        state, _ = run_round(strategy, state, r, list(range(len(federation))), executor, Key.root(3))
    return state


def test_scaffold_corrects_by_what_others_saw() -> None:
    """Type I with one plain step is mean_i Δ_i for everybody, up to the directions: with Q = d these are no matter."""
    of = experiment("scaffold_zo", type=1, steps=1, directions=6, smoothing=1e-6, optimizer="sgd", lr=0.01)
    zo = experiment("fedzo", steps=1, directions=6, smoothing=1e-6, optimizer="sgd", lr=0.01)
    session, states, _ = play(of, 1)
    torch.testing.assert_close(states[1].x["u"], path(zo, 1)[1]["u"], rtol=1e-5, atol=1e-7)
    own = [session.memory.get(i) for i in range(3)]
    mean = torch.stack([m["control"]["u"] for m in own if m]).mean(0)
    torch.testing.assert_close(states[1].common["control"]["u"], mean)
    # Each client by itself goes to the same point: what it adds is what it lacks.
    strategy = scaffold_zo.build(session.experiment.strategy, session.task)  # type: ignore[arg-type]
    began = states[1]._replace(x=states[0].x)
    work = Work(1, 1, strategy.phases[1].local, strategy.phases[1].broadcast(began), Key.root(5))
    ends = [
        block.one(work, session.federation, Guest(i, session.memory.get(i)))[0].value["params"]["u"] for i in range(3)
    ]
    for end in ends:
        torch.testing.assert_close(end, states[0].x["u"] - 0.01 * mean, rtol=1e-5, atol=1e-7)


def test_scaffold_keeps_the_mean_of_control_variates_when_cohorts_change() -> None:
    """Type II: c is the mean over all clients of c_i, those that have not come yet counting 0."""
    session = build(experiment("scaffold_zo", clients=4))
    strategy = scaffold_zo.build(session.experiment.strategy, session.task)  # type: ignore[arg-type]
    state, executor = strategy.init(Key.root(3).torch()), grid(session.federation)
    for r, cohort in enumerate(([0, 1], [1, 2], [0]), 1):
        state, _ = run_round(strategy, state, r, cohort, executor, Key.root(3))
    own = [executor.memory.get(i) for i in range(4)]
    total = sum(m["control"]["u"] for m in own if m) / 4
    torch.testing.assert_close(state.common["control"]["u"], total)


def test_without_correction_the_features_do_not_matter() -> None:
    a = path(experiment("fzoos", gamma=0.0))
    b = path(experiment("fzoos", gamma=0.0, features=31, feature_seed=9))
    c = path(experiment("fzoos", gamma=1.0, feature_seed=9))
    assert all(same(x, y) for x, y in zip(a, b, strict=True)) and not same(a[-1], c[-1])


def test_with_one_client_there_is_nothing_to_correct() -> None:
    runs = [path(experiment("fzoos", clients=1, gamma=g)) for g in (0.0, 1.0, "1/t")]
    assert all(same(x, y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True))


def test_the_correction_can_stay_where_the_round_began() -> None:
    moving, fixed = (path(experiment("fzoos", gamma=1.0, correct_at=at)) for at in ("iterate", "start"))
    assert not same(moving[1], fixed[1])
    once = [path(experiment("fzoos", gamma=1.0, steps=1, correct_at=at), 1) for at in ("iterate", "start")]
    assert same(once[0][1], once[1][1])  # the first step is taken from there


def test_the_correction_brings_clients_together() -> None:
    """A plain step from one point: without the correction clients go their own ways, with it (nearly) the same one."""

    def spread(gamma: float) -> float:
        session, _, _ = play(experiment("fzoos", gamma=gamma, steps=1, optimizer="sgd", features=500), 1)
        ends = [m["point"]["u"] for m in map(session.memory.get, range(3)) if m]
        return float(torch.stack(ends).std(0).norm())

    assert spread(1.0) < 0.2 * spread(0.0)


def test_gamma_is_one_over_t() -> None:
    def end(gamma: float | str, steps: int) -> Tree:
        return path(experiment("fzoos", gamma=gamma, steps=steps, active=0, optimizer="sgd"), 1)[1]

    assert same(end("1/t", 1), end(1.0, 1))
    # Each u_i is x − η (g₁ + γ₁ c) − η (g₂ + γ₂ c′), so the second step's part is half of that with γ = 1. Corrections
    # add up to 0 over clients at one point, and after one step these are at three: what is left is small, not 0.
    halved, whole, none = (end(g, 2)["u"] for g in ("1/t", 1.0, 0.0))
    assert not torch.equal(halved, whole) and not torch.equal(halved, none)


def test_points_are_chosen_where_little_is_known() -> None:
    known, any_ = (path(experiment("fzoos", choose=how)) for how in ("doubt", "random"))
    assert not same(known[1], any_[1])


def test_the_history_is_bounded_and_stays_with_the_client() -> None:
    session, _, took = play(experiment("fzoos"), 4)
    for i in range(3):
        memory = session.memory.get(i)
        assert memory is not None
        assert memory["history"]["x"].shape == (160, 6) and int(memory["history"]["made"]) == 4 * 106
        assert not any(x.requires_grad for part in memory.values() for x in part.values())
    assert took[-1].bytes_up == took[0].bytes_up


@pytest.mark.parametrize("name", ["fedzo", "fzoos"])
def test_worse_points_are_not_accepted(name: str) -> None:
    session, states, _ = play(experiment(name, accept="if-better", lr=0.2, C=20.0), 6)
    test = session.federation.dataset.test
    values = [float(session.task.loss(s.x, Batch(test.x, test.y))) for s in states]
    assert values == sorted(values, reverse=True) and all(s.before == {} for s in states)
    kept = [same(a.x, b.x) for a, b in pairwise(states)]
    assert any(kept), "steps of 0.2 overshoot sooner or later"


@pytest.mark.parametrize(("name", "settings"), [("fedzo", {}), ("scaffold_zo", {"type": 1}), ("fzoos", {})])
def test_it_goes_down(name: str, settings: dict[str, Any]) -> None:
    session, states, _ = play(experiment(name, C=1.0, **settings), 6)
    test = session.federation.dataset.test
    first, last = (float(session.task.loss(states[i].x, Batch(test.x, test.y))) for i in (0, -1))
    assert last < 0.2 * first + 0.1


@pytest.mark.parametrize("name", ["fedzo", "scaffold_zo", "fzoos"])
def test_blocks_of_clients_give_the_same_numbers(name: str) -> None:
    plain, states, _ = play(experiment(name), 3)
    of = plain.experiment.model_copy(update={"engine": config.EngineConfig(execution="batched", block=2)})
    _, stacked, _ = play(of, 3)
    for a, b in zip(states, stacked, strict=True):
        torch.testing.assert_close(a.x["u"], b.x["u"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["fzoos", "scaffold_zo", "fedkseed"])
def test_resume_is_bitwise_while_the_history_grows(name: str, tmp_path: Path) -> None:
    tables = config.dump(experiment("fedzo", rounds=4))
    more = {"fzoos": SMALL, "scaffold_zo": FD, "fedkseed": {}}[name]
    of = config.parse(tables | {"strategy": {"name": name, "cohort": 2, **more}})
    whole = run(of, tmp_path / "whole")
    run(of.model_copy(update={"rounds": 2}), tmp_path / "half")
    resumed = run(of, tmp_path / "half", resume=True)
    assert whole["params_sha256"] == resumed["params_sha256"] and whole["queries"] == resumed["queries"]


def test_directions_beyond_the_dimension_are_refused() -> None:
    from fedsim.errors import ConfigError

    with pytest.raises(ConfigError, match=r"strategy\.directions: must be at most 3"):
        build(experiment("fedzo", dimension=3))
    assert orthonormal(Key.root(0).torch(), 3, 3, torch.float64).shape == (3, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"active": 0, "survey": 0},
        {"local": 55},
        {"history": 79},
        {"survey": 201},
        {"gamma": "2/t"},
        {"gamma": -1.0},
        {"noise": 0.0},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="candidates" if wrong == {"survey": 201} else list(wrong)[-1]):
        experiment("fzoos", **wrong)


def kseed(hidden: int, **settings: Any) -> tuple[Session, Strategy[Any]]:
    of = config.parse(
        {
            "name": "kseed",
            "rounds": 1,
            "data": {"name": "digits", "partition": {"name": "iid", "clients": 5}},
            "task": {"model": "mlp", "hidden": [hidden]},
            "strategy": {"name": "fedkseed", "cohort": 3, "steps": 4, "seeds": 7, **settings},
        }
    )
    session = build(of)
    return session, fedkseed.build(of.strategy, session.task)  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [2, 200])
def test_kseed_sends_a_few_bytes_whatever_the_model(hidden: int) -> None:
    session, strategy = kseed(hidden)
    state, trained = run_round(
        strategy, strategy.init(Key.root(1).torch()), 1, [0, 1, 2], grid(session.federation), Key.root(1)
    )
    assert trained.bytes_up == 3 * 4 * (4 + 4) and trained.bytes_down == 3 * (8 + 7 * 4)
    assert state.queries == 3 * 4 * 2


def test_kseed_takes_the_mean_over_clients() -> None:
    session, strategy = kseed(4)
    state = strategy.init(Key.root(1).torch())
    a = [run_round(strategy, state, 1, c, grid(session.federation), Key.root(1))[0].a for c in ([0], [3], [0, 3])]
    torch.testing.assert_close(a[2], (a[0] + a[1]) / 2, rtol=1e-6, atol=1e-7)


def test_kseed_late_joiner_has_the_same_bits() -> None:
    """A client that never took part rebuilds the model from what is broadcast: the bits of everybody's model."""
    session, strategy = kseed(8)
    state, executor = strategy.init(Key.root(1).torch()), grid(session.federation)
    for r in (1, 2, 3):
        state, _ = run_round(strategy, state, r, [0, 1], executor, Key.root(1))
    sent = strategy.phases[0].broadcast(state)["replay"]
    joined = fedkseed.replay(session.experiment.strategy, session.task, sent["seed"], sent["a"])  # type: ignore[arg-type]
    assert same(joined, strategy.params(state)) and executor.memory.get(4) is None
    assert not same(joined, strategy.params(strategy.init(Key.root(1).torch())))


def test_kseed_step_by_hand() -> None:
    """One client, one step: a_k is the central difference along z_k, and w moves by −η a_k z_k."""
    session, strategy = kseed(3, steps=1, lr=0.5, batch_size=4096)
    chosen: Any = session.experiment.strategy
    state = strategy.init(Key.root(1).torch())
    w = strategy.params(state)
    state, _ = run_round(
        strategy, state, 1, [2], InlineGrid(session.federation, config.EngineConfig(), Memory()), Key.root(1)
    )
    [k] = state.a.nonzero()[:, 0].tolist()
    z = fedkseed.direction(int(state.seed), k, w)
    rows = torch.from_numpy(session.federation.indices(2, "train"))
    batch = Batch(session.federation.dataset.train.x[rows], session.federation.dataset.train.y[rows])
    sides = [session.task.loss({n: w[n] + s * chosen.smoothing * z[n] for n in w}, batch) for s in (1, -1)]
    rho = float(sides[0] - sides[1]) / (2 * chosen.smoothing)
    assert float(state.a[k]) == pytest.approx(rho, rel=1e-2)  # batches are shuffled: sums in another order
    expected = {n: w[n] - 0.5 * state.a[k] * z[n] for n in w}
    torch.testing.assert_close(strategy.params(state), expected, rtol=1e-6, atol=1e-7)
