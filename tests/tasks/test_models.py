"""What every task must keep, and what each one is."""

import random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tasks.toys import dataset, text
from torch import Tensor

from fedsim import registry, tree
from fedsim.autodiff import value_and_grad
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.tasks import char_gru, char_lstm, cnn, logistic, mlp, resnet18
from fedsim.types import Batch, Task

SMALL: list[tuple[ModuleType, dict[str, Any], Dataset]] = [
    (logistic, {}, dataset(8, 8)),
    (mlp, {"hidden": [9, 7]}, dataset(1, 8, 8)),
    (cnn, {"channels": [3, 4], "hidden": 6}, dataset(8, 8)),
    (cnn, {"channels": [3, 4], "hidden": 6, "padding": "valid"}, dataset(3, 16, 17)),
    (resnet18, {"width": 4}, dataset(1, 8, 8)),
    (char_lstm, {"hidden": 6, "embedding": 3}, text()),
    (char_gru, {"hidden": 6, "embedding": 3, "layers": 1}, text()),
]
IDS = ["logistic", "mlp", "cnn", "cnn-valid", "resnet18", "char_lstm", "char_gru"]
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SMALL, ids=IDS)
def case(request: pytest.FixtureRequest, dtype: str) -> tuple[Task, Batch]:
    """A task and a batch of five examples of its data, in its dtype."""
    module, fields, data = request.param
    task = module.build(module.Config(**fields, dtype=dtype), data, 4)
    x = data.train.x[:5]
    return task, Batch(x.to(getattr(torch, dtype)) if x.is_floating_point() else x, data.train.y[:5])


def start(task: Task, seed: int = 1) -> dict[str, Tensor]:
    return task.init(torch.Generator().manual_seed(seed))


def trained(task: Task, batch: Batch, seed: int = 1) -> dict[str, Tensor]:
    """Parameters a few steps on, where nothing is zero or symmetric any more."""
    params = start(task, seed)
    for _ in range(3):
        params = tree.axpy(-0.1, value_and_grad(task.loss)(params, batch)[1], params)
    return params


def test_every_task_of_ours_is_here() -> None:
    ours = {name for name, entry in registry.installed("tasks").items() if entry.value.startswith("fedsim.tasks.")}
    # Objectives, the teacher and text have tests of their own beside this file; lenet is the attacks' victim.
    elsewhere = {"quadratic", "attack", "metric", "objective", "teacher", "text", "lenet", "bottleneck"}
    assert ours == set(IDS) - {"cnn-valid"} | elsewhere
    for name in sorted(ours - elsewhere):
        assert registry.load("tasks", name).Config().model == name


def test_init_is_a_function_of_its_generator(case: tuple[Task, Batch], dtype: str) -> None:
    task, batch = case
    a = start(task)
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    b, other = start(task), start(task, seed=2)
    assert tree.digest(a) == tree.digest(b)
    # Logistic regression starts at zero, whatever the seed.
    assert (tree.digest(a) == tree.digest(other)) == (list(a) == ["linear.weight", "linear.bias"])
    assert all(p.dtype == getattr(torch, dtype) and not p.requires_grad and p.is_leaf for p in a.values())
    assert task.population == 4 and task.predict(a, batch.x).shape == (*batch.y.shape, task.classes)


def test_both_dtypes_start_from_one_point() -> None:
    for module, fields, data in SMALL:
        single, double = (start(module.build(module.Config(**fields, dtype=d), data, 1)) for d in TOLERANCE)
        assert tree.digest(single) == tree.digest(tree.map(torch.Tensor.float, double))


def test_the_global_generators_are_left_alone(case: tuple[Task, Batch]) -> None:
    module, fields, data = SMALL[2]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    case[0].init(torch.Generator().manual_seed(1))
    case[0].score(trained(*case), case[1])
    module.build(module.Config(**fields), data, 1)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    for now, before in zip(np.random.get_state(), states[2], strict=True):  # noqa: NPY002
        assert np.array_equal(now, before)


def test_padding_counts_for_nothing(case: tuple[Task, Batch], dtype: str) -> None:
    task, batch = case
    params, vg = trained(task, batch), value_and_grad(task.loss)
    mask = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float32)
    whole, kept = batch._replace(weight=mask), Batch(batch.x[mask > 0], batch.y[mask > 0])
    (value, grads), (expected, gradient) = vg(params, whole), vg(params, kept)
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(value, expected, **near)
    for name in params:
        torch.testing.assert_close(grads[name], gradient[name], **near)
    torch.testing.assert_close(task.score(params, whole), task.score(params, kept), **near)
    torch.testing.assert_close(vg(params, batch._replace(weight=torch.ones(5))), vg(params, batch), **near)

    value, grads = vg(params, batch._replace(weight=torch.zeros(5)))  # a client that has finished before its block
    assert value == 0 and all(g.eq(0).all() for g in grads.values())


def test_the_loss_is_the_mean_negative_log_likelihood(case: tuple[Task, Batch], dtype: str) -> None:
    task, batch = case
    params = trained(task, batch)
    likelihood = task.predict(params, batch.x).double().softmax(-1).gather(-1, batch.y[..., None])[..., 0]
    near = {"abs": TOLERANCE[dtype], "rel": TOLERANCE[dtype]}
    assert task.loss(params, batch).item() == pytest.approx(-likelihood.log().mean().item(), **near)


def test_scores_are_sums(case: tuple[Task, Batch], dtype: str) -> None:
    task, batch = case
    params = trained(task, batch)
    whole = task.score(params, batch)
    parts = [task.score(params, Batch(batch.x[s], batch.y[s])) for s in (slice(0, 2), slice(2, 5))]
    for name, total in whole.items():
        assert total.shape == ()
        assert total.item() == pytest.approx((parts[0][name] + parts[1][name]).item(), rel=TOLERANCE[dtype])
    assert whole["count"] == batch.y.numel()
    assert whole["correct"] == (task.predict(params, batch.x).argmax(-1) == batch.y).sum()
    assert whole["loss"].item() == pytest.approx(
        task.loss(params, batch).item() * batch.y.numel(), rel=10 * TOLERANCE[dtype]
    )


def test_a_block_of_clients_agrees_with_one_by_one(case: tuple[Task, Batch], dtype: str) -> None:
    task, batch = case
    clients = [trained(task, batch, seed) for seed in range(3)]
    stacked = {name: torch.stack([c[name] for c in clients]) for name in clients[0]}
    order = [torch.arange(5).roll(k) for k in range(3)]
    weight = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]])
    block = Batch(torch.stack([batch.x[o] for o in order]), torch.stack([batch.y[o] for o in order]), weight)
    vg = value_and_grad(task.loss)
    if task.unbatchable:
        assert task.unbatchable.startswith("Batching rule not implemented for aten::")
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.vmap(task.score)(stacked, block)
        return
    values, grads = torch.vmap(vg)(stacked, block)
    scores = torch.vmap(task.score)(stacked, block)
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for k, params in enumerate(clients):
        b = Batch(*(t[k] for t in block))
        value, gradient = vg(params, b)
        torch.testing.assert_close(values[k], value, **near)
        torch.testing.assert_close({name: g[k] for name, g in grads.items()}, gradient, **near)
        torch.testing.assert_close({name: s[k] for name, s in scores.items()}, task.score(params, b), **near)


def test_only_the_recurrent_models_run_one_by_one() -> None:
    reasons = {i: m.build(m.Config(**f), d, 1).unbatchable for i, (m, f, d) in zip(IDS, SMALL, strict=True)}
    assert {name for name, reason in reasons.items() if reason} == {"char_lstm", "char_gru"}


CONV = 5 * 5
COUNTS = [
    (logistic, {}, dataset(28, 28), 784 * 10 + 10),
    (mlp, {}, dataset(28, 28), (784 + 1) * 200 + (200 + 1) * 200 + (200 + 1) * 10),  # 199,210: FedAvg's 2NN
    (mlp, {"hidden": [128]}, dataset(1, 28, 28), 101_770),
    # FedAvg's CNN: "1,663,370 total parameters"
    (cnn, {}, dataset(1, 28, 28), (CONV + 1) * 32 + (CONV * 32 + 1) * 64 + (7 * 7 * 64 + 1) * 512 + (512 + 1) * 10),
    # LEAF's, for FEMNIST: 62 classes and 2048 hidden units
    (cnn, {"hidden": 2048}, dataset(28, 28, classes=62), 26 * 32 + 801 * 64 + 3137 * 2048 + 2049 * 62),
    (cnn, {"channels": [16, 32], "hidden": 64, "padding": "valid"}, dataset(1, 28, 28), 46_730),
    (cnn, {}, dataset(8, 8), 26 * 32 + 801 * 64 + (2 * 2 * 64 + 1) * 512 + 513 * 10),
    (cnn, {}, dataset(3, 32, 32), (CONV * 3 + 1) * 32 + 801 * 64 + (8 * 8 * 64 + 1) * 512 + 513 * 10),
    (resnet18, {}, dataset(3, 32, 32, n=1), 11_173_962),
    # LEAF's Shakespeare, 80 characters; four (three) gates, two biases a gate
    (char_lstm, {}, text(vocabulary=80), 80 * 8 + 4 * 256 * (8 + 256 + 2) + 4 * 256 * (256 + 256 + 2) + 257 * 80),
    (char_gru, {}, text(vocabulary=80), 80 * 8 + 3 * 256 * (8 + 256 + 2) + 3 * 256 * (256 + 256 + 2) + 257 * 80),
]


@pytest.mark.parametrize(("module", "fields", "data", "count"), COUNTS)
def test_parameter_counts(module: ModuleType, fields: dict[str, Any], data: Dataset, count: int) -> None:
    params = start(module.build(module.Config(**fields), data, 1))
    assert sum(p.numel() for p in params.values()) == count


def test_parameter_names() -> None:
    names = {i: list(start(m.build(m.Config(**f), d, 1))) for i, (m, f, d) in zip(IDS, SMALL, strict=True)}
    assert names["logistic"] == ["linear.weight", "linear.bias"]
    assert names["mlp"] == [f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")]
    layers = ("conv1", "conv2", "fc1", "fc2")
    assert names["cnn"] == names["cnn-valid"] == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert {"stem.weight", "norm.bias", "stage4.1.norm2.weight", "stage2.0.shortcut.conv.weight"} <= set(
        names["resnet18"]
    )
    assert len(names["resnet18"]) == 62 and "stage1.0.shortcut.conv.weight" not in names["resnet18"]
    cells = [f"rnn.{part}_{side}h_l0" for part in ("weight", "bias") for side in "ih"]
    assert names["char_gru"] == ["embedding.weight", *cells, "fc.weight", "fc.bias"]


def test_logistic_regression_by_hand() -> None:
    # W = 0, one example x, y = 3: the loss is log 10 and ∂/∂W_c = (1/10 − [c = 3]) x.
    data = dataset(2, 2)
    task = logistic.build(logistic.Config(dtype="float64"), data, 1)
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    value, grads = value_and_grad(task.loss)(start(task), Batch(x, torch.tensor([3])))
    assert value.item() == pytest.approx(2.302585092994046, abs=1e-14)
    assert grads["linear.weight"][3].tolist() == pytest.approx([-0.9, -1.8, -2.7, -3.6], abs=1e-14)
    assert grads["linear.weight"][0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-14)
    assert grads["linear.bias"].sum().item() == pytest.approx(0, abs=1e-14)


def test_the_cnn_by_its_definition() -> None:
    # ReLU before the pooling, as the paper has it
    task = cnn.build(cnn.Config(channels=(3, 4), hidden=6, dtype="float64"), dataset(3, 9, 8), 1)
    p, x = start(task), dataset(3, 9, 8).train.x.double()
    for layer in ("conv1", "conv2"):
        x = F.max_pool2d(F.conv2d(x, p[f"{layer}.weight"], p[f"{layer}.bias"], padding=2).relu(), 2)
    hidden = (x.flatten(1) @ p["fc1.weight"].T + p["fc1.bias"]).relu()
    logits = hidden @ p["fc2.weight"].T + p["fc2.bias"]
    torch.testing.assert_close(task.predict(p, dataset(3, 9, 8).train.x.double()), logits)


def test_the_resnet_by_its_definition() -> None:
    task = resnet18.build(resnet18.Config(width=4, groups=2, dtype="float64"), dataset(1, 16, 16), 1)
    p, images = start(task), dataset(1, 16, 16).train.x.double()

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        w = p[f"{conv}.weight"]
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        return F.group_norm(x, 2, p[f"{norm}.weight"], p[f"{norm}.bias"])

    x = layer(images, "stem", "norm").relu()
    for stage in (1, 2, 3, 4):
        for i in (0, 1):
            name, stride = f"stage{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = layer(x, f"{name}.conv1", f"{name}.norm1", stride).relu()
            y = layer(y, f"{name}.conv2", f"{name}.norm2")
            x = layer(x, f"{name}.shortcut.conv", f"{name}.shortcut.norm", stride) if stride == 2 else x
            x = (x + y).relu()
    assert x.shape[1:] == (32, 2, 2)
    logits = x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
    torch.testing.assert_close(task.predict(p, images), logits)


@pytest.mark.parametrize("module", [char_lstm, char_gru])
def test_the_next_character_is_predicted_from_those_before(module: ModuleType) -> None:
    data = text()
    task = module.build(module.Config(hidden=6, dtype="float64"), data, 1)
    params, x = start(task), data.train.x
    before, after = task.predict(params, x), task.predict(params, torch.cat([x[:, :4], (x[:, 4:] + 1) % 11], 1))
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


def test_grey_images_with_and_without_a_channel_are_one_model() -> None:
    for module, fields in ((cnn, {"channels": [2, 2], "hidden": 3}), (resnet18, {"width": 2})):
        flat, deep = (module.build(module.Config(**fields), d, 1) for d in (dataset(8, 8), dataset(1, 8, 8)))
        x = dataset(8, 8).train.x
        assert torch.equal(flat.predict(start(flat), x), deep.predict(start(deep), x[:, None]))


WRONG = [
    (logistic, {}, text(), "task.model: needs floating inputs, and toy text has torch.int64"),
    (cnn, {}, dataset(64), r"task.model: needs images .*inputs of shape \(64,\)"),
    (cnn, {}, dataset(3, 8), r"task.padding: 'same' needs images of at least 4×4 \(got 3×8\)"),
    (
        cnn,
        {"padding": "valid"},
        dataset(15, 16),
        r"task.padding: 'valid' needs images of at least 16×16, .*\(got 15×16\)",
    ),
    (resnet18, {"width": 5}, dataset(8, 8), r"task.groups: must divide task.width, 5 \(got 2\)"),
    (char_lstm, {}, dataset(8), "needs characters"),
    (char_gru, {}, text()._replace(train=text().train._replace(y=text().train.y[:, 0])), "needs characters"),
]


@pytest.mark.parametrize(("module", "fields", "data", "message"), WRONG)
def test_data_that_does_not_fit_is_refused(
    module: ModuleType, fields: dict[str, Any], data: Dataset, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        module.build(module.Config(**fields), data, 1)


def test_the_smallest_images_fit() -> None:
    for fields, data in (({}, dataset(4, 4)), ({"padding": "valid"}, dataset(16, 16))):
        cnn.build(cnn.Config(channels=(2, 2), hidden=2, **fields), data, 1)


@pytest.mark.parametrize(
    ("module", "fields"),
    [
        (mlp, {"hidden": []}),
        (mlp, {"hidden": [0]}),
        (mlp, {"hidden": ["9"]}),
        (cnn, {"channels": [8]}),
        (cnn, {"hidden": 0}),
        (char_lstm, {"layers": 0}),
        (logistic, {"hidden": [3]}),
        (logistic, {"dtype": "float16"}),
    ],
)
def test_configs_are_closed_and_bounded(module: ModuleType, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        module.Config(**fields)
