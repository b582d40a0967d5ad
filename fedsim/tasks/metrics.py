"""What is measured on a model: centrally, and over clients."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim import tree
from fedsim.types import Batch, Task, Tree


def evaluate(task: Task, params: Tree, x: Tensor, y: Tensor, batch_size: int) -> dict[str, float]:
    """Accuracy, loss and macro-F1 on examples x (N, …) and labels y (N,) or (N, T); for sequences, over all tokens.

    Macro-F1 is the plain mean of F1 over the classes that occur among labels or predictions (scikit-learn's own rule).
    Runs in batches in the order given, without gradients, in evaluation mode: the numbers depend on the arguments
    alone. Raises ``ValueError`` for no examples or a batch size below 1.
    """
    params = tree.moved(params, x.device)
    if task.classes == 0:
        # An objective: every "example" is a client's function, and nothing is classified.
        with torch.no_grad():
            scored = task.score(params, Batch(x, y))
        more = {name: float(v) for name, v in scored.items() if name not in ("count", "correct", "loss")}
        return {"loss": float(scored["loss"] / scored["count"]), **more}
    if len(x) == 0 or batch_size < 1:
        raise ValueError(f"nothing to evaluate: {len(x)} examples in batches of {batch_size}")
    of_logits = getattr(task.score, "of_logits", None)
    sums = dict.fromkeys(("count", "correct", "loss"), 0.0)
    predicted = []
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            batch = Batch(x[start : start + batch_size], y[start : start + batch_size])
            logits = task.predict(params, batch.x)
            # Ours can score the logits at hand; a stranger's score sees the batch and predicts again.
            scored = of_logits(logits, batch) if of_logits else task.score(params, batch)
            for name in sums:
                sums[name] += float(scored[name])
            predicted.append(logits.argmax(-1).flatten())
    return {
        "accuracy": sums["correct"] / sums["count"],
        "loss": sums["loss"] / sums["count"],
        "macro_f1": _macro_f1(torch.cat(predicted).cpu().numpy(), y.flatten().cpu().numpy(), task.classes),
    }


def _macro_f1(predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], classes: int) -> float:
    """2·right / (predicted + labelled), averaged over the classes that occur.

    By counting: torchmetrics, told to be deterministic, makes a table of predictions × classes², 21 GB for Shakespeare.
    """
    right = np.bincount(labels[predicted == labels], minlength=classes)
    either = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    return float((2 * right[either > 0] / either[either > 0]).mean())


def spread(accuracies: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """How accuracy spreads over clients, as LEAF reports it (Caldas et al. 2018, arXiv:1812.01097).

    The mean weighs by ``weights`` (a client's examples); the worst and the 10th percentile (linear between ranks) count
    every client once. Clients of weight 0 have nothing to be measured on and are left out; with no other, gives {}.
    """
    measured = [(a, w) for a, w in zip(accuracies, weights, strict=True) if w > 0]
    if not measured:
        return {}
    values, importance = np.array(measured, dtype=np.float64).T
    return {
        "client_accuracy_mean": float(np.average(values, weights=importance)),
        "client_accuracy_worst": float(values.min()),
        "client_accuracy_p10": float(np.percentile(values, 10)),
    }
