"""Accuracy right after local training, on the client's held-out examples."""

from dataclasses import replace

import pytest
import torch
from worlds import KEY, grid, points, quadratic, same

from clients.evaluate import after_training
from server.loop import run_round
from strategies import fedavg, hyperfl, scaffold

# Client 0 trains on 0 and 2 or two others of its four points; which ones are held out is the stream's choice.
WORLD = replace(points([[[0.0], [2.0], [4.0], [6.0]], [[5.0], [5.0]]]), holdout=0.5)
TASK = quadratic(WORLD, [3.0])
STEP = {"lr": 0.5, "batch_size": 8}


def test_by_hand() -> None:
    """Client k ends at w_k = 3 + ½ (mean of its training points − 3); its loss is the mean of ½ (w_k − p)²."""
    s = after_training(TASK, fedavg.build(fedavg.Config(**STEP), TASK))
    _, trained = run_round(s, s.init(KEY.torch()), 1, [0, 1], grid(WORLD), KEY)
    x, expected = WORLD.dataset.train.x[:, 0], 0.0
    for client, weight in ((0, 2), (1, 1)):
        train, held = (x[torch.from_numpy(WORLD.indices(client, split))] for split in ("train", "holdout"))
        w = 3 + (train.mean() - 3) / 2
        expected += weight / 3 * float((0.5 * (w - held) ** 2).mean())
    assert trained.metrics["local_loss"] == pytest.approx(expected, rel=1e-12)
    assert trained.metrics["local_accuracy"] == 0.0


@pytest.mark.parametrize("execution", ["plain", "batched"])
@pytest.mark.parametrize("module", [fedavg, scaffold])
def test_measuring_changes_nothing(module: object, execution: str) -> None:
    plain = module.build(module.Config(**STEP, epochs=3), TASK)  # type: ignore[attr-defined]
    states = []
    for s in (plain, after_training(TASK, plain)):
        executor, state = grid(WORLD, execution=execution), s.init(KEY.torch())
        for r in (1, 2):
            state, _ = run_round(s, state, r, [0, 1], executor, KEY)
        states.append(s.params(state))
    if execution == "plain":
        assert same(*states)
    torch.testing.assert_close(*states, rtol=1e-12, atol=0)


def test_a_model_is_known_where_there_is_one() -> None:
    from fedsim.tasks import mlp
    from fedsim.types import Local

    def local_of(s: object) -> Local:
        return s.phases[0].local  # type: ignore[attr-defined,no-any-return]

    task = mlp.build(mlp.Config(hidden=(4,), dtype="float64"), WORLD.dataset, 2)
    s = hyperfl.build(hyperfl.Config(hidden=4, embedding=3, head_epochs=60), task)
    watched = after_training(task, s)
    _, trained = run_round(watched, watched.init(KEY.torch()), 1, [0, 1], grid(WORLD), KEY)
    assert trained.metrics["local_accuracy"] == 1.0  # there is one label
    none = s._replace(phases=(s.phases[0]._replace(local=local_of(s)._replace(model=None)),))
    assert after_training(task, none) == none
