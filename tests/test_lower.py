"""Layers written out by hand: the numbers of autograd, for what is recognised; nothing else is."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.sgd import SgdConfig, sgd
from fedsim import block, tree
from fedsim.autodiff import value_and_grad
from fedsim.block import Guest, Work
from fedsim.config import EngineConfig
from fedsim.data.dataset import Dataset, Federation, Split
from fedsim.data.partition import Lists
from fedsim.grids import inline
from fedsim.grids.inline import InlineGrid, Way, way
from fedsim.lower import lower
from fedsim.memory import Memory
from fedsim.replay import Again
from fedsim.rng import Key
from fedsim.tasks.module import from_module
from fedsim.types import Batch, Pass, Payload, Reports, Task, Tree
from server.loop import run_round
from server.reduce import weighted_mean
from strategies import fedavg, fedprox, scaffold

K, B, CLASSES = 3, 4, 5


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(72, 7),
        nn.ReLU(),
        nn.Sequential(nn.Linear(7, 6, bias=False), nn.ReLU()),
        nn.Linear(6, 5),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 3, 3, padding="same"),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(3, 4, 2, stride=1, padding=1, dilation=2, bias=False),
            pool2=nn.MaxPool2d(2, stride=1),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            fc=nn.Linear(4 * 2 * 2, 5),
        )
    )


def grey() -> nn.Module:
    """One input channel, as in the benchmarks: its layout is ambiguous."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 12)), nn.Conv2d(1, 3, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
    )


def pooled() -> nn.Module:
    """Layers without parameters come first."""
    return nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))


MODELS = {
    "mlp": (mlp, (2, 6, 6)), "cnn": (cnn, (2, 6, 6)), "grey": (grey, (12, 8)), "pooled": (pooled, (2, 6, 6)),
}  # fmt: skip


def world(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tree, Batch]:
    make, shape = MODELS[name]
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    module = make().to(dtype)
    params = {
        n: p.detach()[None] + 0.3 * torch.randn(K, *p.shape, generator=g, dtype=dtype)
        for n, p in module.named_parameters()
    }
    x = torch.randn(K, B, *shape, generator=g, dtype=dtype)
    y = torch.randint(CLASSES, (K, B), generator=g)
    return module, params, Batch(x, y, None)


def reference(module: nn.Module, params: Tree, batch: Batch) -> tuple[Tensor, Tree]:
    """Client by client with autograd; a loss of padding alone is 0."""

    def loss(p: Tree, b: Batch) -> Tensor:
        each = cross_entropy(torch.func.functional_call(module, p, (b.x,)), b.y, reduction="none")
        weight = torch.ones_like(each) if b.weight is None else b.weight
        return (weight * each).sum() / weight.sum().clamp_min(1e-30)

    values, grads = [], []
    for k in range(K):
        mine = Batch(batch.x[k], batch.y[k], None if batch.weight is None else batch.weight[k])
        value, g = value_and_grad(loss)({n: p[k] for n, p in params.items()}, mine)
        values.append(value)
        grads.append(g)
    return torch.stack(values), {n: torch.stack([g[n] for g in grads]) for n in params}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weight", ["none", "some", "padding alone"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gradients_and_steps_are_autograds(name: str, weight: str, dtype: torch.dtype, tolerance: float) -> None:
    module, params, batch = world(name, dtype)
    if weight != "none":
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=dtype)
        if weight == "padding alone":
            mask[2] = 0
        batch = batch._replace(weight=mask)
    chain = lower(module, (batch.x[0], batch.y[0]))
    assert chain is not None
    before = {n: p.clone() for n, p in params.items()}
    values, grads = reference(module, params, batch)

    found, gradients = chain.block(params, batch)
    torch.testing.assert_close(found, values, rtol=tolerance, atol=tolerance)
    assert list(gradients) == list(params)
    torch.testing.assert_close(gradients, grads, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(params[n], before[n]) for n in params)

    own, rate = chain.own(params), torch.tensor([0.5, 0.25, 0.0], dtype=dtype)
    sums = chain.descend(own, batch, rate)
    n = torch.full((K,), B, dtype=dtype) if batch.weight is None else batch.weight.sum(1)
    torch.testing.assert_close(sums, values * n, rtol=tolerance, atol=tolerance)
    expected = {name: p - rate.view(K, *[1] * (p.ndim - 1)) * grads[name] for name, p in params.items()}
    torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(params[n], before[n]) for n in params)


@pytest.mark.parametrize("name", MODELS)
def test_a_client_is_alone_in_a_block(name: str) -> None:
    """Whatever another client's numbers are, NaN even, a client's own are the same to the bit."""
    module, params, batch = world(name, torch.float64)
    chain = lower(module, (batch.x[0], batch.y[0]))
    assert chain is not None
    _, grads = chain.block(params, batch)
    x = batch.x.clone()
    x[1] = float("nan")
    _, spoiled = chain.block(params, batch._replace(x=x))
    for n in params:
        assert torch.equal(grads[n][0], spoiled[n][0]) and torch.equal(grads[n][2], spoiled[n][2])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weight", ["none", "some", "a broken example"])
def test_clipped_sums_are_those_of_examples_one_by_one(name: str, weight: str) -> None:
    module, params, batch = world(name, torch.float64)
    x = batch.x.clone()
    if weight == "a broken example":
        x[1, 2] = float("inf")
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.float64)
    batch = Batch(x, batch.y, mask if weight == "some" else None)
    chain = lower(module, (batch.x[0], batch.y[0]))
    assert chain is not None
    clip, kept = 0.7, 0
    expected = {n: torch.zeros_like(p) for n, p in params.items()}
    for k in range(K):
        for i in range(B):
            if (weight == "some" and not mask[k, i]) or (weight == "a broken example" and (k, i) == (1, 2)):
                continue
            mine = {n: p[k].clone().requires_grad_() for n, p in params.items()}
            loss = cross_entropy(torch.func.functional_call(module, mine, (x[k, i : i + 1],)), batch.y[k, i : i + 1])
            grads = torch.autograd.grad(loss, list(mine.values()))
            norm = float(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
            kept += norm < clip
            for n, g in zip(mine, grads, strict=True):
                expected[n][k] += g * min(1.0, clip / (norm + 1e-6))
    assert kept < K * B  # clipping is seen
    block_wise = torch.vmap(
        lambda p, b: chain.clipped_sum(p, b, clip), in_dims=(0, Batch(0, 0, 0 if weight == "some" else None))
    )
    torch.testing.assert_close(block_wise(params, batch), expected, rtol=1e-10, atol=1e-12)
    one = chain.clipped_sum(
        {n: p[1] for n, p in params.items()}, Batch(*(None if t is None else t[1] for t in batch)), clip
    )  # type: ignore[arg-type]
    torch.testing.assert_close(one, {n: g[1] for n, g in expected.items()}, rtol=1e-10, atol=1e-12)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    net[0].weight.requires_grad_(False)
    return net


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    net[1].weight = net[0].weight
    return net


def same_layer() -> nn.Module:
    one = nn.Linear(4, 4)
    return nn.Sequential(one, one, nn.Linear(4, 5))


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5))
    net[0].register_forward_hook(lambda m, a, out: out + 1)
    return net


def patched() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5))
    net[0].forward = lambda x: x @ torch.ones(4, 5)
    return net


class Half(nn.Flatten):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)))


REFUSED = {
    "a subclass": lambda: nn.Sequential(Twice(4, 5)),
    "frozen": frozen,
    "tied": tied,
    "a subclass without parameters": lambda: nn.Sequential(Half(), nn.Linear(4, 5)),
    "the same layer twice": same_layer,
    "a hook": hooked,
    "another forward": patched,
    "a parametrization": parametrized,
    "tanh": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 5)),
    "an activation at the end": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU()),
    "no chain": lambda: nn.ModuleList([nn.Linear(4, 5)]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_plain_is_left_alone(why: str) -> None:
    assert lower(REFUSED[why](), (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))) is None


IMAGES: dict[str, Any] = {
    "grouped": lambda: nn.Conv2d(2, 4, 3, groups=2),
    "reflected": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
    "lopsided": lambda: nn.Conv2d(2, 4, 2, padding="same"),
    "pooled up": lambda: nn.MaxPool2d(4, ceil_mode=True),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("why", IMAGES)
def test_what_is_not_a_plain_convolution_is_left_alone(why: str) -> None:
    layer = IMAGES[why]()
    features = layer(torch.zeros(1, 2, 6, 6)).flatten(1).shape[1]
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(features, 5))
    assert lower(net, (torch.zeros(2, 2, 6, 6), torch.zeros(2, dtype=torch.int64))) is None


def test_sequences_are_left_alone() -> None:
    assert lower(nn.Sequential(nn.Linear(4, 5)), (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))) is None


# --- In the engine ---------------------------------------------------------------------------------------------------

SIZES = (9, 4, 17, 1, 6, 12, 3)


def federation(name: str, dtype: torch.dtype) -> tuple[Federation, Task]:
    make, shape = MODELS[name]
    g = torch.Generator().manual_seed(0)
    n = sum(SIZES)
    split = Split(torch.randn(n, *shape, generator=g, dtype=dtype), torch.randint(CLASSES, (n,), generator=g))
    partition = Lists(np.split(np.arange(n), np.cumsum(SIZES)[:-1]))
    task = from_module(make, CLASSES, len(SIZES), dtype, (split.x[:1], split.y[:1]))
    return Federation(Dataset("d", split, split, CLASSES), partition, 0.0, Key.root(1)), task


STRATEGIES: dict[str, Any] = {
    "fedavg": (fedavg, {}),
    "decay": (fedavg, {"weight_decay": 0.1}),
    "fedprox": (fedprox, {"mu": 0.5, "weight_decay": 0.01}),
    "scaffold": (scaffold, {}),
    "uniform": (fedavg, {"weighting": "uniform", "epochs": None, "steps": 5}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", STRATEGIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_blocks_agree_with_one_by_one(
    name: str, which: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether their steps are taken from Python or from a recording."""
    clients, task = federation(name, dtype)
    module, more = STRATEGIES[which]
    config = module.Config(**({"lr": 0.1, "epochs": 2, "batch_size": 4} | more))
    strategy = module.build(config, task)
    assert block.lowered(strategy.phases[0].local.passes[0])
    results = []
    for how in (Way(8, False), Way(4, True), Way(4, True, Again())):
        memory = Memory()
        grid = InlineGrid(clients, EngineConfig(), memory)
        monkeypatch.setattr(inline, "way", lambda *_, how=how: how)
        state = strategy.init(Key.root(0).torch())
        for number in (1, 2, 3):
            state, trained = run_round(strategy, state, number, list(range(len(SIZES))), grid, Key.root(0))
        results.append((strategy.params(state), [memory.get(c) for c in range(len(SIZES))], trained))
    (w, remembered, plain), *others = results
    for fast_w, fast_remembered, fast in others:
        torch.testing.assert_close(fast_w, w, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(fast_remembered, remembered, rtol=tolerance * 10, atol=tolerance * 10)
        assert fast.metrics == pytest.approx(plain.metrics, rel=1e-5) and fast[1:] == plain[1:]


def test_auto_picks_blocks_where_every_step_is_written_out() -> None:
    clients, task = federation("mlp", torch.float32)
    data, config = clients.dataset.train, SgdConfig(name="x", lr=0.1)
    local = sgd(task, config)
    assert way(EngineConfig(), data, local).stacked
    assert not way(EngineConfig(execution="plain"), data, local).stacked
    assert not way(EngineConfig(), data, sgd(task, SgdConfig(name="x", lr=0.1, momentum=0.9))).stacked
    assert not way(EngineConfig(), data, local._replace(unbatchable="a reason")).stacked
    wide = data._replace(x=data.x.double())
    assert not way(EngineConfig(), wide, local).stacked  # no fast convolution in float64


def test_a_step_that_was_wrapped_or_replaced_is_never_bypassed() -> None:
    clients, task = federation("mlp", torch.float32)
    local = sgd(task, SgdConfig(name="x", lr=0.1))
    of = local.passes[0]

    def nothing(shared: Payload, carry: Any, batch: Batch, draw: Any) -> Any:
        return carry

    replaced = local._replace(passes=(of._replace(step=nothing),))
    assert block.lowered(of) and block.lowered(replaced.passes[0]) is None
    assert block.lowered(Pass(of.step, of.schedule)) is None
    w = task.init(Key.root(0).torch())
    done, _ = block.batched(
        Work(1, 0, replaced, {"params": w}, Key.root(0)), clients, [Guest(0, None), Guest(1, None)]
    )[0]
    assert all(x.eq(0).all() for x in done.value["delta"].values())


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_block_is_reduced_to_the_bits_of_the_fold(clients: int, weighting: str) -> None:
    from fedsim.fold import leaves
    from fedsim.types import Report

    reduce = weighted_mean(weighting)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(clients)
    value = {"delta": {"a": torch.randn(clients, 300, generator=g), "b": torch.randn(clients, generator=g)}}
    examples = torch.randint(1, 99, (clients,), generator=g).tolist()
    losses = torch.rand(clients, generator=g, dtype=torch.float64).tolist()
    assert reduce.stack
    whole = reduce.stack(Reports(list(range(clients)), examples, value, {"loss": losses}))
    each = [
        reduce.lift(
            Report(k, examples[k], {"delta": {n: x[k] for n, x in value["delta"].items()}}, {"loss": losses[k]})
        )
        for k in range(clients)
    ]
    (node,) = leaves(each, 0, clients, reduce.merge, clients)
    assert node.value is not None and whole[1:] == node.value[1:]
    assert tree.digest(whole.value["delta"]) == tree.digest(node.value.value["delta"])
