"""Flower's own strategies, named in a config with their arguments: reproducible, resumable, and the same as ours."""

from collections import Counter
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flower
import pytest
import torch

import runs
from fedsim import check, checkpoint, config, tree
from fedsim.check import Subject, World
from fedsim.errors import ClientError, ConfigError, FedsimError
from fedsim.grids import flower as edge
from fedsim.run import assemble, build, run
from strategies import fedavg, fedprox

COHORT = 8
STRATEGIES: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.7},
    "FedAdagrad": {"eta": 0.05},
    "FedAdam": {"eta": 0.05},
    "FedYogi": {"eta": 0.05},
    "FedProx": {"proximal_mu": 0.1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 4},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 0.2},
}


def world(name: str, cohort: int = COHORT, seed: int = 1, **args: Any) -> World:
    settings = {"name": f"flwr.serverapp.strategy:{name}", "cohort": cohort, "batch_size": 4, "args": args}
    return check.world(Subject(settings["name"], None, settings), seed=seed, dtype="float32")


def params(w: World, rounds: int = 3) -> dict[str, torch.Tensor]:
    played = check.play(w, rounds)
    return played.session.driver.params(played.states[-1])


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_bits_twice(name: str) -> None:
    """And others for another seed: whom it samples, and what it draws, comes from the run's seed alone."""
    digests = [tree.digest(params(world(name, seed=seed, **STRATEGIES[name]))) for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_with_the_server_state(name: str, tmp_path: Path) -> None:
    """Momentum, second moments: what a strategy object has learned goes through the checkpoint, bit for bit."""
    w = world(name, **STRATEGIES[name])
    straight = assemble(*w)
    state = straight.driver.begin()
    for number in (1, 2):
        state, _ = straight.driver.train(state, number)
    checkpoint.Store(tmp_path, 1).save(2, {}, state, straight.memory, {})
    expected, _ = straight.driver.train(state, 3)

    fresh = assemble(*w)
    found = checkpoint.Store(tmp_path, 1).load(checkpoint.named_tuples(fresh.driver.begin()))
    resumed, _ = fresh.driver.train(found.state, 3)
    assert check.difference(expected, resumed) is None


def test_the_moments_of_fedadam_are_in_the_checkpoint() -> None:
    """Sabotage of the test above: without them, the next round is another one."""
    w = world("FedAdam", eta=0.05)
    session = assemble(*w)
    state = session.driver.begin()
    for number in (1, 2):
        state, _ = session.driver.train(state, number)
    expected, _ = session.driver.train(state, 3)
    forgotten = state._replace(attributes=assemble(*w).driver.begin().attributes)
    other, _ = assemble(*w).driver.train(forgotten, 3)
    assert check.difference(expected, other) is not None


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_learns(name: str) -> None:
    w = world(name, cohort=12, **STRATEGIES[name])
    played = check.play(w, 12)
    train = w.federation.dataset.train
    first, last = (played.session.driver.params(played.states[i]) for i in (0, -1))
    assert check._loss(w.task, last, train.x, train.y) < check._loss(w.task, first, train.x, train.y)


@pytest.mark.parametrize(("name", "args", "ours"), [("FedAvg", {}, fedavg), ("FedProx", {"proximal_mu": 0.5}, fedprox)])
def test_ours_is_flowers(name: str, args: dict[str, float], ours: Any) -> None:
    """On one cohort (everybody), from one start, our strategy and Flower's give the same model to 1e-6."""
    theirs = params(world(name, cohort=12, **args), 4)
    settings = {"name": ours.__name__.rpartition(".")[2], "cohort": 12, "batch_size": 4}
    if args:
        settings["mu"] = args["proximal_mu"]
    mine = params(check.world(Subject(settings["name"], ours, settings), seed=1, dtype="float32"), 4)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_sampling_ignores_the_global_generators() -> None:
    """Flower samples with Python's global generator; here it is lent one of the run's own, and given back."""
    import random

    cohorts = []
    for salt in (1, 2):
        random.seed(salt)
        before = random.getstate()
        played = check.play(world("FedAvg", cohort=3), 3)
        assert random.getstate() == before
        cohorts.append(tree.digest(played.session.driver.params(played.states[-1])))
    assert cohorts[0] == cohorts[1]


def test_arguments() -> None:
    with pytest.raises(ConfigError, match=r"^strategy\.args\.etta: unknown argument of FedAdam; did you mean 'eta'\?"):
        assemble(*world("FedAdam", etta=1.0))
    with pytest.raises(ConfigError, match=r"^strategy\.args: .*Clipping refused its arguments: "):
        assemble(*world("DifferentialPrivacyServerSideFixedClipping", noise_multiplier=-1.0))


def test_a_wrapper_and_the_strategy_inside_it() -> None:
    """Flower's privacy wrappers take a strategy; it is written as a table, and both states are kept."""
    args = {
        "strategy": {"name": "flwr.serverapp.strategy:FedAdam", "args": {"eta": 0.05}},
        "noise_multiplier": 0.1,
        "clipping_norm": 1.0,
        "num_sampled_clients": COHORT,
    }
    w = world("DifferentialPrivacyServerSideFixedClipping", **args)
    assert tree.digest(params(w)) == tree.digest(params(w))
    args["strategy"] = {"name": "flwr.serverapp.strategy:FedAdam", "args": {"etta": 0.05}}
    with pytest.raises(ConfigError, match=r"^strategy\.args\.strategy\.args\.etta: .* did you mean 'eta'\?"):
        assemble(*world("DifferentialPrivacyServerSideFixedClipping", **args))


SAMPLING = {
    "fraction_train=0.1": r"strategy\.args\.fraction_train: is set by strategy\.cohort \(got 0\.1\)",
    "min_train_nodes=50": r"strategy\.args\.min_train_nodes: is set by strategy\.cohort \(got 50\)",
    "min_available_nodes=50": r"strategy\.args\.min_available_nodes: must be at most 12, .* \(got 50\)",
    "fraction_evaluate=0.5,min_evaluate_nodes=13": r"strategy\.args\.min_evaluate_nodes: must be at most 12.*13\)",
}


@pytest.mark.parametrize("args", SAMPLING)
def test_arguments_that_contradict_the_cohort_or_wait_without_end(args: str) -> None:
    setup = runs.experiment(f"strategy={{name='flwr.serverapp.strategy:FedAvg',cohort=4,args={{{args}}}}}")
    with pytest.raises(ConfigError, match=f"^{SAMPLING[args]}$"):
        build(setup)


def test_an_argument_of_another_type_is_flowers_to_judge(tmp_path: Path) -> None:
    settings = "strategy={name='flwr.serverapp.strategy:FedAvg',cohort=4,args={min_available_nodes='x'}}"
    with pytest.raises(FedsimError, match=r"^strategy '.*' failed in round 1 on the server: TypeError: "):
        run(runs.experiment(settings), tmp_path / "out")


def test_what_a_strategy_of_flowers_cannot_do_is_refused() -> None:
    name = "strategy.name='flwr.serverapp.strategy:FedAvg'"
    with pytest.raises(ConfigError, match=r"^strategy\.weighting: must be 'examples', .*\(got 'uniform'\)$"):
        runs.experiment(name, "strategy.weighting=uniform")
    with pytest.raises(ConfigError, match=r"^evaluate\.local: must be false for a strategy of Flower's"):
        build(runs.experiment(name, "evaluate.local=true"))


class Passing(flower.FedAvg):
    """Takes an argument of its own, and passes the others on."""

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha


class Stubborn(flower.FedAvg):
    """Samples as it likes."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()


def named(cls: type, monkeypatch: pytest.MonkeyPatch, *assignments: str, **args: Any) -> config.Experiment:
    """A small experiment with a strategy of this class, as if it were one of Flower's."""
    monkeypatch.setattr(flower, cls.__name__, cls, raising=False)
    made = runs.experiment(f"strategy={{name='flwr.serverapp.strategy:{cls.__name__}',cohort=4}}", *assignments)
    return made.model_copy(update={"strategy": made.strategy.model_copy(update={"args": args})})


def test_the_cohort_reaches_a_class_that_passes_arguments_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(named(Passing, monkeypatch, alpha=0.1), tmp_path / "out")
    assert [line["clients"] for line in runs.lines(tmp_path / "out")] == [4, 4, 4, 4]
    assert "federated_accuracy" not in done, "Flower's own evaluation was not asked for"
    with pytest.raises(ConfigError, match=r"^strategy\.args\.alpa: unknown .* did you mean 'alpha'\?"):
        build(named(Passing, monkeypatch, alpa=0.1))
    with pytest.raises(ConfigError, match=r"^strategy\.cohort: cannot be told to Stubborn, .* and no min_train_nodes;"):
        build(named(Stubborn, monkeypatch))


class Waiting(flower.FedAvg):
    """Wants more nodes than there are, and says so to nobody."""

    def configure_train(self, server_round: int, *args: Any) -> Any:
        self.min_available_nodes = 50
        return super().configure_train(server_round, *args)


def test_who_waits_for_nodes_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "PAUSE", 0.0)
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    with pytest.raises(FedsimError, match=r"^the server waits for more nodes than there are, .*\(got 12\)$"):
        run(named(Waiting, monkeypatch), tmp_path / "out")
    assert runs.summary(tmp_path / "out")["status"] == "failed"


def test_a_run_without_any_aggregate_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Flower says why it skips a round; we say it too, and do not call such a run completed, nor when it is resumed."""
    bulyan = "strategy={name='flwr.serverapp.strategy:Bulyan',cohort=5,args={num_malicious_nodes=1}}"
    for resume in (False, True):
        with pytest.raises(FedsimError, match=r"^Bulyan aggregated in no round, and the model is what it began as$"):
            run(runs.experiment(bulyan, f"rounds={2 + resume}"), tmp_path / "out", resume=resume)
        assert runs.summary(tmp_path / "out")["status"] == "failed"
    said = [r.getMessage() for r in caplog.records if "Bulyan made nothing of 5 replies" in r.getMessage()]
    assert [line.partition(":")[0] for line in said] == ["round 1", "round 2", "round 3"]
    assert all("Required at least 7" in line and "received 5" in line for line in said)


class Skipping(flower.FedAvg):
    """Aggregates in the first round alone."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return super().aggregate_train(server_round, replies) if server_round == 1 else (None, None)


def test_a_round_without_an_aggregate_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(named(Skipping, monkeypatch), tmp_path / "out")["status"] == "completed"
    said = [r.getMessage() for r in caplog.records if "Skipping made nothing of 4 replies" in r.getMessage()]
    assert [line[:7] for line in said] == ["round 2", "round 3", "round 4"]


class Opaque(flower.FedAvg):
    """Keeps what no checkpoint can hold."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.socket = object()


class Counting(flower.FedAvg):
    """Keeps what a checkpoint would give back as another thing."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.socket = Counter("ab")


class Failing(flower.FedAvg):
    """Raises where it aggregates."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        raise KeyError("no such layer")


class Nan(flower.FedAvg):
    """Makes a model of NaN."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        from fedsim.grids.flower import to_record, to_tree

        return to_record(tree.scale(float("nan"), to_tree(arrays))), metrics


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Failing, r"Failing failed in round 1: KeyError: 'no such layer'"),
        (Nan, r"(Nan|the strategy) made a model with NaN or Inf in round 1"),
    ],
)
def test_strategies_that_go_wrong(cls: type, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "Wrong", cls, raising=False)
    experiment = runs.experiment("strategy={name='flwr.serverapp.strategy:Wrong',cohort=4}")
    with pytest.raises(FedsimError, match=message) as e:
        run(experiment, tmp_path / "out")
    assert e.value.exit_code == 1


@pytest.mark.parametrize("cls", [Opaque, Counting])
def test_state_that_cannot_be_saved_is_refused_at_once(
    cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=rf"{cls.__name__}\.socket cannot be saved, so no run could resume"):
        run(named(cls, monkeypatch), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_from_a_client_is_kept_from_flower() -> None:
    """Flower's average would take it; here it is an error or a dropped client, and Krum never sees it."""
    for name in ("FedAvg", "Krum"):
        w = world(name, cohort=12, **STRATEGIES[name])
        with pytest.raises(ClientError, match="client 3 failed in round 1"):
            check.play(check.spoil(w, 3, float("nan")), 1)


def test_federated_evaluation_as_flower_does_it(tmp_path: Path) -> None:
    """Where the arguments ask for it, clients evaluate by message, and the aggregate is logged."""
    done = run(
        runs.experiment(
            "strategy={name='flwr.serverapp.strategy:FedAvg',cohort=4,args={fraction_evaluate=1.0}}", "rounds=2"
        ),
        tmp_path / "out",
    )
    assert 0 <= done["federated_accuracy"] <= 1


def test_the_config_survives_toml() -> None:
    experiment = world("FedAdam", eta=0.05, tau=1e-3).experiment
    assert config.parse(config.dump(experiment)) == experiment
