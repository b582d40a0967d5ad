"""FedHyper on quadratics whose every number can be worked out by hand: one client holds the point 0, so g(w) = w.

With one full-batch step a round, Δ = β w. With β = ½ from w = 2 (dyadic numbers, so that equality is equality):
round 1: Δ = 1, α = 1, w = 1. Round 2: Δ = ½, ⟨Δ, Δ'⟩ = ½, α = 3/2, w = ¼. Round 3: Δ = ⅛, ⟨Δ, Δ'⟩ = 1/16, α = 25/16.
"""

from typing import Any, NamedTuple

import pytest
import torch
from worlds import KEY, grid, points, quadratic, same, train

from clients import hyper as client
from fedsim.config import check
from fedsim.errors import ConfigError
from fedsim.run import build
from fedsim.types import Mean, Payload, Strategy, Tree
from runs import experiment
from server import hyper, optim
from server.loop import Trained, run_round
from server.reduce import ranged, weighted_mean
from strategies import fedadam, fedavg, fedavgm, fedexp, fedhyper, fedprox, scaffold

ALONE = points([[[0.0]]])
ONE = {"lr": 0.5, "batch_size": 8, "cohort": 1}
VARIANTS = ["g", "gm", "sl", "cl", "g+sl", "g+cl", "gm+cl"]

# Clients of unequal size and many small batches: nothing of this is easy to get right by luck.
MANY = points([[[0.0, 1.0], [2.0, 0.5], [1.0, 1.0], [4.0, -1.0]], [[5.0, 2.0]], [[-1.0, 3.0], [0.5, 0.25], [2.0, 2.0]]])
FEW = {"lr": 0.1, "batch_size": 2, "epochs": 3, "cohort": 3}


class Seen(NamedTuple):
    state: fedhyper.Hyper
    trained: Trained


def rounds(config: dict[str, Any], start: float = 2.0, n: int = 3, **engine: object) -> list[Seen]:
    """The state after each round with the one client."""
    strategy = fedhyper.build(fedhyper.Config(**ONE | config), quadratic(ALONE, [start]))
    executor, state, out = grid(ALONE, **engine), strategy.init(KEY.torch()), []
    for r in range(1, n + 1):
        state, trained = run_round(strategy, state, r, [0], executor, KEY)
        out.append(Seen(state, trained))
    return out


def w(seen: Seen) -> float:
    return float(seen.state.base.w["w"])


def many(strategy: Strategy[Any], n: int = 4, **engine: object) -> Tree:
    return train(strategy, MANY, n, **engine)[-1]


TASK = quadratic(MANY, [3.0, -2.0])


# -- numbers by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["plain", "batched"])
def test_g_by_hand(execution: str) -> None:
    seen = rounds({"variant": "g"}, execution=execution)
    assert [s.state.alpha for s in seen] == [1.0, 1.5, 1.5625]
    assert [w(s) for s in seen] == [1.0, 0.25, 0.25 - 1.5625 * 0.125]
    assert [float(s.state.before["w"]) for s in seen] == [-1.0, -0.5, -0.125]  # as it came, not times α


def test_sl_reaches_the_clients_in_the_next_round() -> None:
    """β is ½ in rounds 1 and 2; ⟨Δ², Δ¹⟩ = ½ · 1 makes it 1 for round 3, which then walks all the way to 0."""
    seen = rounds({"variant": "sl"})
    assert [s.trained.metrics["local_rate"] for s in seen] == [0.5, 0.5, 1.0]
    assert [w(s) for s in seen] == [1.0, 0.5, 0.0]
    assert [s.state.beta for s in seen] == [0.5, 1.0, 1.25]  # ⟨½, ½⟩ = ¼ on top


@pytest.mark.parametrize("execution", ["plain", "batched"])
def test_cl_by_hand(execution: str) -> None:
    """Two steps a round, κ = 0.1. Round 1: g = 2, w = 1; then g = 1, β = ½ + 0.1 · 2 = 0.7, w = 0.3; Δ = 1.7.

    Round 2: g = 0.3, w = 0.15; then g = 0.15, β = ½ + 0.1 (0.15 · 0.3 + 0.15 · 1.7 / 2) = 0.51725, w = 0.0724125.
    """
    seen = rounds({"variant": "cl", "hyper_rate": 0.1, "epochs": 2}, n=2, execution=execution)
    assert [w(s) for s in seen] == pytest.approx([0.3, 0.15 * (1 - 0.51725)], rel=1e-14)
    assert [s.trained.metrics["local_rate"] for s in seen] == pytest.approx([0.6, (0.5 + 0.51725) / 2], rel=1e-14)
    assert [s.state.alpha for s in seen] == [1.0, 1.0]


def test_cl_begins_every_visit_at_its_first_rate() -> None:
    """With one step a round there is no second gradient, so CL is FedAvg whatever κ is."""
    seen = rounds({"variant": "cl", "hyper_rate": 100.0})
    assert [w(s) for s in seen] == [1.0, 0.5, 0.25]


def test_released_cl_by_hand() -> None:
    """Steps of one batch and one epoch of two: d₀ = −1, w = 1. The first of an epoch moves nothing; d₁ = −½ …

    Two points (1 and −1, mean 0) in batches of one would depend on the order, so both are 0: w = 2 → 1 → ½.
    Round 2 (two epochs' worth is not needed): d₀ = −¼, d₁ = −⅛; after d₁ of three: β = ½ (1 + d₁ d₀ + 0.1 d₁ (−1.5)).
    """
    world = points([[[0.0], [0.0], [0.0]]])
    config = fedhyper.Config(lr=0.5, batch_size=1, cohort=1, variant="cl", form="released", gamma_beta=10.0)
    strategy = fedhyper.build(config, quadratic(world, [2.0]))
    first, second = (float(x["w"]) for x in train(strategy, world, 2)[1:])
    grown = 0.5 * 1.1  # d₁ d₀ = ½ · 1 is more than the factor 1.1 allows
    assert first == pytest.approx(2 * 0.5 * 0.5 * (1 - grown), rel=1e-14)
    d0, d1, moved = -0.5 * first, -0.25 * first, first - 2.0
    beta = 0.5 * min(1.1, 1 + d1 * d0 + 0.1 * d1 * moved)
    assert second == pytest.approx(first * 0.25 * (1 - beta), rel=1e-14)


def test_gm_by_hand() -> None:
    """m ← 0.9 m + α Δ. Round 1: m = 1, w = 1. Round 2: Δ = ½, α = 3/2, m = 0.9 + 0.75, w = −0.65."""
    seen = rounds({"variant": "gm"}, n=2)
    assert w(seen[1]) == pytest.approx(-0.65, rel=1e-14) and seen[1].state.alpha == 1.5


# -- the rule (properties 13 to 15) ---------------------------------------------------------------------------------

WIDE = hyper.Rule(0.5, "raw", 0.1, 100.0)


def vector(*xs: float) -> Tree:
    return {"a": torch.tensor(xs[:1]), "b": torch.tensor(xs[1:])}


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ((1.0, 2.0), (3.0, 1.0), 2 + 0.5 * 5),  # aligned: up, by exactly κ⟨Δ, Δ'⟩
        ((1.0, 0.5), (-1.0, -0.5), 2 - 0.5 * 1.25),  # opposed: down
        ((1.0, 2.0), (-2.0, 1.0), 2.0),  # orthogonal
        ((0.0, 0.0), (3.0, 1.0), 2.0),
        ((3.0, 1.0), (0.0, 0.0), 2.0),  # the first round
    ],
)
def test_the_rate_moves_by_the_inner_product(now: Any, before: Any, expected: float) -> None:
    assert hyper.adapt(WIDE, 2.0, vector(*now), vector(*before)) == expected
    minus = [tuple(-x for x in v) for v in (now, before)]
    assert hyper.adapt(WIDE, 2.0, vector(*minus[0]), vector(*minus[1])) == expected  # either sign of Δ will do


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_cosine_does_not_know_the_size(size: float) -> None:
    rule = WIDE._replace(mode="cosine")
    assert hyper.adapt(rule, 2.0, vector(3 * size, 4 * size), vector(1.0, 0.0)) == pytest.approx(2 + 0.5 * 0.6)
    assert hyper.adapt(rule, 2.0, vector(0.0, 0.0), vector(1.0, 0.0)) == 2.0


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("size", [1e6, -1e6])
def test_bounds(form: str, size: float) -> None:
    """α in [1/3, 3], or [0.2, 5]; β in [β₀/10, 10 β₀], or below the cap."""
    low, high = {"paper": (1 / 3, 3.0), "released": (0.2, 5.0)}[form]
    mean = Mean({"delta": {"w": torch.tensor([size], dtype=torch.float64)}}, {}, 1, 1)
    for cap in (None, 0.6):
        config = fedhyper.Config(**ONE, variant="g+sl", form=form, max_lr=cap)
        strategy = fedhyper.build(config, quadratic(ALONE, [2.0]))
        state = strategy.init(KEY.torch())._replace(before={"w": torch.ones(1, dtype=torch.float64)})
        state = strategy.phases[0].finish(state, mean)
        assert state.alpha == (high if size > 0 else low)
        assert state.beta == pytest.approx((cap or 5.0) if size > 0 else 0.05, rel=1e-15)


@pytest.mark.parametrize(("start", "expected"), [(1e3, 5.0), (1e-9, 0.5)])
def test_bounds_of_a_clients_own_rate(start: float, expected: float) -> None:
    seen = rounds({"variant": "cl", "epochs": 2}, start=start, n=1)[0]
    assert seen.trained.metrics["local_rate"] == pytest.approx((0.5 + expected) / 2)
    capped = rounds({"variant": "cl", "epochs": 2, "max_lr": 0.75}, start=start, n=1)[0]
    assert capped.trained.metrics["local_rate"] == pytest.approx((0.5 + min(expected, 0.75)) / 2)


def test_two_opposed_gradients_lower_a_clients_rate() -> None:
    """β = 3/2 from w = 1: g = 1, w = −½, g = −½, β = 3/2 − ½ = 1."""
    seen = rounds({"variant": "cl", "lr": 1.5, "epochs": 2}, start=1.0, n=1)[0]
    assert seen.trained.metrics["local_rate"] == 1.25 and w(seen) == 0.0


def test_a_small_rate_climbs_and_a_large_one_falls() -> None:
    """Property 16: with α β < 1 updates agree, and α climbs to its bound; beyond 1 they alternate, and α falls."""
    climbing = [s.state.alpha for s in rounds({"variant": "g", "lr": 0.1}, start=20.0, n=4)]
    assert climbing == sorted(climbing) and climbing[-1] == 3.0
    falling = [s.state.alpha for s in rounds({"variant": "g", "lr": 0.9, "alpha0": 3.0}, start=0.5, n=3)]
    assert falling[0] == 3.0 and falling[1] < 3.0


# -- κ = 0 is the base, bit for bit (property 15) -------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["plain", "batched"])
@pytest.mark.parametrize("mode", ["raw", "cosine"])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_hyper_rate_it_is_fedavg(variant: str, form: str, mode: str, execution: str) -> None:
    config = fedhyper.Config(**FEW, variant=variant, hyper_rate=0.0, mode=mode, form=form)
    plain = fedavgm if "gm" in variant else fedavg
    expected = many(plain.build(plain.Config(**FEW, weighting="uniform"), TASK), execution=execution)
    assert same(many(fedhyper.build(config, TASK), execution=execution), expected)


@pytest.mark.parametrize("execution", ["plain", "batched"])
@pytest.mark.parametrize("mode", ["raw", "cosine"])
@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_clients_own_rate_that_does_not_move_is_fedavg(form: Any, mode: Any, execution: str) -> None:
    """With κ = 0 the strategy leaves the clients alone; here the rule itself runs, and adds nothing, to the bit."""
    base = fedavg.build(fedavg.Config(**FEW), TASK)
    rule = client.Rule(0.0, mode, form, gamma=10.0, cap=None, epochs=3, cohort=3)

    def broadcast(state: fedavg.State) -> Payload:
        return {"params": state.w, "previous": {"w": torch.tensor([0.25, -3.0], dtype=torch.float64)}}

    phase = base.phases[0]
    moved = phase._replace(local=client.learned(phase.local, rule), broadcast=broadcast)
    assert same(many(base._replace(phases=(moved,)), execution=execution), many(base, execution=execution))


@pytest.mark.parametrize("alpha0", [0.5, 0.7, 2.0])
def test_alpha0_is_fedavgs_server_rate(alpha0: float) -> None:
    config = fedhyper.Config(**FEW, variant="g+cl", hyper_rate=0.0, alpha0=alpha0)
    expected = many(fedavg.build(fedavg.Config(**FEW, weighting="uniform", server_lr=alpha0), TASK))
    assert same(many(fedhyper.build(config, TASK)), expected)


BASES = [
    (fedprox, {"name": "fedprox", "mu": 0.3}),
    (scaffold, {"name": "scaffold"}),
    (fedadam, {"name": "fedadam", "server_lr": 0.05}),
    (fedavgm, {"name": "fedavgm", "beta": 0.5}),
    (fedexp, {"name": "fedexp"}),
]


@pytest.mark.parametrize("variant", ["g", "sl", "cl", "g+cl"])
@pytest.mark.parametrize(("module", "base"), BASES)
def test_any_base_is_scheduled(module: Any, base: dict[str, Any], variant: str) -> None:
    own = {key: value for key, value in base.items() if key != "name"}
    expected = many(module.build(module.Config(**FEW, weighting="uniform", **own), TASK))
    still = fedhyper.build(fedhyper.Config(**FEW, variant=variant, base=base, hyper_rate=0.0), TASK)
    assert same(many(still), expected)
    moving = many(fedhyper.build(fedhyper.Config(**FEW, variant=variant, base=base), TASK))
    assert not same(moving, expected)
    blocks = many(fedhyper.build(fedhyper.Config(**FEW, variant=variant, base=base), TASK), execution="batched")
    torch.testing.assert_close(blocks, moving, rtol=1e-10, atol=1e-12)


# -- composition, by hand (property 18) -----------------------------------------------------------------------------


def test_fedadam_sees_alpha_delta() -> None:
    """Two rounds beside the server optimiser itself: it gets −1, then −3/2 · Δ."""
    adam = optim.adaptive("adam", 0.1, 0.9, 0.99, 1e-3)
    start = {"w": torch.tensor([2.0], dtype=torch.float64)}
    w1, moments = adam.step(start, {"w": torch.tensor([-1.0], dtype=torch.float64)}, adam.init(start))
    delta = 0.5 * float(w1["w"])
    alpha = 1 + delta * 1.0
    w2, _ = adam.step(w1, {"w": torch.tensor([-alpha * delta], dtype=torch.float64)}, moments)
    seen = rounds({"variant": "g", "base": {"name": "fedadam", "server_lr": 0.1}}, n=2)
    assert seen[1].state.alpha == pytest.approx(alpha, rel=1e-14)
    torch.testing.assert_close(seen[1].state.base.w, w2, rtol=1e-13, atol=0)


def test_fedproxs_pull_is_in_the_gradient() -> None:
    """μ = 1, β = ½, κ = ¼, w = 2: g = 2, w = 1; g = 1 + (1 − 2) = 0, so the rate and the model stay."""
    seen = rounds({"variant": "cl", "epochs": 2, "hyper_rate": 0.25, "base": {"name": "fedprox", "mu": 1.0}}, n=1)[0]
    assert seen.trained.metrics["local_rate"] == 0.5 and w(seen) == 1.0


def test_scaffolds_control_stays_a_mean_of_gradients() -> None:
    """CL by hand above: gradients 2 and 1 at rates 0.5 and 0.7, Δ = 1.7, so c = 1.7 / 1.2."""
    config = fedhyper.Config(**ONE, variant="cl", epochs=2, hyper_rate=0.1, base="scaffold")
    strategy, executor = fedhyper.build(config, quadratic(ALONE, [2.0])), grid(ALONE)
    state, _ = run_round(strategy, strategy.init(KEY.torch()), 1, [0], executor, KEY)
    memory = executor.memory.get(0)
    assert memory and float(memory["control"]["w"]) == pytest.approx(1.7 / 1.2, rel=1e-14)
    assert float(state.base.c["w"]) == pytest.approx(1.7 / 1.2, rel=1e-14)


# -- what travels, and what is reported -----------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "extra"), [("g", 0), ("sl", 8), ("cl", 16), ("g+cl", 16), ("g+sl", 8)])
def test_bytes(variant: str, extra: int) -> None:
    """Two float64 parameters are 16 bytes. SL sends one number more, CL the last mean update, in round 1 as zeros."""
    strategy = fedhyper.build(fedhyper.Config(**FEW, variant=variant), TASK)
    state = strategy.init(KEY.torch())
    for r in (1, 2):
        state, trained = run_round(strategy, state, r, [0, 1, 2], grid(MANY), KEY)
        assert (trained.bytes_down, trained.bytes_up) == (3 * (16 + extra), 3 * 16)
    assert strategy.sends == (frozenset({"delta"}),)


def test_previous_is_the_mean_update_of_the_round_before() -> None:
    strategy = fedhyper.build(fedhyper.Config(**FEW, variant="g+cl"), TASK)
    state, executor = strategy.init(KEY.torch()), grid(MANY)
    assert same(strategy.phases[0].broadcast(state)["previous"], {"w": torch.zeros(2, dtype=torch.float64)})
    after, _ = run_round(strategy, state, 1, [0, 1, 2], executor, KEY)
    moved = {"w": after.base.w["w"] - state.base.w["w"]}  # α is 1 in round 1
    torch.testing.assert_close(strategy.phases[0].broadcast(after)["previous"], moved, rtol=1e-14, atol=1e-15)


def test_rates_are_reported() -> None:
    strategy = fedhyper.build(fedhyper.Config(**FEW, variant="g+cl"), TASK)
    executor, rates = grid(MANY), []
    for number in (0, 1, 2):
        _, trained = run_round(strategy, strategy.init(KEY.torch()), 1, [number], executor, KEY)
        rates.append(trained.metrics["local_rate"])
    state, trained = run_round(strategy, strategy.init(KEY.torch()), 1, [0, 1, 2], executor, KEY)
    ranked = [trained.metrics[f"local_rate_{k}"] for k in ("min", "median", "max")]
    assert ranked == sorted(rates) and ranked[0] < ranked[2]
    assert strategy.gauges and strategy.gauges(state) == {"alpha": state.alpha}
    sl = fedhyper.build(fedhyper.Config(**FEW, variant="sl"), TASK)
    assert sl.gauges and sl.gauges(sl.init(KEY.torch())) == {}


def test_the_range_merges_like_the_mean() -> None:
    from fedsim.types import Report

    reduce = ranged(weighted_mean("uniform"), "rate")
    a, b, c = (reduce.lift(Report(i, 1, {}, {"rate": x})) for i, x in enumerate((3.0, 1.0, 8.0)))
    mean = reduce.finish(reduce.merge(reduce.merge(a, b), c))
    assert mean and mean.metrics == {"rate": 4.0, "rate_min": 1.0, "rate_median": 3.0, "rate_max": 8.0}
    assert reduce.finish(None) is None


# -- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"alpha0": 4.0}, "strategy.alpha0: must be within its bounds, 0.333333 to 3 (got 4)"),
        ({"lr": 0.1, "max_lr": 0.05}, "strategy.max_lr: must be at least lr"),
        ({"base": "fedprx"}, "did you mean 'fedprox'"),
        ({"base": {"name": "fedprox", "nu": 1}}, "base.nu: unknown key"),
        ({"base": {"name": "fedprox", "lr": 0.1}}, "base.lr: belongs in [strategy]"),
        ({"base": "fedhyper"}, "has no local rate to schedule"),
        ({"variant": "gm", "base": "fedadam"}, "brings a base of its own"),
        ({"variant": "sl", "lr_schedule": {"name": "exponential", "factor": 0.9}}, "strategy.lr_schedule:"),
        ({"variant": "clg"}, "strategy.variant:"),
    ],
)
def test_a_wrong_config_is_named(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as e:
        check(fedhyper.Config, {"name": "fedhyper", **table}, "strategy")
    assert says in str(e.value)


def test_a_base_that_keeps_its_updates_cannot_be_scheduled() -> None:
    with pytest.raises(ConfigError, match="send 'delta'"):
        fedhyper.build(fedhyper.Config(**FEW, base="local"), TASK)


def test_a_dumped_config_is_the_same_config() -> None:
    config = fedhyper.Config(**FEW, variant="g+cl", base={"name": "fedprox", "mu": 0.1}, bounds=(0.5, 2.0))
    assert check(fedhyper.Config, config.model_dump(exclude_none=True), "strategy") == config


# -- the baseline beside it -----------------------------------------------------------------------------------------


def test_decay_by_hand() -> None:
    """Steps of β = ½ on g(w) = w: the server takes 1, ½ and ¼ of them; the clients' own decay does the same here."""
    decay = {"name": "exponential", "factor": 0.5}
    for key in ("server_lr_schedule", "lr_schedule"):
        config = check(fedavg.Config, {"name": "fedavg", **ONE, key: decay})
        ws = [float(x["w"]) for x in train(fedavg.build(config, quadratic(ALONE, [2.0])), ALONE, 3)]
        assert ws == [2.0, 1.0, 0.75, 0.75 * (1 - 0.125)]


# -- under differential privacy -------------------------------------------------------------------------------------

EXAMPLE = ["privacy.mode=example", "privacy.max_grad_norm=1.0"]
CLIENT = ["privacy.mode=client", "privacy.clip=0.5"]


def private(level: list[str], *strategy: str) -> tuple[Tree, dict[str, float], list[dict[str, float]]]:
    """The model and the gauges after three rounds on digits with repeatable noise, and what each round said."""
    common = ["strategy.weighting=uniform", "strategy.cohort=4", "strategy.epochs=2", "privacy.noise=seeded"]
    settings = [*common, "privacy.noise_multiplier=0.8", "privacy.delta=0.0001", *level, *strategy]
    driver = build(experiment("privacy={}", "data.holdout=0.0", *settings)).driver
    state, said = driver.begin(), []
    for r in (1, 2, 3):
        state, trained = driver.train(state, r)
        said.append(trained.metrics)
    return driver.params(state), driver.gauges(state), said


@pytest.mark.parametrize("level", [EXAMPLE, CLIENT])
@pytest.mark.parametrize("variant", ["g", "sl", "g+cl"])
def test_private_and_without_hyper_rate_it_is_private_fedavg(level: list[str], variant: str) -> None:
    expected, _, _ = private(level, "strategy.name=fedavg")
    settings = ["strategy.name=fedhyper", f"strategy.variant={variant}", "strategy.hyper_rate=0.0"]
    still, _, said = private(level, *settings)
    assert same(still, expected)
    assert said == [{}, {}, {}]  # a client's own rate is a function of its raw data: nothing of it is said


@pytest.mark.parametrize("level", [EXAMPLE, CLIENT])
def test_private_updates_move_the_rate(level: list[str]) -> None:
    """Post-processing: the rule sees the mean update as it was released, noise and all."""
    _, gauges, _ = private(level, "strategy.name=fedhyper", "strategy.variant=g")
    assert gauges["alpha"] != 1.0
