"""What a node does: a few epochs of gradient descent, and a count of its visits in its state."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from digits_app.task import model, share


def counting(message, context, call_next):
    """A mod: how many messages of each kind this node has had."""
    tally = context.state.config_records.get("tally", ConfigRecord())
    kind = message.metadata.message_type
    tally[kind] = int(tally.get(kind, 0)) + 1
    context.state["tally"] = tally
    reply = call_next(message, context)
    reply.content["metrics"]["messages"] = sum(int(n) for n in tally.values())
    return reply


app = ClientApp(mods=[counting])


def received(message, context):
    net = model()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net, *share(context.node_config["partition-id"], context.node_config["num-partitions"])


@app.train()
def train(message: Message, context: Context) -> Message:
    net, x, y = received(message, context)
    visits = int(context.state.metric_records.get("visits", MetricRecord({"n": 0}))["n"]) + 1
    context.state["visits"] = MetricRecord({"n": visits})
    lr = message.content["config"]["lr"] / visits  # a node that has been here before takes smaller steps
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(context.run_config["local-epochs"]):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "visits": visits, "num-examples": len(y)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    net, x, y = received(message, context)
    with torch.no_grad():
        right = (net(x).argmax(1) == y).float().mean().item()
    metrics = MetricRecord({"accuracy": right, "num-examples": len(y)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
