"""Leaks as regression tests: what follows exactly from an update, and attacks that succeed and fail where they must."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from clients.alternate import private_names
from clients.hypernet import hypernet
from fedsim import attack, config, tree
from fedsim.attacks import analytic
from fedsim.attacks.invert import Plan, cosine, flat, invert
from fedsim.autodiff import value_and_grad
from fedsim.data.dataset import Split
from fedsim.errors import ConfigError
from fedsim.rng import Key
from fedsim.run import Session, build, run
from fedsim.types import Batch, Tree

TABLES: dict[str, Any] = {
    "name": "leak",
    "seed": 3,
    "rounds": 1,
    "data": {"name": "digits", "partition": {"name": "iid", "clients": 20}},
    "task": {"model": "mlp", "hidden": [24], "dtype": "float64"},
    "strategy": {"name": "fedavg", "cohort": 2, "lr": 0.1},
    "attack": {"victims": 1, "iterations": 60},
}
HYPER = {"name": "hyperfl", "cohort": 2, "hidden": 12, "embedding": 6, "epochs": 1, "allow_single_step": True}


def experiment(**changes: Any) -> config.Experiment:
    return config.parse(TABLES | {k: TABLES.get(k, {}) | v if k != "strategy" else v for k, v in changes.items()})


def attacker(e: config.Experiment) -> tuple[attack.Attacker, Session]:
    session = build(e)
    sigma = session.private.sigma if session.private else None
    return attack.build(e, session.federation, session.task, sigma), session


def victim(e: config.Experiment) -> tuple[attack.Attacker, attack.Victim]:
    a, session = attacker(e)
    return a, a.capture(session.driver.begin(), session.memory, 4, 1)


# --- What follows exactly -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["dense", "lowrank", "kronecker"])
@pytest.mark.parametrize("examples", [1, 5])
def test_one_gradient_of_phi_gives_theta_and_its_gradient(head: str, examples: int) -> None:
    """The leak: for any batch size, without the embedding and without the private head."""
    e = experiment(strategy=HYPER | {"head": head, "momentum": 0.5}, attack={"examples": examples})
    a, v = victim(e)
    got = a.read(v)
    own = a.guessed.personal(v.shared, v.memory)  # type: ignore[misc]
    names = private_names(own, None)
    for n, theta in got.theta.items():
        torch.testing.assert_close(theta, own[n], rtol=1e-7, atol=1e-9)
    assert own.keys() - got.theta.keys() == set(names)
    # The gradient is that at the head after its own pass, which is what the client has when it trains φ.
    _, g = value_and_grad(a.task.loss)(got.theta | _after(a, v), Batch(v.x, v.y))
    for n, by_theta in got.gradient.items():
        torch.testing.assert_close(by_theta, g[n], rtol=1e-6, atol=1e-10)


def _after(a: attack.Attacker, v: attack.Victim) -> Tree:
    """The victim's head when it sends."""
    from fedsim import block
    from fedsim.block import Guest, Work

    local = a.strategy.phases[0].local
    done, _ = block.one(Work(1, 0, local, v.shared, a.key), a.federation, Guest(v.client, v.memory))
    assert flat(done.value).equal(flat(v.sent))
    return done.memory["head"]


def test_a_first_linear_layer_gives_its_input() -> None:
    """With an MLP as body, one example is read off the update of HyperFL, label and embedding unknown."""
    a, v = victim(experiment(strategy=HYPER))
    got = a.read(v)
    x = analytic.linear_input(got.gradient["fc1.weight"], got.gradient["fc1.bias"])
    torch.testing.assert_close(x.view(8, 8), v.x[0, 0], rtol=1e-5, atol=1e-6)


def test_several_steps_keep_the_bias_identity() -> None:
    """Δb_k is what momentum SGD did to θ_k: its direction stays close to that of the first gradient."""
    a, v = victim(experiment(strategy=HYPER | {"epochs": 5, "allow_single_step": False, "lr": 0.001}))
    many = a.read(v)
    b, w = victim(experiment(strategy=HYPER | {"lr": 0.001}))
    one = b.read(w)
    for n in one.gradient:
        assert float(cosine(many.gradient[n].flatten(), one.gradient[n].flatten())) < 0.05
        torch.testing.assert_close(many.theta[n], one.theta[n], rtol=0.05, atol=0.02)


def test_the_attacker_counts_the_steps_that_were_taken() -> None:
    """HyperFL takes five epochs where nothing is said, and the rate is that of the round."""
    said = {"lr": 0.001, "allow_single_step": False, "momentum": 0.0, "weight_decay": 0.0}
    five, v = victim(experiment(strategy=HYPER | said | {"epochs": 5}))
    table = {key: value for key, value in (HYPER | said).items() if key != "epochs"}
    usual, w = victim(experiment(strategy=table | {"lr_schedule": {"name": "step", "every": 1, "factor": 0.2}}))
    delta = {"w": torch.tensor([1.0])}
    one = five.as_gradient(delta, delta, v)["w"]
    assert one.item() == pytest.approx(-1 / (5 * 0.001))
    assert torch.equal(usual.as_gradient(delta, delta, w)["w"], one)
    assert usual.as_gradient(delta, delta, w._replace(round=2))["w"].item() == pytest.approx(5 * one.item())


def test_the_mean_gradient_of_momentum_steps_by_hand() -> None:
    """η = 0.1, μ = ½, no decay, gradients 1 and 1: moves 0.1 and 0.15, weights 1.5 and 1 of 2.5."""
    delta = {"w": torch.tensor([-0.25])}
    assert analytic.gradient_of(delta, {"w": torch.zeros(1)}, 0.1, 2, 0.5, 0.0)["w"].item() == pytest.approx(1.0)
    decayed = analytic.gradient_of({"w": torch.tensor([-0.1])}, {"w": torch.tensor([2.0])}, 0.1, 1, 0.0, 0.25)
    assert decayed["w"].item() == pytest.approx(0.5)


def test_a_batch_of_one_has_one_a() -> None:
    shapes = {"w": torch.Size([4, 3]), "b": torch.Size([4])}
    net = hypernet(shapes, 5, (7,))
    g = Key.root(2).torch()
    phi = net.init(g, {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()})
    v = torch.randn(5, generator=g, dtype=torch.float64)
    want = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    gradient = torch.func.grad(lambda p: tree.dot(net.generate(p, v), want))(phi)
    got = analytic.generated(gradient, phi, shapes)
    torch.testing.assert_close(got.a, torch.relu(phi["trunk.0.weight"] @ v + phi["trunk.0.bias"]))
    torch.testing.assert_close(got.theta, net.generate(phi, v))


def test_labels_by_hand() -> None:
    """Two of class 2 and one of class 0, p uniform over four: p − onehot averages to ¼ − ⅔, ¼ − ⅓ and ¼."""
    gradient = torch.tensor([1 / 4 - 1 / 3, 1 / 4, 1 / 4 - 2 / 3, 1 / 4])
    assert analytic.labels(gradient, 3).tolist() == [0, 2, 2]


# --- Attacks through the engine -----------------------------------------------------------------------------------


def loot(e: config.Experiment) -> dict[str, float]:
    a, session = attacker(e)
    return attack.figures(a(session.driver.begin(), session.memory, 1))


@pytest.mark.parametrize("method", ["ig", "dlg", "rog"])
def test_fedavg_leaks(method: str) -> None:
    """The positive control: every method beats the mean image on one example of an MLP."""
    step = 0.1 if method == "ig" else 0.05
    f = loot(experiment(attack={"method": method, "iterations": 150, "step": step, "tv": 1e-3}))
    assert f["attack_psnr"] > f["attack_psnr_mean_image"] + 1
    assert f["attack_label_accuracy"] == 1.0


def test_dlg_finds_the_labels_with_the_pictures() -> None:
    """Labels are optimised with the pictures unless they are said to be known; three examples of three labels."""
    how = {"method": "dlg", "iterations": 300, "examples": 3}
    a, v = victim(experiment(attack=how))
    assert a.config.labels == "optimised"
    found = a.loot(v)
    assert found.figures["label_accuracy"] == 1.0
    assert found.figures["psnr"] > found.figures["psnr_mean_image"] + 1
    assert attacker(experiment(attack=how | {"labels": "known"}))[0].config.labels == "known"
    assert attacker(experiment())[0].config.labels == "known"


@pytest.mark.parametrize("strategy", [{"name": "fedavg", "lr": 0.1, "epochs": 2}, HYPER, {"name": "fedper"}])
def test_certain_labels_are_labels(strategy: dict[str, Any]) -> None:
    """Probabilities that are 0 and 1 give what the victim sent, and its gradient by them is not 0."""
    a, v = victim(experiment(strategy=strategy | {"cohort": 2}, attack={"examples": 3, "labels": "optimised"}))
    y = torch.nn.functional.one_hot(v.y, 10).double().requires_grad_()
    sent = flat(attack.simulate(a.guessed.phases[0].local, v.shared, v.memory, Split(v.x, y), 10, a.key, 1))
    torch.testing.assert_close(sent, flat(v.sent), rtol=1e-6, atol=1e-9)
    (by_y,) = torch.autograd.grad(sent.square().sum(), y)
    assert (by_y != 0).all()


def test_of_several_exchanges_the_first_is_attacked_and_a_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    attacker(experiment())
    assert "exchanges" not in caplog.text
    attacker(experiment(strategy={"name": "fedzo", "cohort": 2, "accept": "if-better", "directions": 2}))
    assert "fedzo has 2 exchanges a round; what clients send in the first is attacked" in caplog.text


def test_dp_hides_what_fedavg_shows() -> None:
    private = {"mode": "example", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-5, "noise": "seeded"}
    e = config.parse(TABLES | {"privacy": private})
    f = loot(e)
    assert f["attack_psnr"] < f["attack_psnr_mean_image"]


def test_hyperfl_naive_fails_where_its_structure_succeeds() -> None:
    strategy = HYPER | {"parametrization": "mip"}
    how = {"iterations": 120, "step": 0.1, "tv": 1e-3, "victims": 2}
    naive = loot(experiment(strategy=strategy, attack=how | {"knowledge": "naive"}))
    known = loot(experiment(strategy=strategy, attack=how | {"knowledge": "analytic"}))
    assert naive["attack_psnr"] < naive["attack_psnr_mean_image"] < known["attack_psnr"]
    assert "attack_label_accuracy" not in naive  # the head does not travel


def test_joint_optimises_the_memory_that_it_guesses() -> None:
    strategy = HYPER | {"parametrization": "mip"}
    left = {k: loot(experiment(strategy=strategy, attack={"knowledge": k})) for k in ("naive", "joint", "oracle")}
    assert left["joint"]["attack_objective"] < 0.5 * left["naive"]["attack_objective"]
    assert left["oracle"]["attack_objective"] < 0.5 * left["naive"]["attack_objective"]


def test_at_the_truth_the_simulation_is_the_victim() -> None:
    """What the attacker runs is what the victim ran: with everything known the objective is 0."""
    for strategy in ({"name": "fedavg", "lr": 0.1, "epochs": 3, "momentum": 0.5}, HYPER, {"name": "fedper"}):
        a, v = victim(experiment(strategy=strategy | {"cohort": 2}, attack={"examples": 3}))
        sent = attack.simulate(a.guessed.phases[0].local, v.shared, v.memory, Split(v.x, v.y), 10, a.key, 1)
        torch.testing.assert_close(flat(sent), flat(v.sent), rtol=1e-6, atol=1e-9)


def test_an_attack_changes_nothing(tmp_path: Path) -> None:
    """A run with an attack every round has the parameters of one without, and says what leaked beside."""
    tables = TABLES | {"rounds": 2, "strategy": HYPER | {"epochs": 2, "allow_single_step": False}}
    plain = run(config.parse({k: v for k, v in tables.items() if k != "attack"}), tmp_path / "plain")
    how = {"every": 1, "victims": 1, "iterations": 2, "visit": {"epochs": 1, "allow_single_step": True}}
    watched = run(config.parse(tables | {"attack": how}), tmp_path / "watched")
    assert plain["params_sha256"] == watched["params_sha256"]
    lines = [json.loads(line) for line in (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()]
    assert all("attack_psnr" in line and "attack_psnr_mean_image" in line for line in lines)
    assert (tmp_path / "watched" / "attack.png").read_bytes()[:4] == b"\x89PNG"
    from fedsim.report import write

    page = write(tmp_path / "watched").read_text()
    assert "Originals above, reconstructions below" in page and "data:image/png;base64," in page
    assert "Leakage" not in write(tmp_path / "plain").read_text()


def test_every_other_round(tmp_path: Path) -> None:
    e = config.parse(TABLES | {"rounds": 3, "attack": {"every": 2, "victims": 1, "iterations": 1}})
    run(e, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["attack_psnr" in line for line in lines] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attack": {"knowledge": "analytic"}},
            "attack.knowledge: 'analytic' reads hypernetworks, and fedavg has none",
        ),
        ({"attack": {"visit": {"lr": -1.0}}}, "attack.visit.lr: must be greater than 0"),
        ({"data": {"name": "heart_disease", "partition": {"name": "iid", "clients": 2}}}, "reconstructs pictures"),
    ],
)
def test_what_cannot_be_attacked(changes: dict[str, Any], message: str) -> None:
    try:
        e = experiment(**changes)
        session = build(e)
    except ConfigError as problem:
        if "heart_disease" in str(problem):
            pytest.skip("heart_disease was not fetched")
        raise
    with pytest.raises(ConfigError, match=message):
        attack.build(e, session.federation, session.task)


def test_inversion_finds_a_linear_preimage() -> None:
    """u(x) = A x with A orthogonal: L-BFGS finds x itself."""
    g = Key.root(4).torch()
    a = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64))[0]
    truth = torch.rand(1, 8, 8, generator=g, dtype=torch.float64)
    plan = Plan("dlg", 50, 0.1, 0.0, 1)
    found = invert(lambda x, others: a @ x.flatten(), a @ truth.flatten(), (1, 8, 8), plan, g)
    torch.testing.assert_close(found.x, truth, rtol=0, atol=1e-5)
    assert found.objective < 1e-10


def test_a_folder_that_holds_something_is_not_written_into(tmp_path: Path) -> None:
    """Neither a file, nor what an attack before has left."""
    e = config.parse(TABLES | {"attack": {"victims": 1, "iterations": 1}})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"^--out: .*file is a file$"):
        attack.run(e, tmp_path / "file")
    attack.run(e, tmp_path / "out")
    before = runs.listing(tmp_path)
    with pytest.raises(ConfigError, match=r"^--out: .*out is not empty$"):
        attack.run(e, tmp_path / "out")
    assert runs.listing(tmp_path) == before
