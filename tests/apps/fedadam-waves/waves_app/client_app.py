"""A node fits the network to its own stretch of the wave, and remembers how well it did the last time."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from waves_app.network import network

app = ClientApp()


def stretch(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    k, n = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    x = np.linspace(k / n, (k + 1) / n, 40 + 10 * k)
    noise = np.random.default_rng(k).normal(0, 0.05, len(x))
    return torch.tensor(x[:, None]), torch.tensor((np.sin(6 * x) + noise)[:, None])


@app.train()
def train(message: Message, context: Context) -> Message:
    net = network()
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    x, y = stretch(context)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
    before = float(context.state.metric_records.get("last", MetricRecord({"loss": 1.0}))["loss"])
    context.state["last"] = MetricRecord({"loss": loss.item()})
    metrics = MetricRecord({"loss": loss.item(), "better_by": before - loss.item(), "num-examples": len(x)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    net = network()
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    x, y = stretch(context)
    with torch.no_grad():
        loss = ((net(x) - y) ** 2).mean().item()
    return Message(RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": len(x)})}), reply_to=message)
