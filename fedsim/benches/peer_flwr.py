"""Flower's own simulation (``run_simulation``, Ray backend), with its FedAvg and a lean client.

Flower samples nodes by itself: its cohorts are other clients of the same federation, equal in expectation. Ray is
left as Flower starts it.
"""

# mypy: ignore-errors
# Run as a script in an environment of its own, where fedsim is not installed.

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # in Flower's favour: at nice 15 its workers starve on a busy machine
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from world import World, argument, say, train

client_app = ClientApp()
_world: list[World] = []


def here() -> World:
    """This process's world."""
    if not _world:
        torch.set_num_threads(1)
        _world.append(World(os.environ["FEDSIM_BENCH_SPEC"]))
    return _world[0]


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    world, client = here(), int(context.node_config["partition-id"])
    echo = world.spec["arm"].endswith("noop")
    arrays: ArrayRecord = message.content.array_records["arrays"]
    n = len(world.rows(client))
    if not echo:
        model = world.model()
        model.load_state_dict(arrays.to_torch_state_dict())
        number = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        train(world, model, client, torch.Generator().manual_seed(number * 1_000_003 + client))
        arrays = ArrayRecord(model.state_dict())
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": n})})
    return Message(content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that tells when its rounds end."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        failed = sum(r.has_error() for r in replies)
        if failed:
            raise RuntimeError(f"{failed} of {len(replies)} clients failed")
        result = super().aggregate_train(server_round, replies)
        here().round(server_round)
        return result


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    world = here()
    size = len(world.cohorts[0])
    strategy = Timed(
        fraction_train=size / world.clients,
        min_train_nodes=size,
        min_available_nodes=world.clients,
        fraction_evaluate=0.0,
    )
    result = strategy.start(grid, ArrayRecord(world.model().state_dict()), num_rounds=world.rounds)
    model = world.model()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    say({"event": "end", "accuracy": world.accuracy(model)})


if __name__ == "__main__":
    import logging

    from flwr.simulation import run_simulation

    os.environ["FEDSIM_BENCH_SPEC"] = argument()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    import peer_flwr  # by its name, so that its functions travel as a reference

    run_simulation(peer_flwr.server_app, peer_flwr.client_app, here().clients, backend_config=resources)
