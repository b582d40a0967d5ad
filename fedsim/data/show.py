"""A look at a partition: how many examples clients have, and of which labels.

All functions ask a bounded number of clients, evenly spread over the population: a million of them is no more work.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim import describe
from fedsim.data.dataset import Federation
from fedsim.errors import ConfigError

SHOWN = 60  # clients in the table and in the picture
LISTED = 10  # labels of a client in the table
SIZED = 2000  # clients whose sizes make the histogram
# Paul Tol's "muted" scheme: nine colours that differ for every kind of colour blindness, and a grey for the rest.
COLOURS = ("#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677", "#AA4499", "#44AA99", "#999933", "#882255")
GREY = "#DDDDDD"
INK = "#333333"


class Row(NamedTuple):
    """One client. ``labels`` counts its training labels, (classes,); of a sequence, every position counts.

    ``name`` is the natural owner, where all its examples have the same one.
    """

    client: int
    name: str
    examples: int
    holdout: int
    labels: npt.NDArray[np.int64]


def summary(federation: Federation, limit: int = SHOWN) -> list[Row]:
    """All clients in order where they are at most ``limit``; else so many, from the smallest to the largest.

    The latter are evenly spread in the order of their sizes, out of at most 2,000 evenly spread over the population.
    """
    data = federation.dataset
    y, owner = data.train.y.cpu().numpy(), data.train.client
    rows = []
    chosen = _spread(len(federation), SIZED if len(federation) > limit else limit)
    if len(chosen) > limit:
        by_size = np.argsort([federation.size(c, "train") for c in chosen], kind="stable")
        chosen = [chosen[by_size[i]] for i in _spread(len(chosen), limit)]
    for client in chosen:
        mine = federation.indices(client, "train")
        names = set(owner[mine].tolist()) if owner is not None else set()
        counts = np.bincount(y[mine].reshape(-1), minlength=data.classes)
        held = federation.size(client, "holdout")
        rows.append(Row(client, names.pop() if len(names) == 1 else "", len(mine), held, counts))
    return rows


def lines(federation: Federation) -> list[str]:
    """``summary`` in words: how many clients there are and which are shown, then a line each under a heading."""
    clients, rows = len(federation), summary(federation)
    few = f"; {len(rows)} of them, from the smallest to the largest" if len(rows) < clients else ""
    if clients > SIZED and few:
        few += f" of {SIZED:,}"
    owned, held = any(row.name for row in rows), any(row.holdout for row in rows)
    table = [("client", *["owner"] * owned, "examples", *["holdout"] * held, "labels (label:examples)")]
    for row in rows:
        owner, holdout = [row.name] * owned, [f"{row.holdout:,}"] * held
        table.append((f"{row.client:,}", *owner, f"{row.examples:,}", *holdout, _counts(row.labels)))
    return [f"{federation.dataset.name}: {clients:,} client{'s' * (clients != 1)}{few}", *describe.table(table)]


def _counts(labels: npt.NDArray[np.int64]) -> str:
    """The ten most common labels with their counts, in the order of the labels."""
    common = np.argsort(-labels, kind="stable")[:LISTED]
    said = " ".join(f"{label}:{labels[label]}" for label in np.sort(common) if labels[label])
    others = np.count_nonzero(labels) - np.count_nonzero(labels[common])
    return f"{said} and {others} others" if others else said


def draw(federation: Federation, path: Path | None = None) -> str:
    """The picture of a partition as SVG, from ``<svg`` to ``</svg>``: fit for a file and for the middle of a page.

    Left, the labels of at most 60 clients as stacked bars; right, on the same axis, how many clients have which size.
    Equal federations give equal text. Written to ``path`` too, where given; ``ConfigError`` where it cannot be.
    """
    # Half a second, which only those should pay who want a picture. Never pyplot: it keeps figures, and picks a screen.
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fedsim",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#999999",
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        _bars(figure, federation)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    if path is not None:
        try:
            path.write_text(svg, encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"{path}: cannot be written: {e.strerror or e}") from None
    return svg


def _spread(clients: int, limit: int) -> list[int]:
    """At most ``limit`` numbers of 0..clients-1, with the first and the last, evenly apart."""
    chosen: list[int] = np.unique(np.linspace(0, clients - 1, min(clients, limit)).round().astype(np.int64)).tolist()
    return chosen


def _groups(rows: Sequence[Row]) -> list[tuple[str, str, npt.NDArray[np.int64]]]:
    """(label, colour, count for each client): every label where they are ten at most, else the nine most common."""
    table = np.stack([row.labels for row in rows])
    total, classes = table.sum(0), table.shape[1]
    if classes <= len(COLOURS) + 1:
        return [(str(c), (*COLOURS, GREY)[c], table[:, c]) for c in range(classes)]
    common = sorted(np.argsort(-total, kind="stable")[: len(COLOURS)].tolist())
    rest = np.setdiff1d(np.arange(classes), common)
    named = [(str(c), colour, table[:, c]) for c, colour in zip(common, COLOURS)]
    return [*named, (f"{len(rest)} others", GREY, table[:, rest].sum(1))]


def _bars(figure: Any, federation: Federation) -> None:
    data, clients = federation.dataset, len(federation)
    rows = summary(federation)
    sizes = np.array([federation.size(c, "train") for c in _spread(clients, SIZED)])
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))

    # Labels of a sequence are drawn as shares of its client's examples, so that both panels have one axis.
    bottom, width = np.zeros(len(rows)), 0.86 if len(rows) > 1 else 0.3
    scale = np.array([row.examples / max(1, row.labels.sum()) for row in rows])
    for label, colour, counts in _groups(rows):
        left.bar(
            np.arange(len(rows)), counts * scale, width, bottom, color=colour, edgecolor="white", lw=0.3, label=label
        )
        bottom += counts * scale
    named = all(row.name for row in rows) and len(rows) <= 8
    marks = [row.name if named else f"{row.client:,}" for row in rows]
    # About 80 characters fit under the axis, with a gap of three between two marks.
    step = 1 if named else max(1, -(-len(rows) * (max(map(len, marks)) + 3) // 80))
    left.set_xticks(range(0, len(rows), step), marks[::step])
    left.set_xlim(-0.7, len(rows) - 0.3)
    left.set_ylabel("examples of the client")
    order = ", smallest to largest" * (int(sizes.min()) < int(sizes.max()))
    left.set_xlabel("client" if len(rows) == clients else f"client ({len(rows)} of {clients:,}{order})")
    left.yaxis.get_major_locator().set_params(integer=True)
    handles, names = left.get_legend_handles_labels()
    figure.legend(
        handles, names, title="label", loc="outside right upper", frameon=False, handlelength=1, handleheight=1
    )

    low, high = int(sizes.min()), int(sizes.max())
    bins = min(24, high - low + 1)
    # Where all have one size, a bar thick enough to be seen.
    half = max(0.5, 0.015 * high)
    edges = np.linspace(low, high, bins + 1) if high > low else np.array([low - half, low + half])
    right.hist(sizes, bins=edges, orientation="horizontal", color="#777777", edgecolor="white", lw=0.4)
    right.axhline(float(np.median(sizes)), color=INK, lw=1, ls=(0, (4, 2)))
    right.set_title(f"median {np.median(sizes):,.0f}", fontsize=9, color=INK)
    right.set_xlabel("clients" if len(sizes) == clients else f"clients ({len(sizes):,} of {clients:,})")
    right.tick_params(axis="y", length=0)
    right.xaxis.get_major_locator().set_params(integer=True, nbins=3)
    right.xaxis.set_major_formatter("{x:,.0f}")
    left.yaxis.set_major_formatter("{x:,.0f}")

    of = f"{len(data.train.y):,} examples" if len(sizes) < clients else f"{sizes.sum():,} examples held"
    left.set_title(
        f"{data.name}: {clients:,} client{'s' * (clients != 1)}, {of}, {f'{low:,} to ' * (low < high)}{high:,} each",
        loc="left",
        fontsize=10,
        fontweight="bold",
    )
