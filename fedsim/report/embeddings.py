"""Clients' embeddings as points: do those with like data lie together?

Read from the last checkpoint of a run whose clients remember a channel "embed" (HyperFL, pFedHN). What is drawn is how
far each embedding has moved from where its client drew it, on the two axes along which these moves differ most; the
draws themselves are random and would hide it. A client's group are the labels of which it has more than the average.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim import checkpoint, data, files, registry
from fedsim.block import Guest, Work, remembered
from fedsim.config import Experiment
from fedsim.errors import ResumeError
from fedsim.rng import Key
from fedsim.types import Strategy

PICTURE = "embeddings.svg"
MOST = 500  # clients in the picture


class Moved(NamedTuple):
    """Clients' numbers, how far their embeddings moved (clients, D), the group of each, and the labels of a group."""

    clients: list[int]
    moves: Tensor
    groups: Tensor
    names: list[str]


def separation(moves: Tensor, groups: Tensor) -> float:
    """Mean distance within a group over mean distance between groups; below 1 where groups lie together."""
    distance = torch.cdist(moves.double(), moves.double())
    same = groups[:, None] == groups
    own = same & ~torch.eye(len(groups), dtype=torch.bool)
    return float(distance[own].mean() / distance[~same].mean())


def read(experiment: Experiment, folder: Path) -> Moved | None:
    """The moves of a run's embeddings; None where its clients have none, or fewer than three of them do."""
    federation = data.federation(experiment.data, experiment.seed)
    task = registry.load("tasks", experiment.task.model).build(experiment.task, federation.dataset, len(federation))
    strategy = registry.load("strategies", experiment.strategy.name).build(experiment.strategy, task)
    if not isinstance(strategy, Strategy) or strategy.phases[0].local.remember is None:
        return None
    state, key = strategy.init(Key.root(experiment.seed).at("init").torch()), Key.root(experiment.seed)
    try:
        found = checkpoint.Store(folder / "checkpoint", 1).load(checkpoint.named_tuples(state))
    except ResumeError:
        return None
    clients = sorted(found.memory)[:MOST]
    if len(clients) < 3 or "embed" not in found.memory[clients[0]]:
        return None
    work = Work(1, 0, strategy.phases[0].local, strategy.phases[0].broadcast(state), key)
    moves: list[Tensor] = []
    groups: dict[tuple[int, ...], list[int]] = {}
    for client in clients:
        (now,), (start,) = (m["embed"].values() for m in (found.memory[client], remembered(work, Guest(client, None))))
        moves.append((now - start).flatten())
        own = federation.dataset.train.y[torch.from_numpy(federation.indices(client, "train"))].flatten()
        counts = own.bincount(minlength=federation.dataset.classes)
        groups.setdefault(tuple((counts > counts.double().mean()).nonzero()[:, 0].tolist()), []).append(client)
    number = {client: i for i, (_, mine) in enumerate(sorted(groups.items())) for client in mine}
    names = [", ".join(map(str, labels[:6])) for labels in sorted(groups)]
    return Moved(clients, torch.stack(moves), torch.tensor([number[c] for c in clients]), names)


def draw(experiment: Experiment, folder: Path) -> None:
    """Write ``embeddings.svg``, where there is anything to draw."""
    if experiment.privacy is not None:
        return  # whose noise decided where they went, and whose key named the draws
    moved = read(experiment, folder)
    if moved is not None:
        files.write(folder / PICTURE, _picture(moved).encode())


def _picture(moved: Moved) -> str:
    import matplotlib

    from fedsim.report import figures

    centred = (moved.moves - moved.moves.mean(0)).double()
    axes_of = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    points = np.asarray(centred @ axes_of.T)
    if points.shape[1] == 1:
        points = np.concatenate([points, np.zeros_like(points)], 1)
    with matplotlib.rc_context(figures.RC):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for i, labels in enumerate(moved.names):
            x, y = points[(moved.groups == i).numpy()].T
            axes.scatter(x, y, s=22, color=figures.COLOUR[f"s{i % figures.SERIES}"], label=f"labels {labels}", lw=0)
        if len(moved.clients) <= 60:
            for client, point in zip(moved.clients, points, strict=True):
                axes.annotate(str(client), tuple(point), fontsize=6, xytext=(3, 2), textcoords="offset points")
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        within = _said(moved)
        axes.set_title(f"Moves of the clients' embeddings{within}")
        if len(moved.names) <= figures.SERIES:
            axes.legend(loc="best", fontsize=7, ncols=2)
        return figures.standalone(figures._svg(figure, "embeddings", "Moves of the clients' embeddings"))


def _said(moved: Moved) -> str:
    if len(moved.names) in (1, len(moved.clients)):
        return ""
    return f" (within / between groups: {separation(moved.moves, moved.groups):.2f})"
