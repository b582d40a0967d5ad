"""FedAvg over all nodes."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_app.task import model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    nodes = context.run_config["num-nodes"]  # both: else a round that begins with two nodes there has two
    strategy = FedAvg(min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
