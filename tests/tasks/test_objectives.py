"""Tasks that are queries: their values against definitions, and what goes wrong in a function of somebody's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torch import Tensor

from fedsim import config
from fedsim.data import attack as attack_data
from fedsim.data import metric as metric_data
from fedsim.data import quadratic as quadratic_data
from fedsim.errors import ClientError, ConfigError, DataError
from fedsim.run import build, run
from fedsim.tasks import attack, metric, quadratic
from fedsim.tasks.metrics import evaluate
from fedsim.types import Batch, Task


def at(task: Task, x: Tensor, u: Tensor) -> float:
    return evaluate(task, {"u": u.to(x.dtype)}, x, torch.zeros(len(x), dtype=torch.int64), 1)["loss"]


@pytest.mark.parametrize("c", [0.0, 0.5, 5.0, 50.0])
def test_quadratics_average_to_f_whatever_their_heterogeneity(c: float) -> None:
    data = quadratic_data.build(quadratic_data.Config(dimension=7, heterogeneity=c, clients=4))
    task = quadratic.build(quadratic.Config(dtype="float64"), data, 4)
    u = torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = 20 * u - 10
    assert at(task, data.train.x, u) == pytest.approx(float((z * z + z).sum() + 1) / 70, abs=1e-12)
    assert at(task, data.train.x, torch.full((7,), 0.475).double()) == pytest.approx(-1 / 40 + 1 / 70, abs=1e-12)
    one = Batch(data.train.x[:1], torch.zeros(1))
    assert (abs(float(task.loss({"u": u}, one)) - at(task, data.train.x, u)) > 1e-3) == (c > 0)


def test_points_outside_the_domain_count_as_its_border() -> None:
    data = quadratic_data.build(quadratic_data.Config(dimension=3))
    task = quadratic.build(quadratic.Config(), data, 5)
    low, high = torch.tensor([-4.0, 0.5, 2.0]), torch.tensor([0.0, 0.5, 1.0])
    assert at(task, data.train.x.float(), low) == at(task, data.train.x.float(), high)


def test_an_objective_has_a_loss_and_no_accuracy() -> None:
    data = quadratic_data.build(quadratic_data.Config(dimension=3))
    task = quadratic.build(quadratic.Config(dtype="float64"), data, 5)
    scores = evaluate(task, task.init(torch.Generator()), data.test.x, data.test.y, 2)
    assert scores.keys() == {"loss"}


def test_attack_is_the_mean_margin_of_the_right_label() -> None:
    choice = attack_data.Config(source="digits", clients=3, image=2)
    data = attack_data.build(choice)
    task = attack.build(attack.Config(bound=0.3), data, 3)
    found = attack_data.victims("digits", 3, 0.7, 0)
    change = torch.rand(64, generator=torch.Generator().manual_seed(1))
    x = (found.x[2] + 0.6 * change - 0.3).clamp(0, 1)
    margins = []
    for row in found.classifiers:
        w1, b1, w2, b2 = torch.split(row, [64 * 32, 32, 320, 10])
        logits = torch.relu(x @ w1.view(64, 32) + b1) @ w2.view(32, 10) + b2
        others = [v for k, v in enumerate(logits) if k != int(found.y[2])]
        margins.append(logits[found.y[2]] - max(others))
    assert at(task, data.train.x, change) == pytest.approx(float(sum(margins)) / 3, rel=1e-4)
    start = evaluate(task, task.init(torch.Generator()), data.test.x, data.test.y, 1)
    assert start["loss"] > 0 and start["success"] == 0  # all of them know the unchanged image
    fooled = evaluate(attack.build(attack.Config(bound=1.0), data, 3), {"u": change}, data.test.x, data.test.y, 1)
    assert fooled["success"] == float(fooled["loss"] < 0)
    with pytest.raises(DataError, match="images are named right by all"):
        attack_data.build(choice.model_copy(update={"image": 10**6}))


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "jaccard"])
def test_metrics_are_those_of_scikit_learn(name: str) -> None:
    data = metric_data.build(metric_data.Config(source="digits", clients=3, portion=0.4))
    x = data.train.x
    task = metric.build(metric.Config.model_validate({"metric": name}), data, 3)
    u = torch.rand(2534, generator=torch.Generator().manual_seed(1))
    theirs = {"f1": f1_score, "precision": precision_score, "recall": recall_score, "jaccard": jaccard_score}[name]
    values = []
    for table in x:
        parameters, rows = table[:39].flatten()[:2534] + 0.2 * (2 * u - 1), table[39:]
        rows = rows[rows[:, -1] > 0]
        guess = metric_data.logits(parameters, rows[:, :-2], 10).argmax(-1)
        values.append(1 - theirs(rows[:, -2].numpy(), guess.numpy(), average="macro", zero_division=0))
    assert at(task, x, u) == pytest.approx(float(np.mean(values)), abs=1e-5)


def test_clients_of_a_metric_share_out_half_of_the_examples() -> None:
    data = metric_data.build(metric_data.Config(source="digits", clients=4, portion=0.3))
    rows = data.train.x[:, 39:]
    held = [set(t[t[:, -1] > 0][:, -2].int().tolist()) for t in rows]
    assert all(len(classes) <= 3 for classes in held)
    assert 300 < int(rows[..., -1].sum()) <= 719  # what no client's classes cover is left out


MINE = """
import torch
def bowl(u, example):
    return float(((u - 0.1 * (1 + float(example))) ** 2).sum())
def wide(u, example):
    assert u.min() >= -2 and u.max() <= 6, u
    return ((u - 2) ** 2).sum()
def raises(u, example):
    if float(example) == 2:
        raise ZeroDivisionError("no such day")
    return 0.0
def nan(u, example):
    return float("nan") if float(example) == 1 else 0.0
def shape(u, example):
    return u if float(example) == 1 else u.sum()
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_objectives.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def own(function: str, on_error: str = "raise", strategy: str = "fedzo", **task: object) -> config.Experiment:
    double = {"dtype": "float64"}
    more = {"directions": 3} if strategy == "fedzo" else {"features": 20, "fit": 60, "history": 200}
    return config.parse(
        {
            "name": "own",
            "rounds": 2,
            "data": {"name": "numbered", "clients": 4, "partition": {"name": "natural_id"}},
            "task": {"model": "objective", "function": f"my_objectives:{function}", "dimension": 3, **double, **task},
            "strategy": {"name": strategy, "cohort": 4, **more},
            "engine": {"on_error": on_error},
        }
    )


@pytest.mark.parametrize("strategy", ["fedzo", "fzoos"])
def test_a_function_of_ones_own_is_minimised(mine: Path, strategy: str) -> None:
    """Clients' minima are at 0.1, 0.2, 0.3, 0.4 in every coordinate, so F's is at 0.25, where F is 3 · 0.0125."""
    experiment = own("bowl", strategy=strategy, start=0.3).model_copy(update={"rounds": 8})
    out = run(experiment, mine / "run")
    assert 0.0375 - 1e-9 <= out["final_loss"] < 0.0378
    last = json.loads((mine / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "accuracy" not in last and last["queries"] == out["queries"] > 0


def test_the_domain_is_that_which_was_asked_for(mine: Path) -> None:
    session = build(own("wide", low=-2.0, high=6.0, start=0.99))
    state, _ = session.driver.train(session.driver.begin(), 1)
    assert session.driver.params(state)["u"].max() <= 1
    with pytest.raises(ConfigError, match=r"task\.high: must be greater than low"):
        build(own("wide", low=1.0, high=1.0))


@pytest.mark.parametrize("strategy", ["fedzo", "fzoos"])
@pytest.mark.parametrize(
    ("function", "client", "reason"),
    [("raises", 2, "no such day"), ("nan", 1, "NaN|nan"), ("shape", 1, r"shape \(3,\), expected a single number")],
)
def test_a_function_that_goes_wrong_is_named(
    mine: Path, strategy: str, function: str, client: int, reason: str
) -> None:
    session = build(own(function, strategy=strategy))
    with pytest.raises(ClientError, match=reason) as error:
        session.driver.train(session.driver.begin(), 1)
    assert (error.value.client, error.value.round) == (client, 1)
    session = build(own(function, "drop", strategy))
    state, trained = session.driver.train(session.driver.begin(), 1)
    assert [f.client for f in trained.failures] == [client] and trained.clients == 3
    assert all(x.isfinite().all() for x in session.driver.params(state).values())


@pytest.mark.parametrize("function", ["my_objectives:nothing", "no_such_module:f", "nonsense"])
def test_a_function_that_is_not_there_is_named(mine: Path, function: str) -> None:
    table = own("bowl")
    with pytest.raises(ConfigError, match=r"task\.function"):
        build(table.model_copy(update={"task": table.task.model_copy(update={"function": function})}))


@pytest.mark.parametrize("model", ["quadratic", "attack", "metric"])
def test_the_wrong_data_set_is_named(model: str) -> None:
    tables = {"name": "x", "rounds": 1, "data": {"name": "numbered", "partition": {"name": "natural_id"}}}
    with pytest.raises(ConfigError, match="needs the data set"):
        build(config.parse(tables | {"task": {"model": model}, "strategy": {"name": "fedzo", "cohort": 1}}))
