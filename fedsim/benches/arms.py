"""One run of one arm in a process of its own: ``python -m fedsim.benches.arms SPEC.json``.

It prints an object a line: {"event": "round", "round": r, "cpu": …, "time": …}, and at last {"event": "end",
"accuracy": …}. "cpu" is that of its whole process tree so far, read at the ends of the first and of the last round.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsim import offline
from fedsim.benches import proc


class Clock:
    """Tells the parent where a run is."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds

    def round(self, number: int) -> None:
        """A round has ended."""
        cpu = proc.cpu(os.getpid()) if number in (1, self._rounds) else None
        say({"event": "round", "round": number, "cpu": cpu, "time": time.monotonic()})


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def ours(spec: dict[str, Any], clock: Clock) -> float | None:
    """The engine, from the experiment's own config."""
    from fedsim import config
    from fedsim.run import build

    experiment = config.parse(spec["experiment"])
    session = build(experiment)
    try:
        state = session.driver.begin()
        for number in range(1, experiment.rounds + 1):
            state, _ = session.driver.train(state, number)
            clock.round(number)
        return accuracy(session, session.driver.params(state))
    finally:
        session.close()


def accuracy(session: Any, params: Any) -> float | None:
    """On the central test set, where the task has something to predict, and all clients one model."""
    if session.experiment.task.model.startswith("fedsim.benches") or not session.driver.is_global:
        return None
    from fedsim.tasks import metrics

    test = session.federation.dataset.test
    return float(metrics.evaluate(session.task, params, test.x, test.y, 512)["accuracy"])


def loop(spec: dict[str, Any], clock: Clock) -> float:
    """The bare loop that anybody would write: one torch.optim.SGD a client, slices of a shuffled copy, one mean."""
    import torch
    from torch.nn.functional import cross_entropy

    from fedsim import config
    from fedsim.rng import Key
    from fedsim.run import build

    experiment = config.parse(spec["experiment"])
    session = build(experiment)
    settings: Any = experiment.strategy
    assert session.task.module is not None
    model = session.task.module()
    w = session.task.init(Key.root(experiment.seed).at("init").torch())
    data, rng = session.federation.dataset, torch.Generator().manual_seed(experiment.seed)
    for number in range(1, experiment.rounds + 1):
        total = {name: torch.zeros_like(p) for name, p in w.items()}
        examples = 0
        for client in cohort(experiment, number):
            rows = torch.from_numpy(session.federation.indices(client, "train"))
            model.load_state_dict(w)
            optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
            for _ in range(settings.epochs or 1):
                mine = rows[torch.randperm(len(rows), generator=rng)]
                x, y = data.train.x[mine], data.train.y[mine]
                for i in range(0, len(mine), settings.batch_size):
                    optimizer.zero_grad()
                    logits = model(x[i : i + settings.batch_size])
                    loss = cross_entropy(logits, y[i : i + settings.batch_size])
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    total[name] += len(rows) * p
            examples += len(rows)
        w = {name: x / examples for name, x in total.items()}
        clock.round(number)
    result = accuracy(session, w)
    assert result is not None
    return result


def opacus(spec: dict[str, Any], clock: Clock) -> float:
    """Opacus's own way: a PrivacyEngine for each client, its Poisson loader and its optimizer."""
    import torch
    from torch.nn.functional import cross_entropy

    from fedsim import config
    from fedsim.rng import Key
    from fedsim.run import build

    engine = importlib.import_module("opacus").PrivacyEngine  # a peer here; the engine's own use of it is elsewhere
    private = spec["experiment"]["privacy"]
    experiment = config.parse({key: value for key, value in spec["experiment"].items() if key != "privacy"})
    session = build(experiment)
    settings: Any = experiment.strategy
    assert session.task.module is not None
    w = session.task.init(Key.root(experiment.seed).at("init").torch())
    data = session.federation.dataset
    for number in range(1, experiment.rounds + 1):
        total = {name: torch.zeros_like(p) for name, p in w.items()}
        examples = 0
        for client in cohort(experiment, number):
            rows = torch.from_numpy(session.federation.indices(client, "train"))
            model = session.task.module()
            model.load_state_dict(w)
            examples_of = torch.utils.data.TensorDataset(data.train.x[rows], data.train.y[rows])
            loader = torch.utils.data.DataLoader(examples_of, batch_size=settings.batch_size)
            model, optimizer, loader = engine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=settings.lr),
                data_loader=loader,
                noise_multiplier=private["noise_multiplier"],
                max_grad_norm=private["max_grad_norm"],
            )
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            for name, p in model._module.named_parameters():
                total[name] += len(rows) * p.detach()
            examples += len(rows)
        w = {name: x / examples for name, x in total.items()}
        clock.round(number)
    result = accuracy(session, w)
    assert result is not None
    return result


def cohort(experiment: Any, number: int) -> list[int]:
    """Who takes part in a round: the engine's own schedule."""
    from fedsim.rng import Key
    from server.sampling import uniform

    clients = experiment.data.partition.clients
    return uniform(Key.root(experiment.seed).at("cohort", number), clients, experiment.strategy.cohort)


def export(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The world as arrays, for peers: data, partition, cohorts and the initial model."""
    import numpy as np

    from fedsim import config
    from fedsim.rng import Key
    from fedsim.run import build

    experiment = config.parse(spec["experiment"])
    session = build(experiment)
    data, federation = session.federation.dataset, session.federation
    held = [federation.indices(c, "train") for c in range(len(federation))]
    arrays = {
        "train_x": data.train.x.numpy(),
        "train_y": data.train.y.numpy(),
        "test_x": data.test.x.numpy(),
        "test_y": data.test.y.numpy(),
        "order": np.concatenate(held),
        "bounds": np.concatenate([[0], np.cumsum([len(h) for h in held])]),
        "cohorts": np.array([cohort(experiment, r) for r in range(1, experiment.rounds + 1)]),
    }
    w = session.task.init(Key.root(experiment.seed).at("init").torch())
    for name, array in (arrays | {f"w.{n}": x.numpy() for n, x in w.items()}).items():
        np.save(folder / f"{name}.npy", array)
    return {"names": list(w), "task": experiment.task.model}


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    offline.prepare()
    arms: dict[str, Callable[[dict[str, Any], Clock], float | None]] = {"ours": ours, "loop": loop, "opacus": opacus}
    if spec["arm"] == "export":
        say({"event": "end", "accuracy": None, **export(spec, Path(spec["world"]))})
        return
    say({"event": "end", "accuracy": arms[spec["arm"]](spec, Clock(spec["experiment"]["rounds"]))})


if __name__ == "__main__":
    main()
