"""The family of LoRA: exactness, equivalences, noise, bytes, and what must not move. In float64 where it is exact."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from worlds import KEY, grid, points, quadratic, same, train

from clients import dp_sgd
from clients.lora import LoraConfig, lora, prepare
from fedsim import block, tree
from fedsim.block import Guest, Work
from fedsim.data import teacher
from fedsim.data.dataset import Dataset, Federation, Split
from fedsim.errors import ConfigError
from fedsim.rng import Key
from fedsim.tasks.adapters import Layer, increment
from fedsim.tasks.module import from_module
from fedsim.types import Batch, Private, Strategy, Task, Tree
from server import adapters
from server.adapters import Factors
from server.ledger import Entry, calibrate
from server.loop import run_round
from strategies import (
    fed_sb,
    fedex_lora,
    fedit,
    fedsa_lora,
    fedsvd,
    ffa_lora,
    flexlora,
    flora,
    lora_fair,
    rolora,
)

INPUTS, HIDDEN = 6, 16
SIZES = (11, 7, 5)


def clients(sizes: Sequence[int] = SIZES, same_data: bool = False) -> Federation:
    """Clients with normal inputs and labels 0, 1, 2 in turn."""
    generator = Key.root(3).at("lora").torch()
    one = torch.randn(sizes[0], INPUTS, generator=generator, dtype=torch.float64)
    x = one.repeat(len(sizes), 1) if same_data else torch.randn(sum(sizes), INPUTS, generator=generator).double()
    y = torch.arange(sizes[0] if same_data else sum(sizes)) % 3
    y = y.repeat(len(sizes)) if same_data else y
    ends = np.cumsum([0, *sizes])
    partition = [np.arange(a, b) for a, b in pairwise(ends)]
    split = Split(x, y)
    return Federation(Dataset("normal", split, split, 3), partition, 0.0, KEY)


def student(federation: Federation, dtype: torch.dtype = torch.float64) -> Task:
    x = federation.dataset.train
    return from_module(lambda: teacher.student(INPUTS, HIDDEN), 3, len(federation), dtype, (x.x[:1], x.y[:1]))


WORLD = clients()
TASK = student(WORLD)
STEPS: dict[str, Any] = {"lr": 0.3, "batch_size": 4, "steps": 3, "rank": 4, "alpha": 8.0}
LAYERS = (Layer("fc1", HIDDEN, INPUTS), Layer("fc2", HIDDEN, HIDDEN))


def states(strategy: Strategy, rounds: int, world: Federation = WORLD) -> list[Any]:
    executor, state = grid(world), strategy.init(KEY.at("init").torch())
    out = [state]
    for r in range(1, rounds + 1):
        state, _ = run_round(strategy, state, r, list(range(len(world))), executor, KEY)
        out.append(state)
    return out


def reports(strategy: Strategy, state: Any, round: int, world: Federation = WORLD) -> list[tuple[dict[str, Tree], int]]:
    """What each client sends in this round, and its number of examples."""
    work = Work(round, 0, strategy.phases[0].local, strategy.phases[0].broadcast(state), KEY)
    results = [block.one(work, world, Guest(c, None)) for c in range(len(world))]
    return [(done.value, n) for done, n in results]


def mean_product(strategy: Strategy, state: Any, round: int = 1, alpha: float = 8.0) -> Tree:
    """Σ p_k s_k B_k A_k of this round, from what the clients send."""
    sent = reports(strategy, state, round)
    total = sum(n for _, n in sent)
    out: Tree = {}
    for value, n in sent:
        mine = value["factors"] if "factors" in value else tree.add(state.params, value["delta"])
        for layer in LAYERS:
            out[layer.weight] = out.get(layer.weight, 0) + n / total * increment(layer, alpha, mine)
    return out


def moved(strategy: Strategy, before: Any, after: Any) -> Tree:
    """How W of the adapted layers has changed."""
    a, b = strategy.params(before), strategy.params(after)
    return {layer.weight: b[layer.weight] - a[layer.weight] for layer in LAYERS}


def far(a: Tree, b: Tree) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=Key.root(9).at("draws", *shape).torch(), dtype=torch.float64)


# --- 1 to 3: aggregation -------------------------------------------------------------------------------------------

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
B, A = draws(3, 12, 4), draws(3, 4, 10)
PRODUCT = torch.einsum("k,kir,krj->ij", P, B, A)
BBAR, ABAR = torch.einsum("k,kir->ir", P, B), torch.einsum("k,krj->rj", P, A)
LAYER = Layer("h", 12, 10)


def test_a_shared_A_makes_the_mean_exact() -> None:
    shared = torch.einsum("k,kir,rj->ij", P, B, A[0])
    assert (shared - BBAR @ A[0]).abs().max() < 1e-12
    assert (PRODUCT - BBAR @ ABAR).norm() / PRODUCT.norm() > 1e-2


def test_the_residual_is_a_covariance_of_low_rank() -> None:
    residual = adapters.residual(PRODUCT, LAYER, {LAYER.A: ABAR, LAYER.B: BBAR})
    covariance = torch.einsum("k,kir,krj->ij", P, B - BBAR, A - ABAR)
    torch.testing.assert_close(residual, covariance, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(residual) == 8  # (K − 1) r


def test_stack_is_the_mean_product() -> None:
    stacked = adapters.stack([Factors(b, a) for b, a in zip(B, A, strict=True)], P.tolist())
    torch.testing.assert_close(stacked.B @ stacked.A, PRODUCT, rtol=0, atol=1e-12)
    assert stacked.B.shape == (12, 12)


def test_svd_is_the_nearest_of_its_rank() -> None:
    S = torch.linalg.svdvals(PRODUCT)
    for rank in (1, 4, 7):
        b, a = adapters.svd(PRODUCT, rank)
        assert float((PRODUCT - b @ a).norm()) == pytest.approx(float(S[rank:].norm()), rel=1e-10)
    b, a = adapters.svd(PRODUCT, 15)  # more than it has
    assert b.shape == (12, 15) and (PRODUCT - b @ a).abs().max() < 1e-12


@pytest.mark.parametrize("rank", [3, 10, 14])
def test_resplit_keeps_the_product(rank: int) -> None:
    b, a = draws(12, rank), draws(rank, 10)
    new = adapters.resplit(b, a)
    torch.testing.assert_close(new.B @ new.A, b @ a, rtol=0, atol=1e-11)
    kept = min(rank, 10)
    torch.testing.assert_close(new.A @ new.A.T, torch.diag(torch.arange(rank) < kept).double(), rtol=0, atol=1e-12)


def test_the_correction_of_B_is_optimal() -> None:
    """At the minimum the gradient (B' Ā − P) Āᵀ + λ (B' − B̄) is 0; with much ridge nothing is corrected."""
    new = adapters.corrected(PRODUCT, BBAR, ABAR, 0.1)
    assert ((new @ ABAR - PRODUCT) @ ABAR.T + 0.1 * (new - BBAR)).abs().max() < 1e-10
    assert (adapters.corrected(PRODUCT, BBAR, ABAR, 1e12) - BBAR).abs().max() < 1e-9
    assert (PRODUCT - new @ ABAR).norm() < (PRODUCT - BBAR @ ABAR).norm()


EXACT = {
    "ffa": ffa_lora.build(ffa_lora.Config(**STEPS), TASK),
    "fedex": fedex_lora.build(fedex_lora.Config(**STEPS), TASK),
    "flora": flora.build(flora.Config(**STEPS), TASK),
    "flexlora": flexlora.build(flexlora.Config(**STEPS | {"rank": 16, "ranks": (16,)}), TASK),
    "flexlora-ranks": flexlora.build(flexlora.Config(**STEPS | {"rank": 16, "ranks": (2, 3)}), TASK),
    "rolora": rolora.build(rolora.Config(**STEPS), TASK),
    "fedsvd": fedsvd.build(fedsvd.Config(**STEPS), TASK),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_members_take_the_mean_update(name: str) -> None:
    """W moves by Σ p_k s_k B_k A_k, from B = 0."""
    strategy = EXACT[name]
    state, after = states(strategy, 1)
    if name in ("ffa", "rolora", "fedsvd"):
        one = fedit.build(fedit.Config(**STEPS), TASK)  # for A: all of them begin with the same
        A0 = {n: x for n, x in one.init(KEY.at("init").torch()).params.items() if n.endswith("lora_A")}
        sent = reports(strategy, state, 1)
        total = sum(n for _, n in sent)
        expected = {
            layer.weight: sum(n / total * increment(layer, 8.0, A0 | v["delta"]) for v, n in sent) for layer in LAYERS
        }
    else:
        expected = mean_product(strategy, state)
    got = moved(strategy, state, after)
    assert far(got, expected) < 1e-12
    assert max(float(x.abs().max()) for x in expected.values()) > 1e-3


def test_averaging_both_factors_does_not() -> None:
    strategy = fedit.build(fedit.Config(**STEPS), TASK)
    _, before, after = states(strategy, 2)
    wanted = mean_product(strategy, before, 2)
    start = {layer.weight: increment(layer, 8.0, before.params) for layer in LAYERS}
    assert far(moved(strategy, before, after), tree.sub(wanted, start)) > 1e-6
    better = lora_fair.build(lora_fair.Config(**STEPS, ridge=1e-9), TASK)
    _, before, after = states(better, 2)
    fair = {layer.weight: increment(layer, 8.0, after.params) for layer in LAYERS}
    wanted = mean_product(better, before, 2)
    plain = adapters_of_means(better, before)
    assert sum(float((fair[n] - wanted[n]).norm()) for n in fair) < sum(
        float((plain[n] - wanted[n]).norm()) for n in plain
    )


def adapters_of_means(strategy: Strategy, state: Any) -> Tree:
    """s B̄ Ā of this round's reports."""
    sent = reports(strategy, state, 2)
    total = sum(n for _, n in sent)
    means = {n: x + sum(k / total * v["delta"][n] for v, k in sent) for n, x in state.params.items()}
    return {layer.weight: increment(layer, 8.0, means) for layer in LAYERS}


def test_fedex_stays_exact_over_rounds() -> None:
    strategy = EXACT["fedex"]
    before, after = states(strategy, 3)[2:]
    sent = reports(strategy, before, 3)
    total = sum(n for _, n in sent)
    base = strategy.params(before)
    expected = {}
    for layer in LAYERS:
        own = [tree.add(before.params, v["delta"]) for v, _ in sent]
        product = sum(n / total * increment(layer, 8.0, f) for f, (_, n) in zip(own, sent, strict=True))
        expected[layer.weight] = base[layer.weight] - increment(layer, 8.0, before.params) + product
    got = strategy.params(after)
    assert far({n: got[n] for n in expected}, expected) < 1e-12


# --- 4, 11: what is frozen -----------------------------------------------------------------------------------------


def frozen_A(config: LoraConfig, seed: int) -> Tree:
    return prepare(config, TASK).A(seed, 0)


def test_A_is_a_function_of_the_seed_alone() -> None:
    config = ffa_lora.Config(**STEPS)
    assert same(frozen_A(config, 5), frozen_A(config, 5))
    assert far(frozen_A(config, 5), frozen_A(config, 6)) > 0.1
    strategy = EXACT["ffa"]
    found = states(strategy, 3)
    assert {s.seed for s in found} == {found[0].seed}
    base, last = strategy.params(found[0]), strategy.params(found[-1])
    for layer in LAYERS:  # ΔW = s B A with the A of the seed
        dW = last[layer.weight] - base[layer.weight]
        expected = 2.0 * found[-1].params[layer.B] @ frozen_A(config, found[0].seed)[layer.A]
        torch.testing.assert_close(dW, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("how", "check"),
    [
        ("kaiming", lambda a: a.abs().max() < 1 / 4 and a.std() > 0.12),  # U(±1/√16): sd 0.144
        ("gaussian", lambda a: 0.2 < a.std() < 0.3),  # 1/r = 1/4
        ("orthogonal", lambda a: (a @ a.T - torch.eye(4)).abs().max() < 1e-6),
        ("svd", lambda a: (a @ a.T - torch.eye(4)).abs().max() < 1e-12),
    ],
)
def test_starts_of_A(how: str, check: Any) -> None:
    assert check(frozen_A(ffa_lora.Config(**STEPS, start=how), 1)[LAYERS[1].A])
    wide = frozen_A(ffa_lora.Config(**STEPS | {"rank": 9}, start=how), 1)[LAYERS[0].A]
    assert wide.shape == (9, INPUTS) and wide.isfinite().all()


def test_the_model_begins_as_the_base_bit_for_bit() -> None:
    base = prepare(ffa_lora.Config(**STEPS), TASK).base(0)
    for strategy in EXACT.values():
        assert same(strategy.params(strategy.init(KEY.at("init").torch())), base)


def test_the_head_is_frozen_unless_it_is_trained() -> None:
    for head in ("frozen", "train"):
        strategy = ffa_lora.build(ffa_lora.Config(**STEPS, head=head), TASK)
        first, last = (strategy.params(s) for s in states(strategy, 2)[::2])
        still = all(torch.equal(first[n], last[n]) for n in ("head.weight", "head.bias"))
        assert still == (head == "frozen")
        assert not torch.equal(first["fc2.weight"], last["fc2.weight"])
        assert torch.equal(first["fc1.bias"], last["fc1.bias"])


# --- 5 to 7: equivalences of learning rates ------------------------------------------------------------------------

ONE = clients((9,))
ONE_TASK = student(ONE)


def test_the_first_step_is_the_same_for_lora_and_ffa() -> None:
    one = STEPS | {"steps": 1, "batch_size": 16}
    ffa = states(ffa_lora.build(ffa_lora.Config(**one), ONE_TASK), 1, ONE)[-1].params
    both = states(fedit.build(fedit.Config(**one), ONE_TASK), 1, ONE)[-1].params
    assert all(torch.equal(x, both[n]) for n, x in ffa.items())
    assert same({n: x for n, x in both.items() if n.endswith("A")}, {
        n: x for n, x in fedit.build(fedit.Config(**one), ONE_TASK).init(KEY.at("init").torch()).params.items()
        if n.endswith("A")
    })  # fmt: skip


@pytest.mark.parametrize("c", [0.25, 3.0])
def test_alpha_is_a_learning_rate(c: float) -> None:
    """(s, η) and (c s, η/c²) give the same W."""
    a = train(ffa_lora.build(ffa_lora.Config(**STEPS), TASK), WORLD, 4)
    scaled = STEPS | {"alpha": 8.0 * c, "lr": 0.3 / c**2}
    b = train(ffa_lora.build(ffa_lora.Config(**scaled), TASK), WORLD, 4)
    assert max(far(x, y) for x, y in zip(a, b, strict=True)) < 1e-12
    assert far(a[0], a[-1]) > 0.1


def test_lora_tends_to_ffa_as_alpha_grows() -> None:
    """With η/s² the distance falls like 1/s²: by 16 for 4 times the scale."""
    limit = train(ffa_lora.build(ffa_lora.Config(**STEPS | {"alpha": 4.0, "lr": 0.2}), TASK), WORLD, 3)[-1]
    far_off = []
    for s in (8.0, 32.0, 128.0):
        config = fedit.Config(**STEPS | {"alpha": 4.0 * s, "lr": 0.2 / s**2})
        far_off.append(far(train(fedit.build(config, TASK), WORLD, 3)[-1], limit))
    assert 12 < far_off[0] / far_off[1] < 20
    assert 15 < far_off[1] / far_off[2] < 17


# --- 8, 9: privacy -------------------------------------------------------------------------------------------------


def noises(trained: str, sigma: float, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """‖noise in ΔW‖² of fc2 from n draws of a step without examples, η = B = C = 1; and A, B before."""
    of = prepare(ffa_lora.Config(**STEPS | {"alpha": 4.0}), dp_sgd.private(TASK, sigma, 1.0, 1, "auto"))
    layer, A0 = LAYERS[1], of.A(1, 0)
    B0 = {layer.B: 0.3 * draws(*x.shape) for layer in LAYERS for x in [of.B(1)[layer.B]]}
    start, fixed = (B0, A0) if trained == "B" else (A0 | B0, {})
    private = of.of(1, fixed, start, {}).private
    assert private
    nobody, generator = Batch(WORLD.dataset.train.x[:0], WORLD.dataset.train.y[:0]), Key.root(4).wide()
    out = []
    for _ in range(n):
        g = private.gradient(start, nobody, private.draw(generator), torch.tensor(1))
        after = {name: x + g[name] for name, x in start.items()}
        out.append(((fixed | after)[layer.B] @ (fixed | after)[layer.A] - B0[layer.B] @ A0[layer.A]).square().sum())
    return torch.stack(out), A0[layer.A], B0[layer.B], torch.tensor(sigma)


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_noise_in_the_product(sigma: float) -> None:
    """FFA: σ² d_out ‖A‖². LoRA: σ² (d_out ‖A‖² + d_in ‖B‖²) + σ⁴ d_out r d_in. n = 1,500, within 4 standard errors."""
    n = 1500
    for trained in ("B", "both"):
        squares, a, b, _ = noises(trained, sigma, n)
        d_out, d_in, r = HIDDEN, HIDDEN, 4
        expected = sigma**2 * d_out * float(a.square().sum())
        if trained == "both":
            expected += sigma**2 * d_in * float(b.square().sum()) + sigma**4 * d_out * r * d_in
        error = 4 * float(squares.std()) / n**0.5
        assert abs(float(squares.mean()) - expected) < error < 0.1 * expected


def test_clipping_is_over_all_B_jointly() -> None:
    of = prepare(ffa_lora.Config(**STEPS), dp_sgd.private(TASK, 1.0, 0.05, 4, "auto"))
    private, start = of.of(1, of.A(1, 0), of.B(1), {}).private, of.B(1)
    assert private
    still = tree.zeros(start)
    x, y = WORLD.dataset.train.x, WORLD.dataset.train.y
    sizes = [
        float(tree.norm(private.gradient(start, Batch(x[i : i + 1], y[i : i + 1]), still, torch.tensor(1))))
        for i in range(len(x))
    ]
    assert max(sizes) <= 0.05 * (1 + 1e-12) and sum(abs(s - 0.05) < 1e-5 for s in sizes) > len(sizes) // 2


def test_without_noise_and_clipping_it_is_sgd() -> None:
    of = prepare(ffa_lora.Config(**STEPS), dp_sgd.private(TASK, 1e-9, 1e9, 6, "auto"))
    plain = prepare(ffa_lora.Config(**STEPS), TASK)
    start = {n: draws(*x.shape) for n, x in of.B(1).items()}
    private = of.of(1, of.A(1, 0), start, {}).private
    assert private
    batch = Batch(WORLD.dataset.train.x[:6], WORLD.dataset.train.y[:6])
    got = private.gradient(start, batch, tree.zeros(start), torch.tensor(6))
    leaves = {n: x.clone().requires_grad_() for n, x in start.items()}
    plain.of(1, plain.A(1, 0), start, {}).loss(leaves, batch).backward()
    assert far(got, {n: x.grad for n, x in leaves.items() if x.grad is not None}) < 1e-12


def test_an_adapter_that_does_not_move_stops_a_private_run() -> None:
    def broken(params: Tree, batch: Batch, noise: Any, n: Tensor) -> Tree:
        return (
            params | {"fc1.lora_B": params["fc1.lora_B"] + 1} | {"fc2.lora_B": torch.zeros_like(params["fc2.lora_B"])}
        )

    def around(task: Task) -> Task:
        return task._replace(private=Private(broken, lambda generator: torch.zeros(()), around, task))

    strategy = ffa_lora.build(ffa_lora.Config(**STEPS), around(TASK))
    with pytest.raises(Exception, match=r"fc2.lora_B did not move in private training"):
        states(strategy, 1)


@pytest.mark.parametrize(
    "strategy", [fedit, fedex_lora, flora, flexlora, rolora, fedsa_lora, fedsvd, fed_sb, lora_fair, ffa_lora]
)
def test_every_member_runs_under_privacy(strategy: Any) -> None:
    ranks = {"ranks": (4,)} if strategy is flexlora else {}
    built = strategy.build(strategy.Config(**STEPS, **ranks), dp_sgd.private(TASK, 0.8, 1.0, 4, "auto"))
    last = states(built, 2)[-1]
    assert tree.finite(built.params(last))
    if strategy is flexlora:
        with pytest.raises(ConfigError, match=r"strategy\.ranks"):
            strategy.build(strategy.Config(**STEPS | {"rank": 8}), dp_sgd.private(TASK, 0.8, 1.0, 4, "auto"))


@pytest.mark.parametrize(
    ("examples", "sigmas"),
    [(392_702, (0.547, 0.667, 1.001)), (363_846, (0.556, 0.677, 1.031)), (104_743, (0.790, 1.101, 2.441)),
     (67_349, (0.990, 1.514, 3.711))],
)  # fmt: skip
def test_noise_of_the_papers_protocol(examples: int, sigmas: tuple[float, float, float]) -> None:
    """MNLI, QQP, QNLI, SST-2: 3 equal clients, batches of 200, 1000 rounds of 10 steps, δ = 10⁻⁵; ε = 6, 3, 1.

    Noise multipliers of Opacus 1.6's RDP accountant, within 2 %: an accountant that forgets rounds would be far off.
    """
    q = 200 / (examples / 3)
    for epsilon, sigma in zip((6, 3, 1), sigmas, strict=True):
        found = calibrate(lambda s: [(Entry(s, q, 10_000),)], epsilon, 1e-5, "rdp")
        assert found == pytest.approx(sigma, rel=0.02)


# --- 10: bytes -----------------------------------------------------------------------------------------------------


def bytes_of(module: Any, targets: list[str], **more: Any) -> tuple[int, int]:
    strategy = module.build(module.Config(**STEPS, targets=targets, **more), TASK)
    _, trained = run_round(strategy, strategy.init(KEY.torch()), 1, [0], grid(WORLD), KEY)
    return trained.bytes_up, trained.bytes_down


@pytest.mark.parametrize("targets", [["fc2"], ["fc1"], ["fc1", "fc2"]])
def test_uplink_of_ffa_is_d_out_of_d_in_plus_d_out(targets: list[str]) -> None:
    layers = [layer for layer in LAYERS if layer.name in targets]
    rows, columns = sum(layer.rows for layer in layers), sum(layer.columns for layer in layers)
    (ffa_up, ffa_down), (up, down) = bytes_of(ffa_lora, targets), bytes_of(fedit, targets)
    assert up == 8 * 4 * (rows + columns) and ffa_up == 8 * 4 * rows
    assert ffa_up / up == rows / (rows + columns)
    seed = 8
    assert (ffa_down, down) == (ffa_up + seed, up + seed)
    if targets == ["fc2"]:
        assert ffa_up / up == 0.5
    assert bytes_of(fed_sb, targets)[0] == 8 * 16 * len(layers)
    assert bytes_of(fedsvd, targets) == (ffa_up, down)
    assert bytes_of(flora, targets) == (up, 8 + 8)  # the seed and the round; ΔW from round 2 on


def test_clients_of_different_ranks_send_what_they_have() -> None:
    strategy = flexlora.build(flexlora.Config(**STEPS | {"rank": 4, "ranks": (1, 2, 4)}), TASK)
    state = strategy.init(KEY.torch())
    ranks = [value["factors"]["fc2.lora_A"].shape[0] for value, _ in reports(strategy, state, 1, clients((3,) * 12))]
    assert set(ranks) == {1, 2, 4}


# --- 12, and the rest ----------------------------------------------------------------------------------------------


def test_one_client_is_local_training_written_out() -> None:
    """Two rounds of three full-batch steps are six steps of autograd on W₀ + s B A."""
    config = ffa_lora.Config(**STEPS | {"batch_size": 16})
    strategy = ffa_lora.build(config, ONE_TASK)
    first, *_, last = states(strategy, 2, ONE)
    of = prepare(config, ONE_TASK)
    base, a = of.base(0), of.A(first.seed, 0)
    b = {layer.B: torch.zeros(layer.rows, 4, dtype=torch.float64, requires_grad=True) for layer in LAYERS}
    x, y = ONE.dataset.train.x, ONE.dataset.train.y
    for _ in range(6):
        weights = dict(base)
        for layer in LAYERS:
            weights[layer.weight] = base[layer.weight] + 2.0 * b[layer.B] @ a[layer.A]
        grads = torch.autograd.grad(ONE_TASK.loss(weights, Batch(x, y)), list(b.values()))
        b = {n: (v - 0.3 * g).detach().requires_grad_() for (n, v), g in zip(b.items(), grads, strict=True)}
    assert far(last.params, {n: v.detach() for n, v in b.items()}) < 1e-13


def test_identical_clients_are_one_client() -> None:
    full = STEPS | {"batch_size": 16}
    many = clients((9, 9, 9), same_data=True)
    for module in (ffa_lora, fedit, fedex_lora, rolora):
        three = train(module.build(module.Config(**full), student(many)), many, 3)[-1]
        one_world = clients((9,), same_data=True)
        one = train(module.build(module.Config(**full), student(one_world)), one_world, 3)[-1]
        assert far(three, one) < 1e-12


def test_by_hand() -> None:
    """h = (1 + s b a) x, x = 2, s = ½, a = 3, target 0 by ½h²: from b = 0, dF/db = s a x · h = 6, so b = −0.6, W = 0.1.

    A Linear(1, 1) with weight 1 as the model, one example, η = 0.1.
    """

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)
            nn.init.ones_(self.body.weight)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x))
            return out

    world = points([[[2.0]]])
    made = from_module(Half, 2, 1, torch.float64, (torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)))

    def loss(params: Tree, batch: Batch) -> Tensor:
        return 0.5 * torch.nn.functional.linear(batch.x, params["body.weight"]).square().mean()

    of = prepare(LoraConfig(name="hand", rank=1, alpha=0.5, lr=0.1), made._replace(loss=loss))
    task = of.of(0, {"body.lora_A": torch.full((1, 1), 3.0).double()}, of.B(0), {})
    leaf = {"body.lora_B": torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)}
    batch = Batch(world.dataset.train.x, world.dataset.train.y)
    (g,) = torch.autograd.grad(task.loss(leaf, batch), list(leaf.values()))
    assert float(g) == 0.5 * 3 * 2 * 2
    after = {"body.lora_B": -0.1 * g}
    assert float(of.merged(0, {"body.lora_A": torch.full((1, 1), 3.0).double()} | after)["body.weight"]) == (
        pytest.approx(1 + 0.5 * -0.6 * 3)
    )


def test_fedsvd_without_a_period_is_ffa() -> None:
    a = train(fedsvd.build(fedsvd.Config(**STEPS, svd_period=0), TASK), WORLD, 3)
    assert all(same(x, y) for x, y in zip(a, train(EXACT["ffa"], WORLD, 3), strict=True))
    never = train(fedsvd.build(fedsvd.Config(**STEPS, svd_period=9), TASK), WORLD, 3)
    assert all(same(x, y) for x, y in zip(a, never, strict=True))


def test_fedsvd_changes_no_product() -> None:
    """The split comes after the mean: W after round 1 is FFA's, and A has orthonormal rows from then on."""
    ffa, svd = states(EXACT["ffa"], 1)[-1], states(EXACT["fedsvd"], 1)[-1]
    assert far(EXACT["ffa"].params(ffa), EXACT["fedsvd"].params(svd)) < 1e-12
    a = svd.params["fc2.lora_A"]
    assert (a @ a.T - torch.eye(4)).abs().max() < 1e-12


def test_rolora_takes_turns() -> None:
    first, second, third = states(EXACT["rolora"], 2)
    for layer in LAYERS:
        assert torch.equal(first.params[layer.A], second.params[layer.A])
        assert torch.equal(second.params[layer.B], third.params[layer.B])
        assert not torch.equal(first.params[layer.B], second.params[layer.B])
        assert not torch.equal(second.params[layer.A], third.params[layer.A])


def test_fedsa_keeps_B_at_home() -> None:
    strategy = fedsa_lora.build(fedsa_lora.Config(**STEPS), TASK)
    executor, state = grid(WORLD), strategy.init(KEY.at("init").torch())
    state, trained = run_round(strategy, state, 1, [0, 1, 2], executor, KEY)
    memories = [executor.memory.get(c) for c in range(3)]
    assert all(m and set(m["own"]) == {"fc1.lora_B", "fc2.lora_B"} for m in memories)
    assert memories[0] and memories[1] and far(memories[0]["own"], memories[1]["own"]) > 0
    assert trained.bytes_up == 3 * 8 * 4 * (INPUTS + HIDDEN)
    assert strategy.personal
    own = strategy.personal(strategy.phases[0].broadcast(state), memories[0])
    expected = 2.0 * memories[0]["own"]["fc2.lora_B"] @ state.params["fc2.lora_A"]
    torch.testing.assert_close(own["fc2.weight"] - TASK.init(KEY.torch())["fc2.weight"], expected, rtol=0, atol=1e-14)


def test_fed_sb_moves_inside_its_frame() -> None:
    strategy = fed_sb.build(fed_sb.Config(**STEPS), TASK)
    first, last = states(strategy, 2)[::2]
    dW = moved(strategy, first, last)["fc2.weight"]
    W0 = strategy.params(first)["fc2.weight"]
    U, _, Vh = torch.linalg.svd(W0)
    torch.testing.assert_close(dW, U[:, :4] @ (U[:, :4].T @ dW @ Vh[:4].T) @ Vh[:4], rtol=0, atol=1e-12)
    assert dW.abs().max() > 1e-4


def test_a_model_without_linear_layers_is_refused() -> None:
    world = points([[[0.0]]])
    with pytest.raises(ConfigError, match=r"nn\.Module"):
        ffa_lora.build(ffa_lora.Config(**STEPS), quadratic(world, [1.0]))
    with pytest.raises(ConfigError, match="no linear layer 'fc9'"):
        ffa_lora.build(ffa_lora.Config(**STEPS, targets=["fc2", "fc9"]), TASK)
    with pytest.raises(ConfigError, match="it has: fc1, fc2, head"):
        ffa_lora.build(ffa_lora.Config(**STEPS, targets=["query"]), TASK)


def test_the_local_update_names_no_fused_step() -> None:
    """A fused step would be of the unadapted task."""
    of = prepare(LoraConfig(name="x"), TASK)
    assert lora(of, LoraConfig(name="x"), lambda shared: {}).passes[0].fused is None
