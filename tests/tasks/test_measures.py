"""Central evaluation against scikit-learn, and the spread over clients by hand."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from tasks.toys import dataset, text
from torch import Tensor

from fedsim import tree
from fedsim.tasks import char_gru, mlp
from fedsim.tasks.metrics import _macro_f1, evaluate, spread
from fedsim.types import Batch, Task


def model(classes: int, n: int = 101) -> tuple[Task, dict[str, Tensor], Tensor, Tensor]:
    data = dataset(9, n=n, classes=classes)
    task = mlp.build(mlp.Config(hidden=(5,), dtype="float64"), data, 1)
    params = tree.scale(4.0, task.init(torch.Generator().manual_seed(4)))  # far from predicting one class for all
    return task, params, data.train.x.double(), data.train.y


@pytest.mark.parametrize("classes", [2, 7, 150], ids=["two", "seven", "more classes than examples"])
def test_the_numbers_are_those_of_scikit_learn(classes: int) -> None:
    task, params, x, y = model(classes)
    found = evaluate(task, params, x, y, 20)
    logits = task.predict(params, x)
    probabilities = np.asarray(logits.softmax(-1))
    predicted = probabilities.argmax(1)
    assert len({*predicted.tolist()}) > 1
    expected = {
        "accuracy": accuracy_score(y, predicted),
        "loss": log_loss(y, probabilities, labels=range(classes)),
        "macro_f1": f1_score(y, predicted, average="macro"),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert isinstance(found[name], float) and found[name] == pytest.approx(value, abs=1e-6), name


def test_sequences_are_measured_by_token() -> None:
    data = text(n=9)
    task = char_gru.build(char_gru.Config(hidden=8), data, 1)
    params = task.init(torch.Generator().manual_seed(4))
    found = evaluate(task, params, data.test.x, data.test.y, 4)
    predicted, y = task.predict(params, data.test.x).argmax(-1).flatten(), data.test.y.flatten()
    assert found["accuracy"] == pytest.approx(accuracy_score(y, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(y, predicted, average="macro"), abs=1e-6)
    assert found["loss"] == pytest.approx(task.loss(params, Batch(data.test.x, data.test.y)).item(), abs=1e-6)


def test_evaluation_depends_on_its_arguments_alone() -> None:
    task, params, x, y = model(7)
    first = evaluate(task, params, x, y, 32)
    torch.rand(9)
    assert evaluate(task, params, x, y, 32) == first
    for size in (1, 101, 5000):  # another batch size moves the last bits of the loss and nothing else
        assert evaluate(task, params, x, y, size) == pytest.approx(first, abs=1e-12)
    for bad in ((x[:0], y[:0], 32), (x, y, 0)):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate(task, params, *bad)


def test_a_stranger_task_is_measured_by_its_own_score() -> None:
    task, params, x, y = model(7)
    odd = task._replace(
        score=lambda p, b: {"count": torch.tensor(2.0), "correct": torch.ones(()), "loss": torch.ones(()) * 6}
    )
    found = evaluate(odd, params, x, y, 101)
    assert (found["accuracy"], found["loss"]) == (0.5, 3.0) and found["macro_f1"] == evaluate(task, params, x, y, 9)[
        "macro_f1"
    ]


def test_spread_by_hand() -> None:
    # ranks of 11 clients are 0, 0.1, … 1, so the 10th percentile is the second worst
    accuracies = [k / 10 for k in (3, 9, 1, 7, 0, 5, 2, 10, 4, 8, 6)]
    found = spread(accuracies, [1] * 10 + [11])
    assert found == {
        "client_accuracy_mean": pytest.approx((5.5 - 0.6 + 11 * 0.6) / 21),
        "client_accuracy_worst": 0.0,
        "client_accuracy_p10": pytest.approx(0.1),
    }


def test_macro_f1_of_a_large_vocabulary_needs_no_table_of_it() -> None:
    """Two million tokens over 20,000 classes: a table of predictions by classes² would be 6 PB."""
    tokens = np.arange(2_000_000) % 20_000
    shifted = np.where(tokens < 10_000, tokens, 19_999)  # the lower half is right, the upper all called one class
    assert _macro_f1(tokens, tokens, 20_000) == 1.0
    last = 2 * 100 / (1_000_000 + 100)
    assert _macro_f1(shifted, tokens, 20_000) == pytest.approx((10_000 + last) / 20_000, rel=1e-12)


def test_clients_without_examples_have_no_accuracy() -> None:
    found = spread([0.0, 0.5, 0.7], [0, 4, 4])
    assert found["client_accuracy_worst"] == 0.5 and found["client_accuracy_mean"] == pytest.approx(0.6)
    assert spread([0.0], [0]) == spread([], []) == {}
    with pytest.raises(ValueError, match="zip"):
        spread([0.1], [])


def test_heavy_libraries_wait_until_they_are_needed() -> None:
    loaded = "'torchmetrics' in sys.modules, 'torch._dynamo' in sys.modules"
    code = f"import sys, fedsim.tasks.metrics, fedsim.tasks.cnn; print({loaded})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
