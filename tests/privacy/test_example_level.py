"""DP-SGD at the clients: against a loop over examples, against Opacus, and as noise."""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from worlds import KEY, points, quadratic, same

from clients import dp_sgd
from clients.sgd import SgdConfig, sgd
from fedsim import block, data, registry, tree
from fedsim.autodiff import value_and_grad
from fedsim.block import Guest, Work
from fedsim.config import EngineConfig
from fedsim.errors import ConfigError
from fedsim.grids.inline import InlineGrid
from fedsim.memory import Memory
from fedsim.rng import Key
from fedsim.tasks.module import from_module
from fedsim.types import Batch, Schedule, Task, Tree
from runs import experiment
from server.reduce import collect
from strategies import fedavg


def digits(model: str, dtype: str = "float32") -> tuple[Task, Batch]:
    setup = experiment(f"task.model={model}", f"task.dtype={dtype}")
    federation = data.federation(setup.data, setup.seed).to(torch.device("cpu"), getattr(torch, dtype))
    task: Task = registry.load("tasks", model).build(setup.task, federation.dataset, len(federation))
    train = federation.dataset.train
    return task, Batch(train.x[:24], train.y[:24])


class Characters(nn.Module):
    """What cannot be batched: PyTorch's fused LSTM has no batching rule."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.rnn = nn.LSTM(4, 6, 2, batch_first=True)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.rnn(self.embedding(x))[0])
        return out


def characters() -> tuple[Task, Batch]:
    generator = Key.root(8).torch()
    x, y = (torch.randint(10, (24, 5), generator=generator) for _ in range(2))
    return from_module(Characters, 10, 4, torch.float32, (x, y)), Batch(x, y)


def by_hand(task: Task, w: Tree, batch: Batch, clip: float) -> Tree:
    """Σ g_i min(1, C/‖g_i‖), one example after the other."""
    total = tree.zeros(w)
    for i in range(len(batch.y)):
        g = value_and_grad(task.loss)(w, Batch(batch.x[i : i + 1], batch.y[i : i + 1]))[1]
        total = tree.axpy(min(1.0, clip / (float(tree.norm(g)) + 1e-6)), g, total)
    return total


def distance(a: Tree, b: Tree) -> float:
    return float(tree.norm(tree.sub(a, b)) / tree.norm(b))


@pytest.mark.parametrize("clip", [0.05, 0.7, 1e6])
@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
def test_without_noise_both_ways_are_the_loop(model: str, clip: float) -> None:
    task, batch = digits(model)
    w, n = task.init(KEY.torch()), torch.tensor(100)
    expected = tree.scale(1 / 32, by_hand(task, w, batch, clip))
    generator = KEY.wide()
    for asked in ("batched", "opacus"):
        private = dp_sgd.private(task, 0.0, clip, 32, asked).private  # type: ignore[arg-type]
        assert private
        got = private.gradient(w, batch, private.draw(generator), n)
        assert distance(got, expected) < 1e-6
        assert got.keys() == w.keys()


def test_a_model_that_cannot_be_batched_goes_through_opacus() -> None:
    task, batch = characters()
    assert task.unbatchable
    assert dp_sgd.way(task, "auto") == "opacus"
    w = task.init(KEY.torch())
    private = dp_sgd.private(task, 0.0, 0.3, 24, "auto").private
    assert private
    got = private.gradient(w, batch, KEY.wide(), torch.tensor(24))
    assert distance(got, tree.scale(1 / 24, by_hand(task, w, batch, 0.3))) < 1e-6


def test_padding_adds_nothing() -> None:
    task, batch = digits("mlp")
    w = task.init(KEY.torch())
    padded = Batch(
        torch.cat([batch.x, batch.x[:5] * 100]),
        torch.cat([batch.y, batch.y[:5]]),
        torch.cat([torch.ones(24), torch.zeros(5)]),
    )
    assert distance(dp_sgd.clipped_sum(task, w, padded, 0.3), dp_sgd.clipped_sum(task, w, batch, 0.3)) < 1e-6


@pytest.mark.parametrize("asked", ["batched", "opacus"])
@pytest.mark.parametrize("number", [math.nan, math.inf, 1e38, -1e38])
def test_one_example_moves_the_sum_by_at_most_c(asked: Any, number: float) -> None:
    task, batch = digits("logistic")
    w = task.init(KEY.torch())
    x = batch.x.clone()
    x[3] = number
    private = dp_sgd.private(task, 0.0, 0.5, 1, asked).private
    assert private
    one = torch.tensor(1)
    with_it = private.gradient(w, Batch(x, batch.y), private.draw(KEY.wide()), one)
    rest = [i for i in range(24) if i != 3]
    without = private.gradient(w, Batch(x[rest], batch.y[rest]), private.draw(KEY.wide()), one)
    assert float(tree.norm(tree.sub(with_it, without))) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("asked", ["batched", "opacus"])
@pytest.mark.parametrize("examples", [0, 24])
def test_the_noise_has_its_scale_to_one_percent(asked: Any, examples: int) -> None:
    """N(0, (σ C / min(B, n))²) on every tensor, in an empty batch too; 1 % more or less is rejected."""
    task, batch = digits("mlp")
    w, own = task.init(KEY.torch()), torch.tensor(40)
    some = Batch(batch.x[:examples], batch.y[:examples])
    noisy, still = (dp_sgd.private(task, s, 0.5, 8, asked).private for s in (1.3, 0.0))
    assert noisy and still
    generator = KEY.wide()
    mean = still.gradient(w, some, still.draw(KEY.wide()), own)
    # Noise of float32 parameters is small beside nothing here: means are subtracted in float64.
    draws = []
    for _ in range(1 + 400_000 // sum(x.numel() for x in w.values())):
        g = noisy.gradient(w, some, noisy.draw(generator), own)
        parts = {n: (g[n].double() - mean[n].double()) * 8 / (1.3 * 0.5) for n in w}
        assert all(abs(float(p.std()) - 1) < 6 / math.sqrt(2 * p.numel()) for p in parts.values() if p.numel() > 50)
        draws.append(torch.cat([p.reshape(-1) for p in parts.values()]))
    noise = torch.cat(draws).numpy()

    def accepted(scale: float) -> bool:
        statistic = float((noise**2).sum()) / scale**2
        return bool(2 * min(stats.chi2.cdf(statistic, noise.size), stats.chi2.sf(statistic, noise.size)) > 1e-6)

    assert accepted(1.0)
    assert not accepted(1.01)
    assert not accepted(0.99)
    assert stats.kstest(noise[:100_000], "norm").pvalue > 1e-6


def test_both_ways_of_noise_have_one_distribution() -> None:
    task, batch = digits("logistic")
    w, n = task.init(KEY.torch()), torch.tensor(100)
    samples = []
    for asked in ("batched", "opacus"):
        private = dp_sgd.private(task, 1.0, 0.5, 16, asked).private  # type: ignore[arg-type]
        assert private
        generator = KEY.wide()
        rows = [private.gradient(w, batch, private.draw(generator), n) for _ in range(60)]
        samples.append(np.concatenate([torch.cat([x.reshape(-1) for x in r.values()]).numpy() for r in rows]))
    assert stats.ks_2samp(*samples).pvalue > 1e-4


WORLD = points([[[float(i + 10 * k), 1.0] for i in range(3 + 5 * k)] for k in range(4)])
TASK = quadratic(WORLD, [1.0, 2.0])


def visits(task: Task, batch_size: int, execution: str, key: Key = KEY, **config: Any) -> list[Tree]:
    """Each client's update in one visit."""
    local = sgd(task, SgdConfig(name="x", lr=0.1, batch_size=batch_size, **config))
    work = Work(1, 0, local, {"params": task.init(KEY.torch())}, key)
    engine = EngineConfig.model_validate({"execution": execution, "block": 4})
    return [r.value["delta"] for r in InlineGrid(WORLD, engine, Memory()).map(work, range(4), collect()).folded]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_block_of_clients_has_the_same_numbers(batch_size: int, optimizer: str) -> None:
    private = dp_sgd.private(TASK, 0.8, 0.5, batch_size, "batched")
    one, many = (visits(private, batch_size, e, optimizer=optimizer, epochs=3) for e in ("plain", "batched"))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a["w"], b["w"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_block_of_networks_has_the_same_numbers(model: str) -> None:
    """Ghost norms of a block at once (mlp), and vmap in vmap (cnn), against one client at a time; n from 1 to 100."""
    small = "task={model='mlp',hidden=[16]}" if model == "mlp" else "task={model='cnn',channels=[2,3],hidden=8}"
    setup = experiment(small, "task.dtype=float64", "data.partition={name='dirichlet',clients=12,alpha=0.3}")
    federation = data.federation(setup.data, setup.seed).to(torch.device("cpu"), torch.float64)
    task: Task = registry.load("tasks", model).build(setup.task, federation.dataset, len(federation))
    private = dp_sgd.private(task, 0.5, 0.3, 16, "batched")
    local = sgd(private, SgdConfig(name="x", lr=0.2, batch_size=16))
    work = Work(1, 0, local, {"params": task.init(KEY.torch())}, KEY)
    ends = []
    for execution in ("plain", "batched"):
        engine = EngineConfig.model_validate({"execution": execution, "block": 4})
        reports = InlineGrid(federation, engine, Memory()).map(work, range(6), collect()).folded
        ends.append([r.value["delta"] for r in reports])
    for a, b in zip(*ends, strict=True):
        assert distance(a, b) < 1e-10


def test_without_noise_and_clipping_it_is_sgd_on_poisson_batches() -> None:
    """B = n: every batch is all examples, and the clipped mean is the mean."""
    private = dp_sgd.private(TASK, 0.0, 1e9, 100, "batched")
    for a, b in zip(visits(private, 100, "plain", epochs=2), visits(TASK, 100, "plain", epochs=2), strict=True):
        torch.testing.assert_close(a["w"], b["w"], rtol=1e-7, atol=1e-9)


def test_noise_differs_between_clients_rounds_and_steps_and_follows_the_secret() -> None:
    private = dp_sgd.private(TASK, 1.0, 1e-9, 1, "batched")  # so small a C that updates are noise, in units of 10⁻⁹
    w = {"params": private.init(KEY.torch())}
    local = sgd(private, SgdConfig(name="x", lr=1.0, batch_size=1, steps=1))
    seen = []
    for key in (KEY, Key(KEY.seed, bytes(16))):
        for round in (1, 2):
            for client in (0, 1):
                done, _ = block.one(Work(round, 0, local, w, key), WORLD, Guest(client, None))
                seen.append(tuple(done.value["delta"]["w"].tolist()))
    assert len(set(seen)) == len(seen)
    two = sgd(private, SgdConfig(name="x", lr=1.0, batch_size=1, steps=2))
    done, _ = block.one(Work(1, 0, two, w, KEY), WORLD, Guest(0, None))
    assert not np.allclose(done.value["delta"]["w"].numpy(), 2 * np.array(seen[0]), rtol=0.1, atol=0)


def test_poisson_batches_have_the_rate_that_is_accounted_for() -> None:
    drawn = block.batches(Schedule(8, steps=5000, sampling="poisson"), 40, KEY.at("b"))
    sizes, seen = np.array([len(b) for b in drawn]), np.bincount(np.concatenate(drawn), minlength=40)
    observed = np.bincount(sizes, minlength=41)[2:16]
    expected = stats.binom(40, 0.2).pmf(range(2, 16))
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-6
    assert np.abs(seen - 1000).max() < 5 * math.sqrt(800)
    assert len(block.batches(Schedule(8, epochs=3, sampling="poisson"), 41, KEY)) == 18
    assert all(len(b) == 5 for b in block.batches(Schedule(8, epochs=3, sampling="poisson"), 5, KEY))
    assert block.batches(Schedule(8, epochs=3, sampling="poisson"), 0, KEY) == []


def test_a_wide_stream_has_all_of_its_name() -> None:
    """torch keeps 32 bits of a seed on a CPU: two keys that agree there had one stream."""
    assert torch.equal(*(torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (1, 1 + (1 << 32))))
    a, b = Key(0, bytes(16)), Key(0, bytes(15) + b"\x01")
    assert not torch.equal(torch.randn(4, generator=a.wide()), torch.randn(4, generator=b.wide()))
    assert torch.equal(torch.randn(4, generator=a.wide()), torch.randn(4, generator=a.wide()))
    sample = torch.randn(300_000, generator=b.wide(), dtype=torch.float64).numpy()
    assert stats.kstest(sample, "norm").pvalue > 1e-6


def test_nothing_but_the_noisy_gradient_can_be_had() -> None:
    private = dp_sgd.private(TASK, 1.0, 1.0, 4, "batched")
    w = private.init(KEY.torch())
    for ask in (lambda: private.loss(w, Batch(w["w"], w["w"])), lambda: private.predict(w, w["w"])):
        with pytest.raises(ConfigError, match="looks at examples in a way of its own"):
            ask()


def test_clients_without_noise_keep_their_bits() -> None:
    """The seam costs nobody anything: FedAvg's step is the plain gradient's."""
    strategy = fedavg.build(fedavg.Config(lr=0.1, batch_size=4), TASK)
    work = Work(1, 0, strategy.phases[0].local, {"params": TASK.init(KEY.torch())}, KEY)
    done, _ = block.one(work, WORLD, Guest(0, None))
    p = WORLD.dataset.train.x[WORLD.indices(0, "train")].mean(0)
    assert same(
        done.value["delta"], {"w": -0.1 * (torch.tensor([1.0, 2.0], dtype=torch.float64) - p)}
    ) or torch.allclose(
        done.value["delta"]["w"], -0.1 * (torch.tensor([1.0, 2.0], dtype=torch.float64) - p), rtol=1e-14
    )


class Scaled(nn.Module):
    """A trainable layer with a buffer, of which Opacus cannot know what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("unit", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.weight * self.unit
        return out


def odd() -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Linear(4, 3), scale=Scaled()))


class Centred(nn.Module):
    """An example's logits depend on the others of its batch: there is no gradient of an example alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x - x.mean(0))
        return out


def test_a_layer_without_gradients_of_examples_is_named() -> None:
    task = from_module(odd, 3, 4, torch.float32, (torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(ConfigError, match=r"privacy\.grad_sample: layer 'scale' \(Scaled\)"):
        dp_sgd.way(task, "opacus")
    x, y = torch.randn(6, 4, generator=KEY.torch()), torch.zeros(6, dtype=torch.int64)
    mixing = dp_sgd.private(from_module(Centred, 3, 4, torch.float32, (x, y)), 0.0, 1.0, 6, "opacus")
    assert mixing.private
    with pytest.raises(ConfigError, match="mixes the examples of a batch"):
        mixing.private.gradient(mixing.init(KEY.torch()), Batch(x, y), KEY.wide(), torch.tensor(6))
    lstm, _ = characters()
    with pytest.raises(ConfigError, match="cannot be used for this model"):
        dp_sgd.way(lstm, "batched")
