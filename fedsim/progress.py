"""What a person sees of a run: a live bar on a terminal, silence in a pipe, and a table at the end."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WINDOW = 20  # rounds over which clients/s is averaged: long enough to be steady, short enough to show a slow-down


@contextmanager
def live(rounds: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A bar for ``rounds`` rounds; gives the function to call with each round's line. A resumed run begins further on.

    Where stdout is not a terminal, nothing is shown and the function does nothing. What is printed to stdout or stderr
    meanwhile appears above the bar.
    """
    if not sys.stdout.isatty():
        yield lambda line: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console()
    columns = (
        SpinnerColumn(),
        TextColumn("round {task.completed}/{task.total}"),
        *([BarColumn(bar_width=24)] if console.width >= 100 else []),  # the numbers matter more than the bar
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        *([TextColumn("left")] if console.width >= 100 else []),
    )
    # A stderr that goes to a file must keep going there.
    bar = Progress(*columns, console=console, transient=True, redirect_stderr=sys.stderr.isatty())
    task = bar.add_task("", total=rounds, state="starting")
    seen: dict[str, Any] = {}
    recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def show(line: Mapping[str, Any]) -> None:
        if not seen and line["round"] > 1:
            bar.reset(task, completed=line["round"] - 1)  # rounds of an earlier session are not this one's speed
        seen.update(line)
        recent.append((line.get("clients") or 0, line.get("seconds") or 0.0))
        bar.update(task, completed=line["round"], state=state(seen, rate(recent)))

    with bar:
        yield show


def rate(recent: "deque[tuple[int, float]]") -> float | None:
    """Clients a second over (clients, seconds) of the latest rounds."""
    seconds = sum(s for _, s in recent)
    return sum(c for c, _ in recent) / seconds if seconds > 0 else None


def state(seen: Mapping[str, Any], per_second: float | None) -> str:
    """The moving part of the bar. ``seen`` holds the latest value of each key, since not every round is evaluated."""
    loss = "loss" if "loss" in seen else "train_loss"
    parts = [f"loss {number(seen[loss], '.4f')}"] if loss in seen else []
    if "accuracy" in seen:
        parts.append(f"accuracy {number(seen['accuracy'], '.4f')}")
    elif "personal_accuracy_mean" in seen:
        parts.append(f"personal {number(seen['personal_accuracy_mean'], '.4f')}")
    if per_second is not None:
        parts.append(f"{per_second:,.0f} clients/s" if per_second >= 10 else f"{per_second:.1f} clients/s")
    if seen.get("epsilon") is not None:
        parts.append(f"ε {seen['epsilon']:.2f}")
    return "  ".join(parts)


def closing(summary: Mapping[str, Any], report: Path | None = None, file: Any = None) -> None:
    """Print the table of a run that ended, and the path of its report."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for key, value in rows(summary):
        table.add_row(key, Text(value))
    console = Console(file=file)
    console.print(table)
    if report is not None:
        console.print(Text(f"report: {report}"), soft_wrap=True)  # a path broken over two lines cannot be clicked


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The closing table, as text."""
    s = summary
    out = [
        ("strategy", str(s["strategy"])),
        ("rounds", str(s["rounds"]) if s["status"] == "completed" else f"{s['rounds']} ({s['status']})"),
        ("accuracy", f"{number(s.get('final_accuracy'), '.4f')} (best {number(s.get('best_accuracy'), '.4f')})"),
        ("loss", number(s.get("final_loss"), ".4f")),
    ]
    if "personal_accuracy_mean" in s:
        out.insert(3, ("personal", f"{number(s['personal_accuracy_mean'], '.4f')} (mean of clients' own models)"))
    if s.get("best_accuracy") is None and (s.get("final_loss") is not None or "personal_accuracy_mean" in s):
        del out[2]  # a function to be minimised has none, nor have clients that share no model
    if s.get("epsilon") is not None:
        out.append(("epsilon", f"{s['epsilon']:.3f}"))
    elif "epsilon_if_secret" in s:
        out.append(("epsilon", "no bound: the noise is seeded"))
    out += [
        ("clients/s", number(s.get("client_updates_per_second"), ",.1f")),
        ("bytes", f"{size(s['total_bytes_down'])} down, {size(s['total_bytes_up'])} up"),
        ("wall", wall(s)),
        ("params", (s.get("params_sha256") or "-")[:12]),
    ]
    if s.get("total_failures"):
        out.append(("failures", str(s["total_failures"])))
    return out


def wall(summary: Mapping[str, Any]) -> str:
    """How long a run took, and how much of that its rounds: the first run of a process also imports and loads."""
    whole, rounds = duration(summary["wall_seconds"]), summary.get("total_seconds")
    return whole if rounds is None else f"{whole}, {duration(rounds)} of it in rounds"


def number(value: float | None, form: str) -> str:
    """A formatted number; a dash for one that is absent or was not a number."""
    return "-" if value is None else format(value, form)


def size(count: float) -> str:
    """Bytes for a person, in powers of 1000."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = 0
    while count >= 999.5 and power + 1 < len(units):
        count, power = count / 1000, power + 1
    return f"{count:.0f} {units[power]}" if power == 0 or count >= 99.95 else f"{count:.1f} {units[power]}"


def duration(seconds: float) -> str:
    """Seconds for a person: ``0.04 s``, ``4.2 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def warn(message: str) -> None:
    """A warning, on stderr: it never mixes with the table in a pipe."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
