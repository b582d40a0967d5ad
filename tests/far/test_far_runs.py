"""Whole runs with their clients on a device of their own (accelerator.py): the numbers of a CPU.

Every kind of task, privacy of both levels, an attack, a strategy of Flower's: whatever is left on the host by mistake
is refused there, as a GPU would.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator import accelerator, formed
from torch import nn

from fedsim import run as running
from fedsim.tasks import adapters
from fedsim.worker import say_once
from runs import experiment, lines

SEEDED = "privacy.noise=seeded privacy.noise_multiplier=1.0 privacy.delta=0.001 data.holdout=0"
CLIENT = f"strategy.name=fedavg strategy.weighting=uniform privacy.mode=client privacy.clip=0.5 {SEEDED}"
EXAMPLE = f"privacy.mode=example privacy.max_grad_norm=0.5 {SEEDED}"
ATTACK = "attack.every=2 attack.victims=1 attack.iterations=4"
RUNS = {
    "a network by hand": "task.model=cnn",
    "a step not written out": "task.model=mlp strategy.name=fedavg strategy.optimizer=adam",
    "evaluated after training": "task.model=mlp evaluate.local=true",
    "dropout": "task.model=test_far_runs:dropping",
    "a recurrent network": "task.model=test_far_runs:recurrent",
    "a strategy of Flower's": "strategy.name=flwr.serverapp.strategy:FedAdam",
    "client-level privacy": CLIENT,
    "and a bound that adapts": f"{CLIENT} privacy.adaptive.bit_noise=5.0",
    "example-level privacy": f"strategy.name=scaffold task.model=cnn {EXAMPLE}",
    "and Opacus": f"strategy.name=fedavg task.model=mlp privacy.grad_sample=opacus {EXAMPLE}",
    "and adapters": f"strategy.name=ffa_lora task.model=mlp {EXAMPLE}",
    "an inversion": f"{ATTACK} strategy.name=fedavg attack.method=dlg task.model=lenet",
    "of inferred labels": f"{ATTACK} strategy.name=fedavg attack.labels=inferred task.model=cnn",
    "of a hypernetwork": f"{ATTACK} strategy.name=hyperfl attack.knowledge=joint task.model=mlp task.hidden=[8]",
    "by its structure": f"{ATTACK} strategy.name=hyperfl attack.knowledge=analytic task.model=mlp task.hidden=[8]",
}


def dropping() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 10))


class Recurrent(nn.Module):
    """Reads a picture row by row. (nn.LSTM is one operation on a CPU and another elsewhere.)"""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Linear(8 + 12, 12), nn.Linear(12, 10)

    def forward(self, x: Any) -> Any:
        h = x.new_zeros(len(x), 12)
        for row in x.view(len(x), 8, 8).unbind(1):
            h = self.step(torch.cat([row, h], 1)).tanh()
        return self.out(h)


def recurrent() -> nn.Module:
    return Recurrent()


@pytest.mark.parametrize("what", RUNS)
def test_a_run_there_has_the_numbers_of_a_run_here(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = experiment("task.dtype=float64", "engine.execution=batched", "rounds=3", *RUNS[what].split())
    here = running.run(setup, tmp_path / "here")
    monkeypatch.setattr(adapters._Sum, "of", formed)
    with accelerator() as device:
        monkeypatch.setattr(running, "device", lambda name: device)
        there = running.run(setup, tmp_path / "there")
        assert running.build(setup).federation.dataset.train.x.device == device
    assert there["status"] == here["status"] == "completed"
    for a, b in zip(lines(tmp_path / "here"), lines(tmp_path / "there"), strict=True):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-9)


def test_a_gpu_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    with caplog.at_level(logging.INFO, "fedsim"):
        assert running.device("cpu") == torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert "not used" not in caplog.text
        assert [running.device(name).type for name in ("cpu", "cuda", "auto")] == ["cpu", "cuda", "cuda"]
    assert caplog.text.count("a GPU is here and not used") == 1
