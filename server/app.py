"""The server as a Flower ``ServerApp``: ``fedsim run`` with its clients at the nodes of a deployment.

The run config says what to run (``experiment``, ``overrides``), where the run's folder is (``out``), whether it goes on
from a checkpoint there (``resume``), and how long to wait: ``timeout`` seconds for an answer, ``wait`` for nodes.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.errors import FedsimError, ResumeError

log = logging.getLogger("fedsim")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment. Raises ``FedsimError``, by which Flower marks the run as failed; a checkpoint stands."""
    from fedsim import node, offline
    from fedsim.config import Experiment
    from fedsim.run import run
    from server.nodes import Deployment, Nodes, Terms

    offline.prepare()
    log.setLevel(logging.INFO)
    settings = context.run_config
    experiment: Experiment = node.settings(settings)
    default = Path(os.environ.get("FEDSIM_RUNS", "runs")) / f"{experiment.name}-{context.run_id}"
    out, resume = Path(str(settings.get("out") or default)), bool(settings.get("resume"))
    name = name_of(out, context.run_id, resume)
    every, keep = experiment.checkpoint.every, experiment.checkpoint.keep

    def connect(population: int, least: int, extra: Mapping[str, Any]) -> Nodes:
        def header(round: int) -> dict[str, Any]:
            # The oldest round that a resume could go back to: until then, nodes keep what clients remembered.
            kept = max(0, ((round - 1) // every - keep + 1) * every)
            return {"run": name, "kept": kept, **extra}

        everybody = experiment.engine.on_error != "drop"
        terms = Terms(everybody, least, float(settings.get("timeout", 600)), float(settings.get("wait", 60)), header)
        return Nodes(grid, population, terms)

    print(f"run: {out.absolute()}", flush=True)
    try:
        summary = run(experiment, out, resume=resume, show=_show, deployment=Deployment(name, connect))
    except FedsimError as e:
        print(f"error: {e}", flush=True)
        raise
    print(f"{summary['status']}: params_sha256 {summary['params_sha256']}", flush=True)


def name_of(out: Path, run_id: int, resume: bool) -> str:
    """The name of a run at its nodes: that of Flower's first run. Raises ``ResumeError`` where it is not known."""
    from server.nodes import NAME

    path = out / NAME
    if not resume or not any((out / "checkpoint").glob("round-*")):
        return f"{run_id:016x}"
    try:
        name = path.read_text()
    except OSError:
        raise ResumeError(f"{path}: missing; this run did not begin on a deployment") from None
    if not re.fullmatch(r"[0-9a-f]{16,64}", name):
        raise ResumeError(f"{path}: damaged")
    return name


def _show(line: Mapping[str, Any]) -> None:
    """A round as one line of the ServerApp's log."""
    shown = (
        "accuracy",
        "loss",
        "train_loss",
        "client_accuracy",
        "personal_accuracy_mean",
        "clients",
        "epsilon",
        "seconds",
    )
    values = [f"{key} {line[key]:.4g}" for key in shown if isinstance(line.get(key), int | float)]
    print(f"round {line['round']}: {'  '.join(values)}", flush=True)
