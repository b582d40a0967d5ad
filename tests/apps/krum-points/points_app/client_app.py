"""An honest node steps towards its own points; the first nodes send something far away."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def points(partition: int) -> np.ndarray:
    return np.random.default_rng(100 + partition).normal((2.0, -1.0), 0.3, (30, 2))


@app.train()
def train(message: Message, context: Context) -> Message:
    (w,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    k = int(context.node_config["partition-id"])
    target = points(k).mean(0) if k >= context.run_config["attackers"] else np.array([1e3, 1e3])
    w = w + context.run_config["step"] * (target - w)
    metrics = MetricRecord({"distance": float(np.linalg.norm(target - w)), "num-examples": 30})
    return Message(RecordDict({"arrays": ArrayRecord([w]), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    (w,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    away = float(np.linalg.norm(points(int(context.node_config["partition-id"])) - w, axis=1).mean())
    return Message(RecordDict({"metrics": MetricRecord({"away": away, "num-examples": 30})}), reply_to=message)
