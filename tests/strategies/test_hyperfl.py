"""HyperFL, FedRep, FedPer and pFedHN: by hand, at their edges, and what exactly travels."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from worlds import KEY, grid, points, same, train

from clients import alternate
from clients.alternate import clipped, private_names
from clients.hypernet import hypernet
from fedsim import block, checkpoint, config, tree
from fedsim.autodiff import value_and_grad
from fedsim.block import Guest, Work
from fedsim.data.dataset import Dataset, Federation, Split
from fedsim.data.partition import Lists
from fedsim.errors import ConfigError
from fedsim.rng import Key
from fedsim.run import build, run
from fedsim.tasks import mlp
from fedsim.types import Batch, Done, Metrics, Payload, Strategy, Task, Tree
from server.loop import run_round
from strategies import centaur, fedper, fedrep, hyperfl, hyperfl_lpm, pfedhn, ppsgd

CLIENTS = 4
SMALL = {"embedding": 6, "hidden": 10, "batch_size": 5, "epochs": 2, "cohort": CLIENTS}


def blobs(sizes: tuple[int, ...] = (11, 8, 8, 13), dtype: torch.dtype = torch.float64) -> Federation:
    n, rng = sum(sizes), Key.root(0).at("blobs").numpy()
    y = rng.integers(3, size=n)
    x = rng.normal(size=(3, 5))[y] + 0.5 * rng.normal(size=(n, 5))
    split = Split(torch.from_numpy(x).to(dtype), torch.from_numpy(y))
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    rows = Lists([torch.arange(a, b).numpy() for a, b in pairwise(ends)])
    return Federation(Dataset("blobs", split, split, 3), rows, 0.0, KEY)


WORLD = blobs()
TASK: Task = mlp.build(mlp.Config(hidden=(7,), dtype="float64"), WORLD.dataset, CLIENTS)


def strategy(**settings: Any) -> Strategy[hyperfl.State]:
    return hyperfl.build(hyperfl.Config(**(SMALL | settings)), TASK)


def visit(
    s: Strategy[Any], state: Any, client: int = 0, memory: Payload | None = None, world: Federation = WORLD
) -> tuple[Done, Payload]:
    """One client's work, and the memory that it began with."""
    work = Work(1, 0, s.phases[0].local, s.phases[0].broadcast(state), KEY)
    before = block.remembered(work, Guest(client, memory))
    done, _ = block.one(work, world, Guest(client, before))
    return done, before


def begin(s: Strategy[Any]) -> Any:
    return s.init(KEY.at("init").torch())


# --- What travels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrization", ["default", "mip"])
@pytest.mark.parametrize("head", ["dense", "lowrank", "kronecker"])
def test_exactly_phi_travels_and_shares_nothing(parametrization: str, head: str) -> None:
    s = strategy(parametrization=parametrization, head=head)
    state = begin(s)
    done, before = visit(s, state)
    assert done.value.keys() == {"delta"} and done.value["delta"].keys() == state.phi.keys()
    assert done.memory.keys() == {"embed", "head"} and done.memory["embed"].keys() == {"v"}
    assert done.memory["head"].keys() == {"fc2.weight", "fc2.bias"}
    own = s.personal({"hyper": tree.add(state.phi, done.value["delta"])}, done.memory)  # type: ignore[misc]
    secret = [*done.memory["embed"].values(), *done.memory["head"].values(), *own.values()]
    secret += [x for part in before.values() for x in part.values()]
    places = {x.untyped_storage().data_ptr() for x in secret}
    for name, x in done.value["delta"].items():
        assert x.untyped_storage().data_ptr() not in places, name
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), f"{name} brings more than itself"
        assert not any(x.shape == y.shape and torch.equal(x, y) for y in secret), name


def test_dense_size_is_the_papers_formula() -> None:
    phi = begin(strategy(embedding=64, hidden=128)).phi
    theta = 5 * 7 + 7
    assert sum(x.numel() for x in phi.values()) == 64 * 128 + 128 + 129 * theta


def test_factored_heads_travel_lighter() -> None:
    task = mlp.build(mlp.Config(hidden=(200, 200)), WORLD.dataset, CLIENTS)
    sizes = {}
    for head in ("dense", "lowrank", "kronecker"):
        s = hyperfl.build(hyperfl.Config(head=head, rank=4), task)  # type: ignore[arg-type]
        sizes[head] = tree.nbytes(s.phases[0].broadcast(begin(s)))
    model = tree.nbytes({"": {n: x for n, x in task.init(KEY.torch()).items() if not n.startswith("fc3")}})
    assert sizes["dense"] / model > 125
    assert sizes["lowrank"] / model < 6
    assert sizes["kronecker"] / model < 5


# --- The two passes -----------------------------------------------------------------------------------------------


def run_pass(s: Strategy[Any], state: Any, which: int) -> tuple[alternate.Carry, alternate.Carry]:
    """A client's carry before and after one of its two passes."""
    local, shared = s.phases[0].local, s.phases[0].broadcast(state)
    work = Work(1, 0, local._replace(final=lambda shared, c: c), shared, KEY)
    runs = [local.passes[: which + n] for n in (0, 1)]
    carries = []
    for passes in runs:
        alone = work._replace(local=work.local._replace(passes=passes))
        carries.append(block.one(alone, WORLD, Guest(0, None))[0])
    return carries[0], carries[1]  # type: ignore[return-value]


def test_each_pass_changes_its_own_group_alone() -> None:
    s = strategy()
    before, after = run_pass(s, begin(s), 0)
    assert same(before.outer, after.outer) and not same(before.head, after.head)
    before, after = run_pass(s, begin(s), 1)
    assert same(before.head, after.head)
    assert all(not torch.equal(before.outer[n], after.outer[n]) for n in before.outer)  # φ and v both move


def test_the_gradient_is_the_two_step_vector_jacobian_product() -> None:
    """g_θ = ∂F/∂θ at θ = h(v; φ); then (∂h/∂φ)ᵀ g_θ and (∂h/∂v)ᵀ g_θ: what one pass 2 step subtracts."""
    s = strategy(steps=2, epochs=None, batch_size=64, momentum=0.0, weight_decay=0.0, clip=1e9, lr=1.0)
    state = begin(s)
    before, _ = run_pass(s, state, 1)
    rows = torch.from_numpy(WORLD.indices(0, "train"))
    batch = Batch(WORLD.dataset.train.x[rows], WORLD.dataset.train.y[rows])
    after = s.phases[0].local.passes[1].step(s.phases[0].broadcast(state), before, batch, None)
    body = {n: x for n, x in alternate.shapes(TASK).items() if not n.startswith("fc2")}
    net = hypernet(body, 6, (10,))
    theta, pull, *_ = torch.func.vjp(net.generate, state.phi, before.outer["v"])
    _, g = value_and_grad(lambda p, b: TASK.loss(p | before.head, b))(theta, batch)
    by_phi, by_v = pull(g)
    for name, want in (by_phi | {"v": by_v}).items():
        torch.testing.assert_close(before.outer[name] - after.outer[name], want, rtol=1e-10, atol=1e-12)


def test_gradients_are_clipped_in_two_groups() -> None:
    g = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "v": torch.tensor([1.0])}
    out = clipped(g, (["a", "b"], ["v"]), 2.0)
    torch.testing.assert_close(out, {"a": torch.tensor([1.2]), "b": torch.tensor([1.6]), "v": torch.tensor([1.0])})


def test_equal_clients_send_the_same_and_another_embedding_something_else() -> None:
    s = strategy(batch_size=64)  # one batch, so that the order of the examples does not matter
    state = begin(s)
    _, memory = visit(s, state)
    first, _ = visit(s, state, 1, memory)
    rows = WORLD.partition[1]
    twin = Federation(WORLD.dataset, Lists([rows, rows, rows]), 0.0, KEY)
    again, _ = visit(s, state, 2, memory, twin)
    assert tree.norm(tree.sub(first.value["delta"], again.value["delta"])) < 1e-12
    other, _ = visit(s, state, 1, memory | {"embed": {"v": memory["embed"]["v"] + 1}})
    assert not same(first.value["delta"], other.value["delta"])
    assert s.personal is not None
    shared = s.phases[0].broadcast(state)
    own = [s.personal(shared, m) for m in (memory, memory | {"embed": {"v": memory["embed"]["v"] + 1}})]
    assert not torch.equal(own[0]["fc1.weight"], own[1]["fc1.weight"])


def test_clients_draw_their_own_embedding_and_head() -> None:
    s = strategy()
    state = begin(s)
    memories = [visit(s, state, c)[1] for c in range(CLIENTS)]
    start = TASK.init(KEY.at("init").torch())  # what the server could know
    for i, mine in enumerate(memories):
        assert not torch.equal(mine["head"]["fc2.weight"], start["fc2.weight"])
        for other in memories[:i]:
            assert not torch.equal(mine["embed"]["v"], other["embed"]["v"])
            assert not torch.equal(mine["head"]["fc2.weight"], other["head"]["fc2.weight"])


# --- The server ---------------------------------------------------------------------------------------------------


def test_a_common_start_is_the_servers_and_travels_down_alone() -> None:
    s = strategy(common_start=True)
    state = begin(s)
    assert same(state.phi, begin(strategy()).phi) and state.start.keys() == {"v", "fc2.weight", "fc2.bias"}
    visits = [visit(s, state, client) for client in (0, 1)]
    for done, before in visits:
        assert same(before["embed"] | before["head"], state.start)
        assert done.value.keys() == {"delta"} and done.value["delta"].keys() == state.phi.keys()
    assert not same(visits[0][0].memory["embed"], visits[1][0].memory["embed"])
    after, _ = run_round(s, state, 1, list(range(CLIENTS)), grid(WORLD), KEY)
    assert same(after.start, state.start) and not same(after.phi, state.phi)


def test_aggregation_by_size_and_those_who_stay_at_home() -> None:
    s = strategy()
    executor = grid(WORLD)
    first = begin(s)
    state, _ = run_round(s, first, 1, list(range(CLIENTS)), executor, KEY)
    rest = {c: executor.memory.get(c) for c in (2, 3)}
    sent = {c: visit_again(s, state, c, executor.memory.get(c)) for c in (0, 1)}
    after, _ = run_round(s, state, 2, [0, 1], executor, KEY)
    mean = tree.scale(1 / 19, tree.add(tree.scale(11, sent[0]), tree.scale(8, sent[1])))
    torch.testing.assert_close(after.phi, tree.add(state.phi, mean), rtol=1e-12, atol=1e-14)
    assert all(executor.memory.get(c) is rest[c] for c in rest)  # untouched, and yet
    assert s.personal is not None
    kept = rest[2] or {}
    own = [s.personal(s.phases[0].broadcast(x), kept) for x in (state, after)]
    assert not torch.equal(own[0]["fc1.weight"], own[1]["fc1.weight"])  # they get the new φ
    assert torch.equal(own[0]["fc2.weight"], own[1]["fc2.weight"])


def visit_again(s: Strategy[Any], state: Any, client: int, memory: Payload | None) -> Tree:
    work = Work(2, 0, s.phases[0].local, s.phases[0].broadcast(state), KEY)
    return block.one(work, WORLD, Guest(client, memory))[0].value["delta"]


def test_one_client_is_local_training() -> None:
    s = strategy()
    executor = grid(WORLD)
    state, _ = run_round(s, begin(s), 1, [2], executor, KEY)
    done, _ = visit(s, begin(s), 2)
    torch.testing.assert_close(state.phi, tree.add(begin(s).phi, done.value["delta"]), rtol=1e-14, atol=1e-15)


# --- By hand ------------------------------------------------------------------------------------------------------

LINE = points([[[0.0], [2.0]], [[5.0]]])


def two_layers(federation: Federation) -> Task:
    """F = mean over p of ½(body + head − p)², with the parameters "body.w" and "head.b", both of shape (1,)."""

    def each(params: Tree, batch: Batch) -> Tensor:
        return 0.5 * ((params["body.w"] + params["head.b"] - batch.x) ** 2).sum(-1)

    def loss(params: Tree, batch: Batch) -> Tensor:
        w = torch.ones_like(batch.x[:, 0]) if batch.weight is None else batch.weight
        return (w * each(params, batch)).sum() / w.sum().clamp(min=1)

    def score(params: Tree, batch: Batch) -> Metrics:
        losses = each(params, batch)
        return {"count": torch.ones_like(losses).sum(), "correct": losses.sum() * 0, "loss": losses.sum()}

    start = {"body.w": torch.tensor([3.0], dtype=torch.float64), "head.b": torch.tensor([1.0], dtype=torch.float64)}
    return Task(lambda generator: dict(start), lambda p, x: x, loss, score, 2, len(federation))


HAND = {"batch_size": 8, "weighting": "uniform"}


def test_fedrep_by_hand() -> None:
    """Body 3, heads 1, points' means 1 and 5, both rates ½.

    Head first: residuals 3 + 1 − c are 3 and −1, heads 1 − 3/2 = −½ and 1 + ½ = 3/2. Then the body: residuals
    3 − ½ − 1 = 3/2 and 3 + 3/2 − 5 = −½; updates −¾ and ¼, mean −¼.
    """
    s = fedrep.build(fedrep.Config(**HAND, lr=0.5, head_lr=0.5), two_layers(LINE))
    executor = grid(LINE)
    state, _ = run_round(s, begin(s), 1, [0, 1], executor, KEY)
    assert float(state.phi["body.w"]) == 2.75
    assert [float((executor.memory.get(c) or {})["head"]["head.b"]) for c in (0, 1)] == [-0.5, 1.5]


def test_fedper_by_hand() -> None:
    """Both at once: residuals 3 and −1, so body and head of client 0 move by −3/2, of client 1 by ½: mean −½."""
    s = fedper.build(fedper.Config(**HAND, lr=0.5), two_layers(LINE))
    executor = grid(LINE)
    state, _ = run_round(s, begin(s), 1, [0, 1], executor, KEY)
    assert float(state.base["body.w"]) == 2.5
    assert [float((executor.memory.get(c) or {})["head"]["head.b"]) for c in (0, 1)] == [-0.5, 1.5]


def test_pfedhn_by_hand() -> None:
    """One step of ½ on both tensors of client 1 gives Δθ = (½, ½). The bias part of (∂θ/∂φ)ᵀ Δθ is Δθ itself."""
    s = pfedhn.build(pfedhn.Config(**HAND, lr=0.5, embedding=2, hidden=1, server_lr=1.0), two_layers(LINE))
    state = begin(s)
    memory: Payload = {"embed": {"v": torch.zeros(2, dtype=torch.float64)}}
    zero = tree.zeros(state.phi)
    zero |= {f"head.{n}.bias": torch.tensor([x], dtype=torch.float64) for n, x in (("body.w", 3.0), ("head.b", 1.0))}
    zero |= {"trunk.0.bias": torch.tensor([2.0], dtype=torch.float64)}  # so a = 2, and θ = b
    done, _ = visit(s, type(state)(zero), 1, memory, LINE)
    sent = {n: x.flatten().tolist() for n, x in done.value["delta"].items()}
    assert sent["head.body.w.bias"] == sent["head.head.b.bias"] == [0.5]
    assert sent["head.body.w.weight"] == sent["head.head.b.weight"] == [1.0]  # Δθ aᵀ
    assert sent["trunk.0.weight"] == [0.0, 0.0]  # the output weights are 0


def test_hyperfl_by_hand() -> None:
    """h has one hidden unit with a = 2 and output weight 0, so θ = b = 3; c = 5, rates ½, no momentum, no decay.

    The head goes from 1 to 3/2 as above. Pass 2, two steps: residual −½, so b ← 3 + ¼ and W ← 0 + ¼·2 = ½ (and W was
    0, so the trunk stays). Then θ = ½·2 + 3¼ = 4¼, residual 4¼ + 3/2 − 5 = ¾: b ← 3¼ − 3/8 = 2 7/8, W ← ½ − ¾ = −¼, and
    ∂F/∂a = ¾·½ = 3/8, so the trunk's bias ← 2 − 3/16.
    """
    settings = {
        "lr": 0.5,
        "head_lr": 0.5,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "epochs": 2,
        "embedding": 2,
        "hidden": 1,
    }
    s = hyperfl.build(hyperfl.Config(**HAND, **settings), two_layers(LINE))  # type: ignore[arg-type]
    phi = tree.zeros(begin(s).phi)
    phi |= {"head.body.w.bias": torch.tensor([3.0], dtype=torch.float64)}
    phi |= {"trunk.0.bias": torch.tensor([2.0], dtype=torch.float64)}
    memory: Payload = {
        "embed": {"v": torch.zeros(2, dtype=torch.float64)},
        "head": {"head.b": torch.tensor([1.0], dtype=torch.float64)},
    }
    done, _ = visit(s, hyperfl.State(phi, {}), 1, memory, LINE)
    sent = {n: x.flatten().tolist() for n, x in done.value["delta"].items()}
    assert sent["head.body.w.bias"] == [2.875 - 3] and sent["head.body.w.weight"] == [-0.25]
    assert sent["trunk.0.bias"] == [-3 / 16] and sent["trunk.0.weight"] == [0.0, 0.0]
    assert done.memory["head"]["head.b"].tolist() == [1.5]


def test_a_hypernetwork_without_conditioning_is_fedrep() -> None:
    """Output weights 0 and kept there by v = 0 and a = 0: only the biases learn, and they are FedRep's body."""
    task = two_layers(LINE)
    steps = {"lr": 0.3, "head_lr": 0.2, "epochs": 3, "batch_size": 1, "momentum": 0.5, "weight_decay": 0.01}
    rep = fedrep.build(fedrep.Config(**steps), task)  # type: ignore[arg-type]
    hyper = hyperfl.build(hyperfl.Config(**steps, embedding=2, hidden=1, clip=1e9), task)  # type: ignore[arg-type]
    phi = tree.zeros(begin(hyper).phi) | {"head.body.w.bias": torch.tensor([3.0], dtype=torch.float64)}
    memory: Payload = {
        "embed": {"v": torch.zeros(2, dtype=torch.float64)},
        "head": {"head.b": torch.tensor([1.0], dtype=torch.float64)},
    }
    a, _ = visit(rep, begin(rep), 0, {"head": memory["head"]}, LINE)
    b, _ = visit(hyper, hyperfl.State(phi, {}), 0, memory, LINE)
    assert torch.equal(a.value["delta"]["body.w"], b.value["delta"]["head.body.w.bias"])
    assert same(a.memory["head"], b.memory["head"])


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"epochs": 1}, {"steps": 1}])
def test_a_single_gradient_of_phi_is_not_sent_unless_told_to(setting: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="must be at least 2") as e:
        hyperfl.Config(**setting)  # type: ignore[arg-type]
    (line,) = config.explain(e.value, hyperfl.Config, setting, "strategy")
    assert line.startswith(f"strategy.{next(iter(setting))}: must be at least 2 (got 1)")
    hyperfl.Config(**setting, allow_single_step=True)  # type: ignore[arg-type]


def test_the_private_layer() -> None:
    names = ["conv.weight", "conv.bias", "fc1.weight", "fc10.weight", "fc10.bias"]
    assert private_names(names, None) == ["fc10.weight", "fc10.bias"]
    assert private_names(names, "fc1") == ["fc1.weight"]  # a layer, not a prefix of letters
    assert private_names(["a", "b"], None) == ["b"]
    with pytest.raises(ConfigError, match="no parameter begins with 'fc2'"):
        private_names(names, "fc2")
    with pytest.raises(ConfigError, match="nothing is left to share"):
        private_names(["fc.weight", "fc.bias"], None)


@pytest.mark.parametrize("module", [hyperfl, fedrep, fedper, pfedhn])
def test_blocks_agree_with_one_by_one(module: Any) -> None:
    settings = {"batch_size": 4, "epochs": 2, "lr": 0.05}
    s = module.build(module.Config(**settings), TASK)
    plain = train(s, WORLD, 2, execution="plain")[-1]
    stacked = train(s, WORLD, 2, execution="batched", block=4)[-1]
    torch.testing.assert_close(plain, stacked, rtol=1e-9, atol=1e-10)


# --- Under privacy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [hyperfl, fedrep, centaur])
def test_noise_free_privacy_is_the_plain_method(module: Any) -> None:
    """σ = 0 and C = ∞, one whole batch a step: the same update as without privacy, in both passes."""
    from clients import dp_sgd

    settings = {"batch_size": 64, "epochs": 2, "momentum": 0.5}
    private = dp_sgd.private(TASK, 0.0, 1e9, 64, "auto")
    state = begin(module.build(module.Config(**settings), TASK))
    a, b = (visit(module.build(module.Config(**settings), t), state)[0] for t in (TASK, private))
    torch.testing.assert_close(a.value["delta"], b.value["delta"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(a.memory["head"], b.memory["head"], rtol=1e-6, atol=1e-9)


def test_noise_reaches_the_head_and_every_part_of_phi() -> None:
    from clients import dp_sgd

    private = dp_sgd.private(TASK, 1.0, 1.0, 64, "auto")
    s = hyperfl.build(hyperfl.Config(**SMALL), private)
    assert all(p.schedule.sampling == "poisson" for p in s.phases[0].local.passes)
    state = begin(s)
    shared = s.phases[0].broadcast(state)
    first = block.one(Work(1, 0, s.phases[0].local, shared, KEY), WORLD, Guest(0, None))[0]
    other = block.one(Work(1, 0, s.phases[0].local, shared, KEY.at("x")), WORLD, Guest(0, first.memory))[0]
    again = block.one(Work(1, 0, s.phases[0].local, shared, KEY.at("y")), WORLD, Guest(0, first.memory))[0]
    assert all(not torch.equal(x, again.value["delta"][n]) for n, x in other.value["delta"].items())
    assert not same(other.memory["head"], again.memory["head"])


def test_centaur_and_ppsgd_without_privacy_are_fedrep_and_fedper() -> None:
    for a, b in ((centaur, fedrep), (ppsgd, fedper)):
        one, other = (train(m.build(m.Config(batch_size=4), TASK), WORLD, 2)[-1] for m in (a, b))  # type: ignore[attr-defined]
        assert same(one, other)


# --- Frozen backbones ---------------------------------------------------------------------------------------------


def test_lpm_generates_adapters_and_sends_nothing_else() -> None:
    s = hyperfl_lpm.build(hyperfl_lpm.Config(**SMALL, adapter_rank=2, parametrization="mip"), TASK)
    state = begin(s)
    generated = {n.removeprefix("head.").removesuffix(".bias") for n in state.phi if n.endswith(".bias")}
    assert generated - {"trunk.0"} == {"fc1.lora_A", "fc1.lora_B"}
    done, before = visit(s, state)
    assert done.value["delta"].keys() == state.phi.keys()
    assert done.memory["head"].keys() == {"fc2.weight", "fc2.bias"}
    assert s.personal is not None
    own = s.personal(s.phases[0].broadcast(state), before)
    assert own.keys() == alternate.shapes(TASK).keys()
    later = s.personal({"hyper": tree.add(state.phi, done.value["delta"])}, done.memory)
    moved = later["fc1.weight"] - own["fc1.weight"]
    # What moved is the product of two rank-2 factors and their change, and the bias stays the backbone's.
    assert int(torch.linalg.matrix_rank(moved, tol=1e-9)) <= 4
    assert torch.equal(later["fc1.bias"], own["fc1.bias"])
    other, mine = (visit(s, state, c)[1]["head"]["fc2.weight"] for c in (1, 2))
    assert not torch.equal(other, mine)


def test_lpm_with_zero_output_weights_is_the_backbone() -> None:
    s = hyperfl_lpm.build(hyperfl_lpm.Config(**SMALL, adapter_rank=2, parametrization="mip"), TASK)
    state = begin(s)
    zero = {
        n: torch.zeros_like(x) if n.startswith("head.") and n.endswith(".weight") else x for n, x in state.phi.items()
    }
    _, memory = visit(s, state)
    assert s.personal is not None
    a, b = (s.personal({"hyper": zero}, m) for m in (memory, visit(s, state, 3)[1]))
    assert torch.equal(a["fc1.weight"], b["fc1.weight"])


# --- Ten thousand clients -----------------------------------------------------------------------------------------


def population(clients: int, memory_mb: int, rounds: int = 2) -> config.Experiment:
    return config.parse(
        {
            "name": "population",
            "rounds": rounds,
            "data": {"name": "digits", "partition": {"name": "sampled", "clients": clients, "size": 5}},
            "task": {"model": "mlp", "hidden": [8]},
            "strategy": SMALL | {"name": "hyperfl", "cohort": clients, "hidden": 4, "embedding": 1024},
            "engine": {"memory_mb": memory_mb, "execution": "batched", "block": 256},
            "evaluate": {"every": 2},
        }
    )


@pytest.mark.parametrize("clients", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_memories_in_files_are_bounded_and_resume_bit_for_bit(tmp_path: Path, clients: int) -> None:
    """All that clients remember in one process, against 1 MB of it there and an interruption between the rounds."""
    session = build(population(clients, 1))
    session.driver.train(session.driver.begin(), 1)
    assert len(session.memory) == clients and session.memory.resident <= 1 << 20
    here = run(population(clients, 1024), tmp_path / "here")
    run(population(clients, 1, rounds=1), tmp_path / "files")
    there = run(population(clients, 1), tmp_path / "files", resume=True)
    assert there["params_sha256"] == here["params_sha256"]
    state = checkpoint.named_tuples(session.driver.begin())
    a, b = (checkpoint.Store(tmp_path / name / "checkpoint", 1).load(state).memory for name in ("here", "files"))
    assert sorted(a) == sorted(b) == list(range(clients))
    assert all(tree.digest(a[c][part]) == tree.digest(b[c][part]) for c in a for part in ("embed", "head"))
