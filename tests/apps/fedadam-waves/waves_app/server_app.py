"""FedAdam, with the server's own measurement after each round."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam

from waves_app.network import network

app = ServerApp()


def measure(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    net = network()
    net.load_state_dict(arrays.to_torch_state_dict())
    x = np.linspace(0, 1, 200)
    with torch.no_grad():
        guess = net(torch.tensor(x[:, None]))[:, 0].numpy()
    return MetricRecord({"error": float(np.mean((guess - np.sin(6 * x)) ** 2))})


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    strategy = FedAdam(
        eta=settings["optimizer.eta"],
        tau=settings["optimizer.tau"],
        min_train_nodes=settings["num-nodes"],
        min_available_nodes=settings["num-nodes"],
    )
    strategy.start(
        grid,
        ArrayRecord(network().state_dict()),
        num_rounds=settings["num-server-rounds"],
        evaluate_fn=measure,
    )
