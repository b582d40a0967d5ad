"""Runs side by side. Runs that differ in seed (and name) only are one group, and a group is a mean with its spread."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from fedsim import files, record
from fedsim.errors import ConfigError
from fedsim.progress import duration, number, size
from fedsim.report import figures, leakage, page
from fedsim.report.figures import Curve
from fedsim.report.single import traffic

PERSONAL = "personal_accuracy_mean"


class Run(NamedTuple):
    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any] | None
    code: str = ""  # a digest of the user's own code behind it; "" where there is none

    @property
    def scored(self) -> str:
        """The key of its lines that is its accuracy: that of clients' own models where there is no global one."""
        known = {key for line in self.lines for key in ("accuracy", PERSONAL) if key in line}
        return PERSONAL if known == {PERSONAL} else "accuracy"

    @property
    def ended(self) -> bool:
        return self.summary is not None and record.ended(self.summary)


class Stat(NamedTuple):
    """Mean and sample standard deviation (n - 1) over seeds; None where there are too few of them."""

    mean: float | None
    sd: float | None


class Row(NamedTuple):
    """A group. Only runs that ended count: a run that was cut short ends at another round than its fellows.

    changed: the dotted config keys in which the groups differ, with this group's values; and ``code``, a digest of the
             user's own code, where that differs under one config
    seeds:   of the runs that ended
    runs:    how many runs there are, ended or not
    personal: the final mean accuracy of clients' own models on their own held-out examples
    reached: of the runs that ended, how many reached the target; ``rounds_to_target`` averages over these
    seconds: in rounds; what came before (the first run of a process imports, and loads data) says nothing of a strategy
    """

    strategy: str
    changed: dict[str, Any]
    seeds: tuple[int, ...]
    runs: int
    final: Stat
    best: Stat
    personal: Stat
    rounds_to_target: Stat | None
    reached: int
    bytes: Stat
    seconds: Stat

    @property
    def label(self) -> str:
        """How a legend calls it."""
        changes = [f"{key}={_plain(value)}" for key, value in self.changed.items() if key != "strategy.name"]
        return " ".join([self.strategy, *changes])


def compare(run_dirs: Sequence[Path], out: Path | None = None, target: float | None = None) -> list[Row]:
    """Print a table of the runs, grouped over seeds, and draw their curves into ``out`` (.html or .svg).

    ``target`` is an accuracy; with it the table says how many rounds it took. Where there is no global model, target
    and curves are of the mean accuracy of clients' own models. Files among the paths are passed over: ``sweep/*`` has a
    ``compare.html`` in it. Raises ``ConfigError`` with one line for every folder that is not a run.
    """
    if out is not None and out.suffix not in (".html", ".svg"):
        raise ConfigError(f"{out}: must end in .html or .svg")
    skipped = [path for path in run_dirs if path.is_file()]
    runs, notes = _distinct(_load([path for path in run_dirs if path not in skipped]))
    groups = _group(runs)
    changed = _changed(groups)
    rows = [_row(group, c, target) for group, c in zip(groups, changed, strict=True)]
    notes = [f"{path}: not a run folder; skipped" for path in skipped] + notes
    notes += [note for run in runs if (note := _note(run))]
    if any(row.personal.mean is not None for row in rows):
        notes.append(
            "personal: mean accuracy of clients' own models; without a global model, target and curves are of it"
        )
    _print(*_cells(rows, target), "seeds")
    if (leaks := _leaks(rows, groups))[1]:
        _print(*leaks, "seeds")
    for text in notes:
        print(f"note: {text}", file=sys.stderr)
    if out is not None:
        done = [[run for run in group if run.ended] for group in groups]
        _draw(rows, done, notes, target, out)
    return rows


def stat(values: Sequence[float | None]) -> Stat:
    """Mean and sample standard deviation; no mean where a value is missing, for it would be that of the survivors."""
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return Stat(None, None)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Stat(mean, None)
    return Stat(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1)))


def _load(run_dirs: Sequence[Path]) -> list[Run]:
    runs: list[Run] = []
    problems: list[str] = []
    for folder in run_dirs:
        try:
            if not folder.is_dir():
                raise ConfigError(f"{folder}: no such folder")
            config = record.read_config(folder)
            if not isinstance(config.get("seed"), int) or "name" not in config.get("strategy", {}):
                raise ConfigError(f"{folder / record.CONFIG}: has no seed or no strategy")
            summary = record.read_summary(folder)
            runs.append(Run(folder, config, record.read_lines(folder), summary, _code(summary or {})))
        except ConfigError as e:
            problems += e.problems
    # What has no summary yet is taken for the code of the others like it.
    codes = {_settings(run): run.code for run in runs if run.summary}
    runs = [run if run.summary else run._replace(code=codes.get(_settings(run), "")) for run in runs]
    if not run_dirs:
        problems.append("compare: needs at least one run folder")
    if problems:
        raise ConfigError(*problems)
    return runs


def _note(run: Run) -> str:
    """What the table does not tell of a run; nothing of one like any other."""
    summary = run.summary or {"status": "unfinished"}
    parts = [] if run.ended else [f"{summary['status']}; not counted"]
    if run.ended and summary["status"] == "stopped":
        parts.append(f"its privacy budget was spent after {summary['rounds']} of {run.config.get('rounds')} rounds")
    if lost := summary.get("total_failures"):
        parts.append(f"{lost} update{'s' * (lost != 1)} of failing clients dropped")
    return f"{run.folder}: {'; '.join(parts)}" if parts else ""


def _code(summary: Mapping[str, Any]) -> str:
    """What tells the versions of a user's own code apart."""
    files = [summary.get("sources"), *summary.get("earlier_sources", [])]
    return sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8] if any(files) else ""


def _key(run: Run) -> tuple[str, str]:
    """What runs of one group have in common."""
    return _settings(run), run.code


def _settings(run: Run) -> str:
    return json.dumps({k: v for k, v in run.config.items() if k not in ("name", "seed")}, sort_keys=True, default=str)


def _distinct(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Without repetitions: the same seed twice is one observation, and would make the spread too small."""
    kept: dict[Any, Run] = {}
    notes = []
    for run in runs:
        first = kept.setdefault((_key(run), run.config["seed"]), run)
        if first is run:
            continue
        if run.ended and not first.ended:
            kept[_key(run), run.config["seed"]], run, first = run, first, run
        notes.append(f"{run.folder}: same config and seed as {first.folder}; counted once")
    return list(kept.values()), notes


def _group(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups in the order in which they were given, each sorted by seed."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    return [sorted(group, key=lambda run: int(run.config["seed"])) for group in groups.values()]


def _changed(groups: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """For each group, the keys that are not the same in all groups. A key that a group lacks is None there.

    The code is one of them where a user's own differs under one config, and else says nothing that this does not.
    """
    flat = [_flatten({k: v for k, v in g[0].config.items() if k not in ("name", "seed")}) for g in groups]
    settings = [_settings(group[0]) for group in groups]
    if len(set(settings)) < len(settings):
        flat = [f | {"code": group[0].code} for f, group in zip(flat, groups, strict=True)]
    keys = list(dict.fromkeys(key for f in flat for key in f))
    differ = [key for key in keys if any(f.get(key) != flat[0].get(key) for f in flat)]
    # Keys of another strategy's own table say nothing here: only those that this group has are listed.
    return [{key: f[key] for key in differ if key in f} for f in flat]


def _flatten(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return out


def _row(group: Sequence[Run], changed: dict[str, Any], target: float | None) -> Row:
    done = [run for run in group if run.ended]
    summaries = [run.summary or {} for run in done]
    reached = [hit for run in done if (hit := _first(run, target)) is not None]
    return Row(
        strategy=group[0].config["strategy"]["name"],
        changed=changed,
        seeds=tuple(run.config["seed"] for run in done),
        runs=len(group),
        final=stat([s.get("final_accuracy") for s in summaries]),
        best=stat([s.get("best_accuracy") for s in summaries]),
        personal=stat([s.get(PERSONAL) for s in summaries]),
        rounds_to_target=None if target is None else stat(reached),
        reached=len(reached),
        bytes=stat([s.get("total_bytes_down", 0) + s.get("total_bytes_up", 0) for s in summaries]),
        seconds=stat([math.fsum(line.get("seconds") or 0 for line in run.lines) for run in done]),
    )


def _first(run: Run, target: float | None) -> int | None:
    """The first round whose accuracy is at least the target."""
    key = run.scored
    hits = (line["round"] for line in run.lines if target is not None and (line.get(key) or 0.0) >= target)
    return next(hits, None)


def _cells(rows: Sequence[Row], target: float | None) -> tuple[list[str], list[list[str]]]:
    """The table as text: heads, and a line for each group."""
    keys = [k for k in dict.fromkeys(key for row in rows for key in row.changed) if k != "strategy.name"]
    own = any(row.personal.mean is not None for row in rows)
    heads = ["strategy", *keys, "seeds", "accuracy", "best"]
    heads += ["personal"] * own + ([] if target is None else [f"rounds to {target:g}"])
    heads += ["bytes", "time in rounds"]
    lines = []
    for row in rows:
        n = len(row.seeds)
        cells = [row.strategy, *(_plain(row.changed[k]) if k in row.changed else "" for k in keys)]
        cells += [str(n) if n == row.runs else f"{n} of {row.runs}", _spread(row.final), _spread(row.best)]
        cells += [_spread(row.personal)] * own
        if row.rounds_to_target is not None:
            text = number(row.rounds_to_target.mean, ".4g")
            cells.append(text if row.reached in (0, n) else f"{text} ({row.reached} of {n})")
        cells += [_one(row.bytes, size), _one(row.seconds, duration)]
        lines.append(cells)
    return heads, lines


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _spread(s: Stat) -> str:
    return number(s.mean, ".4f") + (f" ± {s.sd:.4f}" if s.sd is not None else "")


def _one(s: Stat, form: Callable[[float], str]) -> str:
    return "-" if s.mean is None else form(s.mean)


def _leaks(rows: Sequence[Row], groups: Sequence[Sequence[Run]]) -> tuple[list[str], list[list[str]]]:
    """The table of what attacks found, for the groups that were attacked."""
    done = [[run.summary or {} for run in group if run.ended] for group in groups]
    return leakage.table([(row.label, summaries) for row, summaries in zip(rows, done, strict=True)])


def _print(heads: Sequence[str], lines: Sequence[Sequence[str]], first_number: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    first = heads.index(first_number)
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if i >= first else "left", no_wrap=i >= first, overflow="fold")
    for cells in lines:
        table.add_row(*map(Text, cells))
    # In a pipe there is no width to fit into, and a cut number is worse than a long line.
    console = Console() if sys.stdout.isatty() else Console(width=max(80, 40 + 24 * len(heads)))
    console.print(table)


def _curves(rows: Sequence[Row], groups: Sequence[Sequence[Run]], key: str, by_bytes: bool = False) -> list[Curve]:
    """The mean of each group at the rounds that all its seeds measured, with its standard deviation as a band."""
    curves = []
    for row, group in zip(rows, groups, strict=True):
        of = group[0].scored if group and key == "accuracy" else key
        found = [{line["round"]: line[of] for line in run.lines if line.get(of) is not None} for run in group]
        rounds = sorted(set.intersection(*map(set, found))) if found else []
        if not rounds:
            continue
        stats = [stat([f[at] for f in found]) for at in rounds]
        x: list[float] = list(rounds)
        if by_bytes:
            sent = [dict(zip((line["round"] for line in run.lines), traffic(run.lines), strict=True)) for run in group]
            x = [math.fsum(s[at] for s in sent) / len(sent) for at in rounds]
        band = [s.sd for s in stats if s.sd is not None]
        label = f"{row.label} (clients' own models)" if of == PERSONAL else row.label
        curves.append(Curve(label, x, [s.mean for s in stats], band or None))
    return curves


def _draw(
    rows: Sequence[Row], groups: Sequence[Sequence[Run]], notes: Sequence[str], target: float | None, out: Path
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    accuracy = _curves(rows, groups, "accuracy")
    if out.suffix == ".svg":
        svg = figures.chart("acc", "Accuracy", accuracy, wide=True, fixed=True)
        files.write(out, figures.standalone(svg).encode())
        return
    heads, lines = _cells(rows, target)
    numeric = range(heads.index("seeds"), len(heads))
    cards = []
    if accuracy:
        caption = "Mean over seeds; the band is one standard deviation to either side."
        cards.append(page.card(figures.chart("acc", "Accuracy", accuracy, wide=True, fixed=True), caption, wide=True))
    loss = _curves(rows, groups, "loss")
    if loss:
        cards.append(page.card(figures.chart("loss", "Loss", loss)))
    by_bytes = _curves(rows, groups, "accuracy", by_bytes=True)
    if by_bytes and max(c.x[-1] for c in by_bytes) > 0:
        svg = figures.chart("accb", "Accuracy by communication", by_bytes, x="bytes sent, both ways", fixed=True)
        cards.append(page.card(svg))
    leak_heads, leaks = _leaks(rows, groups)
    table = page.table(leak_heads, leaks, range(1, len(leak_heads)))
    runs = sum(row.runs for row in rows)
    sub = f"{runs} runs in {len(rows)} groups; accuracy is mean ± standard deviation over seeds"
    body = [
        '<div class="top"><h1>Comparison</h1></div>',
        f'<p class="sub">{escape(sub)}</p>',
        page.section("Results", page.table(heads, lines, numeric)),
        page.section("Leakage", page.note(leakage.CAPTION), table) if leaks else "",
        page.section("Curves", page.grid(cards)) if cards else "",
        page.note("\n".join(notes)) if notes else "",
    ]
    files.write(out, page.page("fedsim: comparison", body).encode())
