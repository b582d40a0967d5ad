# ruff: noqa: E501 - a table is read by its rows
"""What cannot be promised is refused in one line, with exit code 2, before anything is trained or written."""

from collections.abc import Callable
from pathlib import Path

import pytest

import runs
from runs import Answer, listing

CLIENT = (
    "strategy.name=fedavg",
    "strategy.weighting=uniform",
    "data.holdout=0.0",
    "privacy.mode=client",
    "privacy.clip=1.0",
)
EXAMPLE = ("strategy.name=fedavg", "data.holdout=0.0", "privacy.mode=example", "privacy.max_grad_norm=1.0")
SIGMA, DELTA = "privacy.noise_multiplier=1.0", "privacy.delta=1e-3"

MODELS = """
import torch
from torch import nn


def frozen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for p in model.parameters():
        p.requires_grad = False
    return model


def normed():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))
        self.register_buffer("unit", torch.ones(10))

    def forward(self, x):
        return x * self.weight * self.unit


def odd():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Scaled())
"""

BAD = [
    ("76 epsilon", (*CLIENT, DELTA, "privacy.target_epsilon=0.0"), "privacy.target_epsilon: must be greater than 0 (got 0.0)"),
    ("76 epsilon", (*CLIENT, DELTA, "privacy.target_epsilon=-3.0"), "privacy.target_epsilon: must be greater than 0 (got -3"),
    ("76 epsilon", (*CLIENT, DELTA, SIGMA, "privacy.max_epsilon=-1.0"), "privacy.max_epsilon: must be greater than 0 (got -1"),
    ("77 delta", (*CLIENT, SIGMA, "privacy.delta=0.0"), "privacy.delta: must be at least 1e-16 and less than 1 (got 0.0)"),
    ("77 delta", (*EXAMPLE, SIGMA, "privacy.delta=1.0"), "privacy.delta: must be at least 1e-16 and less than 1 (got 1.0)"),
    ("78 weak delta", (*CLIENT, SIGMA, "privacy.delta=0.2"), "privacy.delta: must be below 1/12, one over the number of clients"),
    ("78 weak delta", (*EXAMPLE, SIGMA, "privacy.delta=0.02"), "privacy.delta: must be below 1/120, one over the number of examples"),
    ("79 noise", (*CLIENT, DELTA, "privacy.noise_multiplier=-1.0"), "privacy.noise_multiplier: must be greater than 0 (got -1"),
    ("79 noise", (*CLIENT, DELTA, "privacy.noise_multiplier=0.0"), "privacy.noise_multiplier: must be greater than 0 (got 0.0)"),
    ("79 noise", (*EXAMPLE, DELTA, "privacy.noise_multiplier=nan"), "privacy.noise_multiplier: must be a finite number (got nan)"),
    ("80 clip", (*CLIENT, DELTA, SIGMA, "privacy.clip=0.0"), "privacy.clip: must be greater than 0 (got 0.0)"),
    ("80 clip", (*CLIENT, DELTA, SIGMA, "privacy.clip=inf"), "privacy.clip: must be a finite number (got inf)"),
    ("80 clip", (*EXAMPLE, DELTA, SIGMA, "privacy.max_grad_norm=nan"), "privacy.max_grad_norm: must be a finite number (got nan)"),
    ("80 clip", (*EXAMPLE, DELTA, SIGMA, "privacy.max_grad_norm=-1.0"), "privacy.max_grad_norm: must be greater than 0 (got -1"),
    ("81 unreachable", (*CLIENT, "privacy.delta=1e-9", "privacy.target_epsilon=1e-6", "rounds=1000"), "privacy.target_epsilon: must be at least 0.0"),
    ("82 both", (*CLIENT, DELTA, SIGMA, "privacy.target_epsilon=1.0"), "privacy.noise_multiplier: give either noise_multiplier or target_epsilon (got both)"),
    ("82 neither", (*CLIENT, DELTA), "privacy.noise_multiplier: give either noise_multiplier or target_epsilon (got neither)"),
    ("83 fixed sampler", (*CLIENT, DELTA, SIGMA, "privacy.sampling=fixed"), "privacy.sampling: must be 'poisson', the sampler that the accountants assume (got 'fixed')"),
    ("84 shuffled batches", (*EXAMPLE, DELTA, SIGMA, "privacy.sampling=shuffle"), "privacy.sampling: must be 'poisson', the sampler that the accountants assume (got 'shuffle')"),
    ("85 weights", (*CLIENT, DELTA, SIGMA, "strategy.weighting=examples"), "strategy.weighting: must be 'uniform' under privacy.mode = 'client'"),
    ("86 seeded claim", (*CLIENT, DELTA, "privacy.target_epsilon=2.0", "privacy.noise=seeded"), "privacy.noise: 'seeded' protects nobody, so there can be no target_epsilon"),
    ("86 seeded claim", (*EXAMPLE, DELTA, SIGMA, "privacy.max_epsilon=2.0", "privacy.noise=seeded"), "privacy.noise: 'seeded' protects nobody, so there can be no max_epsilon"),
    ("87 memory", (*CLIENT, DELTA, "privacy.noise_multiplier=0.1"), "privacy.noise_multiplier: must be in 0.2..10000 (got 0.1)"),
    ("87 memory", (*CLIENT, DELTA, "privacy.noise_multiplier=0.2", "privacy.accountant=prv", "rounds=100000"), "privacy.accountant: 'prv' would need"),
    ("87 memory", (*CLIENT, DELTA, "privacy.noise_multiplier=0.2", "privacy.accountant=pld", "rounds=100000"), "privacy.accountant: 'pld' would need"),
    ("88 too small", (*CLIENT, DELTA, SIGMA, "privacy.max_epsilon=0.5"), "privacy.max_epsilon: must be at least"),
    ("89 layer", (*EXAMPLE, DELTA, SIGMA, "task.model=models:normed"), "layer '2' (BatchNorm1d) keeps statistics"),
    ("89 layer", (*EXAMPLE, DELTA, SIGMA, "task.model=models:odd", "privacy.grad_sample=opacus"), "privacy.grad_sample: layer '2' (Scaled) has no gradients of single examples"),
    ("90 frozen", (*EXAMPLE, DELTA, SIGMA, "task.model=models:frozen"), "task.model: has no trainable parameter"),
    ("gdp", (*CLIENT, DELTA, SIGMA, "privacy.accountant=gdp"), "privacy.accountant: must be 'rdp', 'prv' or 'pld' (got 'gdp')"),
    ("typo", (*CLIENT, DELTA, SIGMA, "privacy.max_epsilom=1.0"), "privacy.max_epsilom: unknown key; did you mean 'max_epsilon'?"),
    ("wrong norm", (*CLIENT, DELTA, SIGMA, "privacy.max_grad_norm=1.0"), "privacy.max_grad_norm: does not belong to mode 'client', which clips to clip"),
    ("73 gauge", (*CLIENT, DELTA, SIGMA, "strategy.name=fedexp"), "looks at every client's update"),
    ("flower", (*EXAMPLE, DELTA, SIGMA, "strategy.name=flwr.serverapp.strategy:FedAvg"), "a strategy of Flower's brings a sampler"),
]  # fmt: skip


@pytest.fixture
def fedsim(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Answer]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "models", raising=False)
    return runs.inside(capsys, monkeypatch)


@pytest.mark.parametrize(("assignments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refused(fedsim: Callable[..., Answer], tmp_path: Path, assignments: tuple[str, ...], message: str) -> None:
    file = runs.write(tmp_path / "a.toml", *assignments)
    before = listing(tmp_path)
    answer = fedsim("run", file, "--out", tmp_path / "out")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert answer.err.startswith("error: ")
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert listing(tmp_path) == before
    assert fedsim("privacy", "plan", file).code == 2


def test_88_a_budget_that_is_spent_is_not_spent_again(fedsim: Callable[..., Answer], tmp_path: Path) -> None:
    """The run stops by itself before the round that would exceed it; to go on is refused until the budget is raised."""
    file = runs.write(tmp_path / "a.toml", *CLIENT, DELTA, SIGMA, "privacy.max_epsilon=4.0", "rounds=9")
    out = tmp_path / "out"
    assert fedsim("run", file, "--out", out).code == 0
    rows = runs.lines(out)
    assert runs.summary(out)["status"] == "stopped"
    assert 0 < len(rows) < 9
    assert rows[-1]["epsilon"] <= 4.0
    again = fedsim("run", file, "--out", out, "--resume")
    assert again.code == 2
    assert again.err.startswith(f"error: privacy.max_epsilon: 4 is spent after round {len(rows)} (epsilon ")
    assert runs.lines(out) == rows
    raised = fedsim("run", file, "privacy.max_epsilon=5.0", "--out", out, "--resume")
    assert raised.code == 0, raised.err
    longer = runs.lines(out)
    assert longer[: len(rows)] == rows
    assert rows[-1]["epsilon"] < longer[-1]["epsilon"] <= 5.0


def test_a_weak_delta_can_be_forced(fedsim: Callable[..., Answer], tmp_path: Path) -> None:
    file = runs.write(
        tmp_path / "a.toml", *CLIENT, SIGMA, "privacy.delta=0.2", "privacy.allow_weak_delta=true", "rounds=1"
    )
    assert fedsim("run", file, "--out", tmp_path / "out").code == 0
