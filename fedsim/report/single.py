"""One run as one page: what it was, what it came to, and how it got there."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import tomli_w

from fedsim import files, record
from fedsim.errors import ConfigError
from fedsim.progress import duration, number, size
from fedsim.report import figures, leakage, page
from fedsim.report.figures import Curve

REPORT, PARTITION, PRIVACY, EMBEDDINGS = "report.html", "partition.svg", "privacy.txt", "embeddings.svg"
RANGE = ("max", "median", "min")  # over clients, as ``server.reduce.ranged`` names them
FAILURES = 200  # rows of the failures table; a run that drops a client every round must not make a page of megabytes


def write(run_dir: Path) -> Path:
    """Make ``report.html`` from the files of a run folder, also of one that failed, was killed, or is still running.

    Raises ``ConfigError`` for files that are no run's.
    """
    config = record.read_config(run_dir)
    strategy = config.get("strategy")
    if not ({"name", "seed"} <= config.keys() and isinstance(strategy, dict) and "name" in strategy):
        raise ConfigError(f"{run_dir / record.CONFIG}: must be a run's, with a name, a seed and a [strategy]")
    lines = record.read_lines(run_dir)
    summary = record.read_summary(run_dir) or unfinished(config, lines)
    body = [
        *_header(config, summary),
        *_privacy(run_dir),
        *_learning(lines),
        *_gauges(lines),
        *_clients(run_dir),
        *leakage.section(run_dir),
        *_cost(lines),
        *_failures(lines),
        *_setup(config, summary),
    ]
    out = run_dir / REPORT
    files.write(out, page.page(f"{config['name']} – {config['strategy']['name']}", body).encode())
    return out


def unfinished(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What can be said of a run that left no summary."""
    return {
        "strategy": config["strategy"]["name"],
        "seed": config["seed"],
        "status": "unfinished",
        **record.summarise(lines),
        "wall_seconds": sum(line.get("seconds") or 0 for line in lines),
    }


def _header(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    status, planned = summary["status"], config.get("rounds")
    rounds = f"{summary['rounds']:,}" + (f" of {planned:,}" if planned and planned != summary["rounds"] else "")
    best = "best accuracy" + (f" (round {summary['best_round']:,})" if summary.get("best_round") is not None else "")
    tiles = [
        ("final accuracy", number(summary.get("final_accuracy"), ".4f")),
        (best, number(summary.get("best_accuracy"), ".4f")),
        ("final loss", number(summary.get("final_loss"), ".4f")),
        ("rounds", rounds),
        ("clients a second", number(summary.get("client_updates_per_second"), ",.1f")),
        ("sent to clients", size(summary["total_bytes_down"])),
        ("received from clients", size(summary["total_bytes_up"])),
        ("wall time", duration(summary["wall_seconds"])),
        *([("of it in rounds", duration(summary["total_seconds"]))] if "total_seconds" in summary else []),
        ("peak memory", size(summary["peak_rss_mb"] * 1e6) if "peak_rss_mb" in summary else "-"),
    ]
    if summary.get("best_accuracy") is None and "personal_accuracy_mean" in summary:
        tiles[:2] = [("final accuracy of own models, mean", number(summary["personal_accuracy_mean"], ".4f"))]
    if summary.get("epsilon") is not None:
        tiles.insert(3, ("privacy loss ε", f"{summary['epsilon']:.3f}"))
    elif "epsilon_if_secret" in summary:
        tiles.insert(3, ("privacy loss ε", "no bound (seeded)"))
    badge = f'<span class="badge {escape(status)}">{escape(status)}</span>'
    parts = [
        f'<div class="top"><h1>{escape(config["name"])}</h1>{badge}</div>',
        f'<p class="sub">{escape(_sentence(config))}</p>',
        page.tiles(tiles),
    ]
    if summary.get("error"):
        parts.append(page.note(str(summary["error"]), "error"))
    return parts


def _sentence(config: Mapping[str, Any]) -> str:
    """The experiment in one line: strategy, data, partition, model, seed."""
    data, task = config.get("data", {}), config.get("task", {})
    partition = dict(data.get("partition", {}))
    how = ", ".join(f"{key} {value}" for key, value in partition.items() if key != "name")
    parts = [
        config["strategy"]["name"],
        data.get("name", ""),
        f"{partition.get('name', '')} ({how})" if how else partition.get("name", ""),
        task.get("model", ""),
        f"seed {config['seed']}",
    ]
    return " · ".join(part for part in parts if part)


def curve(lines: Sequence[Mapping[str, Any]], key: str, label: str, x: Sequence[float]) -> list[Curve]:
    """A key as a curve, in a list; an empty list where it was never measured."""
    points = [(at, line[key]) for at, line in zip(x, lines, strict=True) if key in line]
    return [Curve(label, [p[0] for p in points], [p[1] for p in points])] if points else []


def traffic(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """All bytes that had been exchanged at the end of each round."""
    return list(itertools.accumulate((line.get("bytes_down") or 0) + (line.get("bytes_up") or 0) for line in lines))


def _learning(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    if not lines:
        return [page.section("Learning", page.note("No round was finished."))]
    rounds, sent = [line["round"] for line in lines], traffic(lines)

    def accuracy(x: Sequence[float]) -> list[Curve]:
        keys = {
            "accuracy": "accuracy",
            "macro_f1": "macro F1",
            "client_accuracy_mean": "clients' mean",
            "personal_accuracy_mean": "own models' mean",
        }
        return [c for key, label in keys.items() for c in curve(lines, key, label, x)]

    def loss(x: Sequence[float]) -> list[Curve]:
        return curve(lines, "loss", "test", x) + curve(lines, "train_loss", "training", x)

    cards = []
    for ident, title, curves, fixed in (("acc", "Accuracy", accuracy, True), ("loss", "Loss", loss, False)):
        if curves(rounds):
            cards.append(page.card(figures.chart(ident, title, curves(rounds), fixed=fixed)))
    if sent[-1] > 0:
        for ident, title, curves, fixed in (("accb", "Accuracy", accuracy, True), ("lossb", "Loss", loss, False)):
            if curves(sent):
                svg = figures.chart(
                    ident, f"{title} by communication", curves(sent), x="bytes sent, both ways", fixed=fixed
                )
                cards.append(page.card(svg))
    if loss(rounds) and all("queries" in line for line in lines):
        asked = [line["queries"] for line in lines]  # so far, by all clients
        cards.append(page.card(figures.chart("lossq", "Loss by queries", loss(asked), x="queries, all clients")))
    epsilon = curve(lines, "epsilon", "ε", rounds)
    if epsilon:
        cards.append(page.card(figures.chart("eps", "Privacy loss ε", epsilon)))
    return [page.section("Learning", page.grid(cards))]


def _gauges(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rounds, keys = [line["round"] for line in lines], record.gauges(lines)
    ranges = {f"{key}_{part}" for key in keys if f"{key}_min" in keys for part in RANGE}
    cards = []
    for i, key in enumerate(k for k in keys if k not in ranges):
        # A metric and its range over the clients are one picture.
        parts = [c for part in RANGE if f"{key}_{part}" in ranges for c in curve(lines, f"{key}_{part}", part, rounds)]
        curves = [*curve(lines, key, "mean" if parts else key, rounds), *parts]
        cards.append(page.card(figures.chart(f"gauge{i}", key.replace("_", " "), curves)))
    return [page.section("Inside the strategy", page.grid(cards))] if cards else []


def _clients(run_dir: Path) -> list[str]:
    cards = []
    pictures = ((PARTITION, "How the data is spread over the clients"), (EMBEDDINGS, "How embeddings moved"))
    for picture, what in ((run_dir / name, what) for name, what in pictures):
        if not picture.exists():
            continue
        # As an image, a picture can neither run a script nor clash with the ids of the page.
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img alt="{what}" src="data:image/svg+xml;base64,{data}">'
        cards.append(f'<figure class="card wide picture">{image}</figure>')
    rows = [row for row in record.read_clients(run_dir) if row.get("accuracy") is not None]
    if rows:
        scores = [row["accuracy"] for row in rows]
        own = [row["personal_accuracy"] for row in rows if row.get("personal_accuracy") is not None]
        svg = figures.clients("clients", scores, own if len(own) == len(scores) else None)
        worst = min(rows, key=lambda row: (row["accuracy"], row["client"]))
        count = f"{worst['examples']:,} example{'s' * (worst['examples'] != 1)}"
        caption = f"Worst: client {worst['client']}, {worst['accuracy']:.3f} on {count} of its own."
        cards.append(page.card(svg, caption, wide=True))
    return [page.section("Clients", page.grid(cards))] if cards else []


def _cost(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rounds = [line["round"] for line in lines]
    sums = [
        Curve(label, rounds, list(itertools.accumulate(line.get(key) or 0 for line in lines)))
        for key, label in (("bytes_down", "to clients"), ("bytes_up", "from clients"))
    ]
    cards = []
    if any(c.y and c.y[-1] for c in sums):
        cards.append(page.card(figures.chart("bytes", "Communication so far", sums, unit="bytes")))
    seconds = curve(lines, "seconds", "seconds", rounds)
    if seconds:
        cards.append(page.card(figures.chart("time", "Time of each round", seconds, unit="seconds")))
    return [page.section("Cost", page.grid(cards))] if cards else []


def _failures(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [(line["round"], failure) for line in lines for failure in line.get("failures") or ()]
    if not found:
        return []
    rows = [(str(at), str(failure["client"]), str(failure["reason"])) for at, failure in found[:FAILURES]]
    more = (
        page.note(f"The first {FAILURES} of {len(found):,}; all are in {record.METRICS}.")
        if len(found) > FAILURES
        else ""
    )
    return [page.section(f"Failures ({len(found):,})", page.table(("round", "client", "reason"), rows, (0, 1)), more)]


def _setup(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    parts = [page.fold("Resolved config", page.pre(tomli_w.dumps(dict(config))))]
    environment = summary.get("environment")
    if environment:
        rows = [(str(key), str(value)) for key, value in environment.items()]
        parts.append(page.fold("Environment", page.table(("", "version"), rows)))
    digest = summary.get("params_sha256")
    foot = f"<footer>Run it again: <code>fedsim run {record.CONFIG}</code>"
    if digest:
        foot += f"<br>Final parameters: sha256 <code>{escape(str(digest))}</code>"
    return [page.section("Setup", *parts), foot + "</footer>"]


def _privacy(run_dir: Path) -> list[str]:
    path = run_dir / PRIVACY
    if not path.exists():
        return []
    return [page.section("Privacy", page.note(path.read_text(encoding="utf-8").strip(), "private"))]
