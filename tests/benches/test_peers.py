"""A peer does the work that the engine does: where every step takes a whole client, no shuffle tells them apart."""

import pytest

from fedsim import bench
from fedsim.bench import Arm
from fedsim.errors import FedsimError

TESTED = 1000  # examples in the test set of mnist_small


def environment(peer: str) -> str:
    try:
        return bench.environment(peer)
    except FedsimError as e:
        if "cannot be installed" not in str(e):
            raise
        pytest.skip(str(e))


@pytest.mark.slow
@pytest.mark.parametrize("peer", [peer for peer in bench.PEERS if peer != "flwr"])  # Flower has other cohorts
def test_a_peer_trains_the_same(peer: str) -> None:
    python = environment(peer)
    w = bench.workloads("mnist_small")["w2"]
    tables = dict(w.experiment) | {
        "rounds": 3,
        "data": {"name": "mnist_small", "partition": {"name": "dirichlet", "clients": 30, "alpha": 0.3}},
    }
    tables["strategy"] = dict(tables["strategy"]) | {"cohort": 10, "batch_size": 4000, "lr": 0.3, "epochs": 2}
    small = w._replace(experiment=tables, arms=(Arm("fedsim"),))
    ours, theirs = bench.measure(small, 1, {peer: python})
    assert ours.accuracy is not None and theirs.accuracy is not None
    assert ours.accuracy > 0.3
    assert abs(ours.accuracy - theirs.accuracy) <= 1.5 / TESTED
