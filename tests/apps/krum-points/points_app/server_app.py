"""Krum: of all answers, the one nearest to the others."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Krum

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    nodes = settings["num-nodes"]  # both: else a round that begins with two nodes there has two
    strategy = Krum(min_train_nodes=nodes, min_available_nodes=nodes, num_malicious_nodes=settings["attackers"])
    strategy.start(grid, ArrayRecord([np.zeros(2)]), num_rounds=settings["num-server-rounds"])
